"""The methods side by side on the analytic toy: the same noises, DDIM, guidance 7, no WebUI and no GPU.

The toy is exact mathematics of a small made-up distribution (`lib_memnoise.lab.toy`). It shows what the methods do
and what they cost; it is no evidence about SD checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lib_memnoise.lab.records import aligned
from lib_memnoise.lab.sampling import TRAINING_STEPS, ddim, ddim_timesteps
from lib_memnoise.lab.toy import Toy, correlation, make_toy
from lib_memnoise.mitigations.outcome import run
from lib_memnoise.prediction import Delta, magnitude
from lib_memnoise.settings import Settings

CFG = 7.0
COPIED = 0.8
"""Correlation with the memorised picture above which an image counts as a copy of it. Two pictures that share
no more than the theme have about 0.3."""
PRESET = "relative"
"""The toy is a "checkpoint" without published numbers."""

COMPARED: dict[str, Settings] = {
    "none": Settings(enabled=False),
    "static tau": Settings(enabled=True, gamma=0.0),
    "batch-wise": Settings(enabled=True),
    "per-sample": Settings(enabled=True, method="per_sample"),
}

STATEMENT = (
    "An analytic toy: the exact denoiser of a small made-up distribution, not a trained network.\n"
    "It shows what the methods do and cost; it is no evidence about Stable Diffusion checkpoints."
)


@dataclass(frozen=True)
class Network:
    """The toy as a network that counts its rows: one row is one image under one prompt at one timestep."""

    toy: Toy
    prompt: Tensor
    """`(B,)`: the prompt of each image, 0…P−1."""
    image: Tensor
    """`(B,)`: where each image's rows are counted."""
    forward: Tensor
    backward: Tensor

    def eps(self, x: Tensor, t: int, conditional: bool) -> Tensor:
        self.forward[self.image] += 1
        empty = torch.full_like(self.prompt, self.toy.prompts)
        return self.toy.mixture.eps(x, t, self.prompt if conditional else empty)

    def of(self, images: list[int]) -> Network:
        return replace(self, prompt=self.prompt[images], image=self.image[images])

    def count_backward(self, gradient: Tensor) -> None:
        """Two rows for each image whose Δ was differentiated."""
        self.backward[self.image] += 2 * (magnitude(gradient) > 0)


@dataclass(frozen=True)
class FirstDelta:
    """Δ(x, T) of the toy; a `lib_memnoise.prediction.SelectableDelta`."""

    network: Network
    t: int

    def __call__(self, x: Tensor) -> Tensor:
        delta = self.network.eps(x, self.t, True) - self.network.eps(x, self.t, False)
        if delta.requires_grad:
            delta.register_hook(self.network.count_backward)
        return delta

    def select(self, images: list[int]) -> Delta:
        return replace(self, network=self.network.of(images))


def make_network(toy: Toy, prompt: Tensor) -> Network:
    """The toy with its counts at zero, for a batch whose images have these prompts `(B,)`."""
    count = torch.zeros_like(prompt)
    return Network(toy, prompt, torch.arange(len(prompt)), count, count.clone())


def noises(toy: Toy, images: int, seed: int) -> Tensor:
    """Initial latents `(P·images, C, H, W)`, prompt by prompt.

    Drawn one by one from a generator for each prompt, so that a larger `images` adds to the same noises.
    """
    drawn = []
    for prompt in range(toy.prompts):
        generator = torch.Generator().manual_seed(seed * toy.prompts + prompt)
        drawn += [torch.randn(toy.memorised[0].shape, generator=generator) for _ in range(images)]
    return torch.stack(drawn)


def generate(network: Network, x: Tensor, settings: Settings, steps: int) -> tuple[Tensor, Tensor]:
    """Adjust the initial latents x `(B, C, H, W)` as the settings say, and sample: (x̃_T, x_0)."""
    timesteps = ddim_timesteps(steps)
    tau = float(TRAINING_STEPS - 1)
    if settings.enabled:
        settings = settings.resolved(PRESET)
        x = run(x, FirstDelta(network, timesteps[0]), settings, parameterization="eps").x
        if settings.start == "tau":
            assert settings.tau is not None
            tau = settings.tau
    return x, ddim(network.eps, x, timesteps, tau, CFG)


def record(name: str, settings: Settings, toy: Toy, x: Tensor, prompt: Tensor, steps: int) -> dict[str, Any]:
    """One method's results over all images: means, and `copied` as a share."""
    network = make_network(toy, prompt)
    adjusted, result = generate(network, x, settings, steps)
    # Measured apart, so that looking is not counted as a cost of the method.
    delta = FirstDelta(make_network(toy, prompt), ddim_timesteps(steps)[0])
    similarity = correlation(result, toy.memorised[prompt])
    return {
        "method": name,
        "settings": settings.resolved(PRESET).of_method() if settings.enabled else {"enabled": False},
        "prompts": toy.prompts,
        "images": len(x) // toy.prompts,
        "similarity": _mean(similarity),
        "copied": _mean(similarity > COPIED),
        "alignment": _mean(correlation(result, toy.themes[prompt])),
        "rows": _mean(network.forward),
        "backward_rows": _mean(network.backward),
        "magnitude_before": _mean(magnitude(delta(x))),
        "magnitude_after": _mean(magnitude(delta(adjusted))),
    }


def compare(*, seed: int = 0, images: int = 8, steps: int = 50) -> list[dict[str, Any]]:
    """A record for each of `COMPARED`, with the same noises throughout.

    Keys of a record: `method`; `settings`, as the API takes them; `prompts`; `images`, of each prompt;
    `similarity`, correlation with the prompt's memorised picture; `copied`, the share of images with a
    similarity above `COPIED`; `alignment`, correlation with the prompt's theme (a picture of the prompt has about
    0.5, of another prompt 0); `rows` and `backward_rows`, network rows an image; `magnitude_before` and
    `magnitude_after`, ‖Δ(x_T, T)‖ and ‖Δ(x̃_T, T)‖ in ε. All but the first four are means over the images.
    """
    toy = make_toy()
    x = noises(toy, images, seed)
    prompt = torch.arange(toy.prompts).repeat_interleave(images)
    one = partial(record, toy=toy, x=x, prompt=prompt, steps=steps)
    return [one(name, settings) for name, settings in COMPARED.items()]


def _mean(values: Tensor) -> float:
    return float(values.double().mean())


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """The records as plain text, with what the columns mean."""
    first = records[0]
    return "\n".join(
        [
            STATEMENT,
            "",
            *aligned(records),
            "",
            f"{first['prompts']} memorised prompts, {first['images']} images each, the same noises for all methods.",
            f"copied: share of images whose similarity is above {COPIED:g}.",
            "similarity: correlation with the memorised picture; alignment: with the prompt's theme.",
            "rows, backward: network rows evaluated and differentiated, an image.",
        ]
    )
