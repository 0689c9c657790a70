"""Stable Diffusion's noise schedule, and DDIM with guidance as AUTOMATIC1111's WebUI walks it.

Timesteps are those of the training schedule, 0…999. Latents are `(B, C, H, W)` with unit variance per element.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from lib_memnoise.guidance import guidance_off

TRAINING_STEPS = 1000

Eps = Callable[[Tensor, int, bool], Tensor]
"""`eps(x, t, conditional)`: ε_θ(x, t, y) if conditional, else ε_θ(x, t, y_null), in the shape of x."""


def alphas_cumprod() -> Tensor:
    """ᾱ_t of SD's schedule ("scaled linear" betas), `(1000,)` in float64."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, TRAINING_STEPS) ** 2
    return torch.from_numpy(np.cumprod(1.0 - betas))


ALPHAS_CUMPROD = alphas_cumprod()


def alpha_bar(t: int) -> float:
    """ᾱ_t: the share of the clean picture's variance in x_t."""
    return float(ALPHAS_CUMPROD[t])


def ddim_timesteps(steps: int) -> list[int]:
    """The WebUI's DDIM grid, descending: 981, 961, …, 21, 1 for 50 steps.

    The network is evaluated at all but the last, which is where the sampler stops: 49 times for 50 steps. Where
    `steps` does not divide 1000 the grid is a few steps longer, as it is there.
    """
    if not 2 <= steps <= TRAINING_STEPS:
        raise ValueError(f"DDIM takes from 2 to {TRAINING_STEPS} steps, not {steps}")
    grid = range(0, TRAINING_STEPS, TRAINING_STEPS // steps)
    return [min(t + 1, TRAINING_STEPS - 1) for t in reversed(grid)]


@torch.no_grad()
def ddim(eps: Eps, x: Tensor, timesteps: Sequence[int], tau: float, cfg: float) -> Tensor:
    """Deterministic DDIM (η = 0) with classifier-free guidance held back until τ (Algorithm 1, second loop).

    Args:
        eps: the network; in steps where guidance is off only its unconditional row is evaluated.
        x: initial latents at `timesteps[0]`, `(B, C, H, W)`.
        timesteps: descending; see `ddim_timesteps`.
        tau: guidance is off at t > τ.
        cfg: guidance scale w.

    Returns:
        The latents at the last timestep, in the shape and dtype of x.
    """
    for t, following in itertools.pairwise(timesteps):
        guided = unconditional = eps(x, t, False)
        if not guidance_off(t, tau):
            guided = unconditional + cfg * (eps(x, t, True) - unconditional)
        a, a_next = alpha_bar(t), alpha_bar(following)
        clean = (x - (1 - a) ** 0.5 * guided) / a**0.5
        x = a_next**0.5 * clean + (1 - a_next) ** 0.5 * guided
    return x
