"""Noise schedules for the k-diffusion samplers; each a function to sigmas ending in 0."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from modules import _kdiffusion, shared

_kdiffusion.install()
import k_diffusion.sampling  # noqa: E402


def to_d(x: torch.Tensor, sigma: torch.Tensor, denoised: torch.Tensor) -> torch.Tensor:
    return (x - denoised) / sigma


k_diffusion.sampling.to_d = to_d


@dataclasses.dataclass
class Scheduler:
    name: str
    label: str
    function: Callable | None
    default_rho: float = -1
    need_inner_model: bool = False
    aliases: list[str] | None = None


def _with_zero(sigmas: Any, device: Any) -> torch.Tensor:
    return torch.tensor([*(float(sigma) for sigma in sigmas), 0.0], device=device)


def _timesteps(inner_model: Any, sigma_max: float, sigma_min: float, n: int) -> torch.Tensor:
    first, last = (inner_model.sigma_to_t(torch.tensor(sigma)) for sigma in (sigma_max, sigma_min))
    return torch.linspace(float(first), float(last), n)


def uniform(n: int, sigma_min: float, sigma_max: float, inner_model: Any, device: Any) -> torch.Tensor:
    return inner_model.get_sigmas(n).to(device)


def sgm_uniform(n: int, sigma_min: float, sigma_max: float, inner_model: Any, device: Any) -> torch.Tensor:
    ts = _timesteps(inner_model, sigma_max, sigma_min, n + 1)[:-1]
    return _with_zero((inner_model.t_to_sigma(t) for t in ts), device)


def normal_scheduler(n: int, sigma_min: float, sigma_max: float, inner_model: Any, device: Any) -> torch.Tensor:
    ts = _timesteps(inner_model, sigma_max, sigma_min, n)
    return _with_zero((inner_model.t_to_sigma(t) for t in ts), device)


# Published tables of "Align Your Steps".
_AYS = {
    False: [14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029],
    True: [14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029],
}


def get_align_your_steps_sigmas(n: int, sigma_min: float, sigma_max: float, device: Any) -> torch.Tensor:
    table = np.log(_AYS[bool(shared.sd_model.is_sdxl)])
    at = np.linspace(0, len(table) - 1, n)
    return _with_zero(np.exp(np.interp(at, np.arange(len(table)), table)), device)


def kl_optimal(n: int, sigma_min: float, sigma_max: float, device: Any) -> torch.Tensor:
    low, high = torch.tensor([sigma_min, sigma_max], device=device).arctan()
    part = torch.arange(n + 1, device=device) / n
    return torch.tan(part * low + (1 - part) * high)


def simple_scheduler(n: int, sigma_min: float, sigma_max: float, inner_model: Any, device: Any) -> torch.Tensor:
    stride = len(inner_model.sigmas) / n
    return _with_zero((inner_model.sigmas[-1 - int(i * stride)] for i in range(n)), device)


def ddim_scheduler(n: int, sigma_min: float, sigma_max: float, inner_model: Any, device: Any) -> torch.Tensor:
    stride = max(len(inner_model.sigmas) // n, 1)
    return _with_zero(inner_model.sigmas[1::stride].flip(0), device)


def beta_scheduler(n: int, sigma_min: float, sigma_max: float, inner_model: Any, device: Any) -> torch.Tensor:
    from scipy import stats

    quantiles = stats.beta.ppf(1 - np.linspace(0, 1, n), shared.opts.beta_dist_alpha, shared.opts.beta_dist_beta)
    return _with_zero(sigma_min + quantiles * (sigma_max - sigma_min), device)


_k = k_diffusion.sampling
schedulers = [
    Scheduler("automatic", "Automatic", None),
    Scheduler("uniform", "Uniform", uniform, need_inner_model=True),
    Scheduler("karras", "Karras", _k.get_sigmas_karras, default_rho=7.0),
    Scheduler("exponential", "Exponential", _k.get_sigmas_exponential),
    Scheduler("polyexponential", "Polyexponential", _k.get_sigmas_polyexponential, default_rho=1.0),
    Scheduler("sgm_uniform", "SGM Uniform", sgm_uniform, need_inner_model=True, aliases=["SGMUniform"]),
    Scheduler("kl_optimal", "KL Optimal", kl_optimal),
    Scheduler("align_your_steps", "Align Your Steps", get_align_your_steps_sigmas),
    Scheduler("simple", "Simple", simple_scheduler, need_inner_model=True),
    Scheduler("normal", "Normal", normal_scheduler, need_inner_model=True),
    Scheduler("ddim", "DDIM", ddim_scheduler, need_inner_model=True),
    Scheduler("beta", "Beta", beta_scheduler, need_inner_model=True),
]
schedulers_map = {key: x for x in schedulers for key in (x.name, x.label)}
