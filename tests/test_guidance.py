from __future__ import annotations

import numpy as np
import pytest
import torch

from lib_memnoise.guidance import guidance_off


def euler_timesteps(steps: int = 50) -> torch.Tensor:
    """The timesteps that Euler's default schedule recovers from its float32 sigmas."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas = (1 - betas).cumprod(0)
    log_sigmas = (((1 - alphas) / alphas) ** 0.5).log().float()
    grid = torch.linspace(999, 0, steps)
    low = grid.floor().long().clamp(max=998)
    sigmas = (log_sigmas[low] * (1 - (grid - low)) + log_sigmas[low + 1] * (grid - low)).exp()
    return torch.from_numpy(np.interp(sigmas.log().numpy(), log_sigmas.numpy(), np.arange(1000.0)))


@pytest.mark.parametrize(("tau", "off"), [(917.4490, 4), (917.449, 4), (999, 0), (999.0, 0), (937.8367, 3), (0, 49)])
def test_a_step_at_tau_has_guidance(tau: float, off: int) -> None:
    assert sum(guidance_off(float(t), tau) for t in euler_timesteps()) == off


def test_ddim_at_900() -> None:
    assert [t for t in range(981, 0, -20) if guidance_off(t, 900)] == [981, 961, 941, 921, 901]
