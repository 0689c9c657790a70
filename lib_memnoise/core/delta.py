"""The conditional prediction Δ and what is measured of it.

Shapes: a latent `x` is `(B, C, H, W)` with unit variance per element, whatever scale a sampler works in.
Units: Δ is the difference of the network's *native* outputs (ε or v), never of denoised images.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

Delta = Callable[[Tensor], Tensor]
"""`delta(x)`: Δ(x, T) = out(x, T, y) − out(x, T, y_null) of the latents x, in the shape of x (the paper's ε̃)."""


@runtime_checkable
class SelectableDelta(Protocol):
    """A Δ whose prompts differ between the images of the batch.

    `select(images)` gives the Δ of those images only (indices into the batch it was made for), so that
    images that are finished need not be evaluated again.
    """

    def __call__(self, x: Tensor) -> Tensor: ...

    def select(self, images: list[int]) -> Delta: ...


@runtime_checkable
class PromptedDelta(Protocol):
    """A Δ whose prompts' vectors can be replaced."""

    @property
    def vectors(self) -> list[Tensor]:
        """Of each image: those of its prompt, `(parts, tokens, width)`."""

    @property
    def fixed(self) -> list[int]:
        """The places whose vectors are not to be learnt: start tokens."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def conditioned(self, x: Tensor) -> Callable[[list[Tensor], list[int]], Tensor]:
        """`attended(vectors, images)`: Δ(x, T) of those images of the latents x, each with other vectors.

        What does not depend on the vectors, the unconditional output, is evaluated once.
        """


def select(delta: Delta, images: list[int]) -> Delta:
    """The Δ of some images of the batch; a plain function is taken to treat every row alike."""
    return delta.select(images) if isinstance(delta, SelectableDelta) else delta


def per_image(values: Tensor) -> Tensor:
    """Reshape `(B,)` so that it broadcasts over `(B, C, H, W)`."""
    return values.reshape(-1, 1, 1, 1)


def magnitude(delta: Tensor) -> Tensor:
    """‖Δ‖₂ of each image, `(B,)`: the norm over all elements of ONE sample, never over the batch."""
    return torch.linalg.vector_norm(delta.flatten(1), dim=1)


def norm_ratio(x: Tensor) -> Tensor:
    """‖x‖₂/√d of each image, `(B,)`, where d = C·H·W.

    ‖x_T‖ follows a chi distribution with mean ≈ √d and standard deviation ≈ 1/√2 (Eq. 11), so fresh noise
    has a ratio of 1 ± 1/√(2d).
    """
    return torch.linalg.vector_norm(x.flatten(1).float(), dim=1) / x[0].numel() ** 0.5


NORM_BOUND = 0.10
"""How far ‖x̃_T‖/√d may leave 1 before it is reported. Fresh noise at 512 px stays within 0.02 (5 σ); pictures
of a small test model broke beyond about 1.15."""


def working_precision(x: Tensor) -> Tensor:
    """A detached copy of the latent in float32, or in float64 if it came so: never in half precision.

    AdamW's weight decay (1e-4 of a value a step) vanishes in bfloat16, and its eps underflows in float16.
    """
    return x.detach().to(torch.float64 if x.dtype == torch.float64 else torch.float32, copy=True)
