"""Restart sampling (Xu et al. 2023): Heun's method that repeatedly goes back up in noise and down again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from modules import _kdiffusion

_kdiffusion.install()
import k_diffusion.sampling  # noqa: E402


def _plan(sigmas: torch.Tensor, restart_list: dict | None) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Pairs (from sigma, to sigma), restarts included."""
    karras = k_diffusion.sampling.get_sigmas_karras
    steps = len(sigmas) - 1
    if restart_list is None:
        restart_list = {}
        if steps >= 20:
            length, times = (steps // 4, 2) if steps >= 36 else (9, 1)
            sigmas = karras(steps - length * times, sigmas[-2].item(), sigmas[0].item(), device=sigmas.device)
            restart_list = {0.1: [length + 1, times, 2]}

    def nearest(sigma: float) -> int:
        return int((sigmas - sigma).abs().argmin())

    restarts = {nearest(sigma): value for sigma, value in restart_list.items()}
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
    for i in range(1, len(sigmas)):
        pairs.append((sigmas[i - 1], sigmas[i]))
        if i in restarts:
            length, times, top = restarts[i]
            if nearest(top) < i:
                again = karras(length, sigmas[i].item(), sigmas[nearest(top)].item(), device=sigmas.device)[:-1]
                pairs += times * list(zip(again[:-1], again[1:]))
    return pairs


@torch.no_grad()
def restart_sampler(
    model: Any,
    x: torch.Tensor,
    sigmas: torch.Tensor,
    extra_args: dict | None = None,
    callback: Callable | None = None,
    disable: bool | None = None,
    s_noise: float = 1.0,
    restart_list: dict | None = None,
) -> torch.Tensor:
    extra_args = extra_args or {}
    ones = x.new_ones([x.shape[0]])
    reached: Any = None
    for i, (sigma, target) in enumerate(_plan(sigmas, restart_list)):
        if reached is not None and reached < sigma:
            noise = k_diffusion.sampling.torch.randn_like(x)
            x = x + noise * s_noise * (sigma**2 - reached**2) ** 0.5
        denoised = model(x, sigma * ones, **extra_args)
        if callback is not None:
            callback({"x": x, "i": i, "sigma": target, "sigma_hat": sigma, "denoised": denoised})
        slope = (x - denoised) / sigma
        if target > 0:
            probe = x + slope * (target - sigma)
            slope = (slope + (probe - model(probe, target * ones, **extra_args)) / target) / 2
        x = x + slope * (target - sigma)
        reached = target
    return x
