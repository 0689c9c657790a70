"""Stable Diffusion's noise schedule, in timesteps of its training, 0…999."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

TRAINING_STEPS = 1000


def alphas_cumprod() -> Tensor:
    """ᾱ_t of SD's schedule ("scaled linear" betas), `(1000,)` in float64."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, TRAINING_STEPS) ** 2
    return torch.from_numpy(np.cumprod(1.0 - betas))


ALPHAS_CUMPROD = alphas_cumprod()
_ALPHA_BARS = ALPHAS_CUMPROD.tolist()


def alpha_bar(t: int) -> float:
    """ᾱ_t: the share of the clean picture's variance in x_t."""
    return float(_ALPHA_BARS[t])
