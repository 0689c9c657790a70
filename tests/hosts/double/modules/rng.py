"""Random numbers, one generator an image, so that an image does not depend on its batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from modules import devices, shared


def randn(seed: int, shape: Sequence[int], generator: torch.Generator | None = None) -> torch.Tensor:
    manual_seed(seed)
    return torch.randn(tuple(shape), generator=generator)


def randn_local(seed: int, shape: Sequence[int]) -> torch.Tensor:
    return torch.randn(tuple(shape), generator=create_generator(seed))


def randn_like(x: torch.Tensor) -> torch.Tensor:
    return torch.randn_like(x)


def randn_without_seed(shape: Sequence[int], generator: torch.Generator | None = None) -> torch.Tensor:
    return torch.randn(tuple(shape), generator=generator)


def manual_seed(seed: int) -> None:
    torch.manual_seed(seed)


def create_generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(int(seed))


def slerp(val: float, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Spherical interpolation along the second dimension of both tensors."""
    cosine = (low / low.norm(dim=1, keepdim=True) * (high / high.norm(dim=1, keepdim=True))).sum(1)
    if cosine.mean() > 0.9995:
        return low * val + high * (1 - val)
    angle = cosine.acos()
    a = (((1.0 - val) * angle).sin() / angle.sin()).unsqueeze(1)
    b = ((val * angle).sin() / angle.sin()).unsqueeze(1)
    return a * low + b * high


class ImageRNG:
    """Noise of a batch: `next()` first gives the initial latent, then noise for the samplers."""

    def __init__(
        self,
        shape: Sequence[int],
        seeds: Sequence[int],
        subseeds: Sequence[int] | None = None,
        subseed_strength: float = 0.0,
        seed_resize_from_h: int = 0,
        seed_resize_from_w: int = 0,
    ) -> None:
        self.shape = tuple(int(n) for n in shape)
        self.seeds = seeds
        self.subseeds = subseeds
        self.subseed_strength = subseed_strength
        self.seed_resize_from_h = seed_resize_from_h
        self.seed_resize_from_w = seed_resize_from_w
        self.generators = [create_generator(seed) for seed in seeds]
        self.is_first = True

    def _initial(self, index: int) -> torch.Tensor:
        seed, generator = self.seeds[index], self.generators[index]
        h, w = int(self.seed_resize_from_h), int(self.seed_resize_from_w)
        source = self.shape if h <= 0 or w <= 0 else (self.shape[0], h // 8, w // 8)
        resized = source != self.shape
        noise = randn(seed, source, None if resized else generator)
        if self.subseeds is not None and self.subseed_strength != 0:
            subseed = self.subseeds[index] if index < len(self.subseeds) else 0
            noise = slerp(self.subseed_strength, noise, randn(subseed, source))
        return _paste(noise, randn(seed, self.shape, generator)) if resized else noise

    def first(self) -> torch.Tensor:
        batch = torch.stack([self._initial(i) for i in range(len(self.seeds))])
        delta = shared.opts.eta_noise_seed_delta or 0
        if delta:
            self.generators = [create_generator(seed + delta) for seed in self.seeds]
        return batch.to(devices.device)

    def next(self) -> torch.Tensor:
        if self.is_first:
            self.is_first = False
            return self.first()
        return torch.stack([randn_without_seed(self.shape, g) for g in self.generators]).to(devices.device)


def _paste(noise: torch.Tensor, canvas: torch.Tensor) -> torch.Tensor:
    """Centre `noise` on `canvas`, cropping where it is larger."""
    views: list[Any] = []
    for source, target in zip(noise.shape[1:], canvas.shape[1:]):
        offset = (target - source) // 2
        size = source + min(0, 2 * offset)
        views.append([slice(start, start + size) for start in (max(-offset, 0), max(offset, 0))])
    (from_y, to_y), (from_x, to_x) = views
    canvas[:, to_y, to_x] = noise[:, from_y, from_x]
    return canvas


for _function in (randn, randn_local, randn_like, randn_without_seed, manual_seed):
    setattr(devices, _function.__name__, _function)
