"""The conditional prediction Δ, and its measurements.

Shapes: a latent `x` is `(B, C, H, W)` with unit variance per element, whatever scale a sampler works in.
Units: Δ is a difference of the network's *native* outputs (ε or v), never of denoised images.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

Delta = Callable[[Tensor], Tensor]
"""`delta(x)` returns Δ(x, T) = out(x, T, y) − out(x, T, y_null), the paper's ε̃, in the shape of the latents x."""


@runtime_checkable
class SelectableDelta(Protocol):
    """A Δ whose prompts differ between the images of the batch.

    Methods select the images that are still running, so that finished ones are not evaluated again.
    """

    def __call__(self, x: Tensor) -> Tensor: ...

    def select(self, images: list[int]) -> Delta:
        """The Δ of these images only; they are indices into the batch that it was made for."""


@runtime_checkable
class PromptedDelta(Protocol):
    """A Δ whose prompts' vectors can be replaced."""

    @property
    def vectors(self) -> list[Tensor]:
        """For each image, the vectors of its prompt, `(parts, tokens, width)`."""

    @property
    def fixed(self) -> list[int]:
        """The places whose vectors are not learnt, such as start tokens."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def conditioned(self, x: Tensor) -> Callable[[list[Tensor], list[int]], Tensor]:
        """Δ(x, T) as a function of the prompts' vectors.

        The function `delta(vectors, images)` takes an image's vectors for each of `images`, which are indices into the
        latents x, and returns their Δ, `(n, C, H, W)`. The unconditional output does not depend on the vectors and is
        evaluated once.
        """


def select(delta: Delta, images: list[int]) -> Delta:
    """The Δ of some images of the batch. A plain function is assumed to treat all images alike."""
    return delta.select(images) if isinstance(delta, SelectableDelta) else delta


def per_image(values: Tensor) -> Tensor:
    """Reshape `(B,)` so that it broadcasts over `(B, C, H, W)`."""
    return values.reshape(-1, 1, 1, 1)


def magnitude(delta: Tensor) -> Tensor:
    """‖Δ‖₂ of each image, `(B,)`: the norm over all elements of one sample, never over the batch."""
    return torch.linalg.vector_norm(delta.flatten(1), dim=1)


def norm_ratio(x: Tensor) -> Tensor:
    """‖x‖₂/√d of each image, `(B,)`, where d = C·H·W.

    ‖x_T‖ follows a chi distribution with mean ≈ √d and standard deviation ≈ 1/√2 (Eq. 11), so fresh noise
    has a ratio of 1 ± 1/√(2d).
    """
    return torch.linalg.vector_norm(x.flatten(1).float(), dim=1) / x[0].numel() ** 0.5


NORM_BOUND = 0.10
"""The distance of ‖x̃_T‖/√d from 1 beyond which it is reported. Fresh noise at 512 px stays within 0.02 (5 σ);
pictures of a small test model broke beyond a ratio of about 1.15."""


def working_precision(x: Tensor) -> Tensor:
    """A detached copy of the latent in float32, or in float64 if it is float64: never in half precision.

    AdamW's weight decay (1e-4 of a value a step) vanishes in bfloat16, and its eps underflows in float16.
    """
    return x.detach().to(torch.float64 if x.dtype == torch.float64 else torch.float32, copy=True)
