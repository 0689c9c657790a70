"""DDIM with guidance, on the timesteps that AUTOMATIC1111's WebUI takes.

Timesteps are those of the training schedule, 0…999. Latents are `(B, C, H, W)` with unit variance per element.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lib_memnoise.core.schedule import TRAINING_STEPS, alpha_bar

Predict = Callable[[Tensor, float], Tensor]
"""`predict(x, t)`: the prediction to follow at the latents x and timestep t, in the shape of x."""


def ddim_timesteps(steps: int) -> list[int]:
    """The WebUI's DDIM grid, descending: 981, 961, …, 21, 1 for 50 steps.

    The network is evaluated at all but the last, which is where the sampler stops: 49 times for 50 steps. Where
    `steps` does not divide 1000 the grid is a few steps longer, as it is there.
    """
    if not 2 <= steps <= TRAINING_STEPS:
        raise ValueError(f"DDIM takes from 2 to {TRAINING_STEPS} steps, not {steps}")
    grid = range(0, TRAINING_STEPS, TRAINING_STEPS // steps)
    return [min(t + 1, TRAINING_STEPS - 1) for t in reversed(grid)]


def clean_and_eps(x: Tensor, output: Tensor, t: int, parameterization: str) -> tuple[Tensor, Tensor]:
    """The clean latents and the noise that the network's output at x_t stands for."""
    a, b = alpha_bar(t) ** 0.5, (1 - alpha_bar(t)) ** 0.5
    if parameterization == "v":
        return a * x - b * output, a * output + b * x
    return (x - b * output) / a, output


@torch.no_grad()
def follow(predict: Predict, x: Tensor, timesteps: Sequence[int], parameterization: str = "eps") -> Tensor:
    """Deterministic DDIM (η = 0) from the initial latents x at `timesteps[0]` (descending) to the last timestep."""
    for t, following in itertools.pairwise(timesteps):
        clean, eps = clean_and_eps(x, predict(x, t), t, parameterization)
        a = alpha_bar(following)
        x = a**0.5 * clean + (1 - a) ** 0.5 * eps
    return x
