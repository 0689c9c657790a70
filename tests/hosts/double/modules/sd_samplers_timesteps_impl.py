"""Samplers on timesteps: DDIM (Song 2020), CFG++ (Chung 2024), PLMS (Liu 2022), UniPC (Zhao 2023)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from modules import _kdiffusion, shared

_kdiffusion.install()
import k_diffusion.sampling  # noqa: E402


class _Grid:
    """Coefficients of the deterministic and the noisy step from one timestep to the one before it."""

    def __init__(self, model: Any, timesteps: torch.Tensor, eta: float = 0.0) -> None:
        table = model.inner_model.inner_model.alphas_cumprod.double()
        self.timesteps = [int(t) for t in timesteps]
        self.bar = [float(table[t]) for t in self.timesteps]
        self.bar_prev = [float(table[0]), *self.bar[:-1]]
        self.eta = eta

    def __iter__(self) -> Any:
        """Indices from the noisiest timestep down to the second."""
        return iter(range(len(self.timesteps) - 1, 0, -1))

    def step(
        self, x: torch.Tensor, index: int, eps: torch.Tensor, direction: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The next latent and the predicted x0; `direction` may differ from the ε that predicts x0."""
        a, prev = self.bar[index], self.bar_prev[index]
        sigma = self.eta * math.sqrt((1 - prev) / (1 - a) * (1 - a / prev)) if self.eta else 0.0
        x0 = (x - math.sqrt(1 - a) * eps) / math.sqrt(a)
        out = math.sqrt(prev) * x0 + math.sqrt(1 - prev - sigma**2) * (eps if direction is None else direction)
        return out, x0, sigma  # type: ignore[return-value]


def _report(callback: Callable | None, i: int, x: torch.Tensor, x0: torch.Tensor) -> None:
    if callback is not None:
        callback({"x": x, "i": i, "sigma": 0, "sigma_hat": 0, "denoised": x0})


def _ddim(
    model: Any,
    x: torch.Tensor,
    timesteps: torch.Tensor,
    extra_args: dict | None,
    callback: Callable | None,
    eta: float,
    along_uncond: bool,
) -> torch.Tensor:
    grid = _Grid(model, timesteps, eta)
    ones = x.new_ones(x.shape[0])
    for i, index in enumerate(grid):
        eps = model(x, grid.timesteps[index] * ones, **(extra_args or {}))
        x, x0, sigma = grid.step(x, index, eps, model.last_noise_uncond if along_uncond else None)  # type: ignore[misc]
        x = x + sigma * k_diffusion.sampling.torch.randn_like(x)
        _report(callback, i, x, x0)
    return x


@torch.no_grad()
def ddim(
    model: Any,
    x: torch.Tensor,
    timesteps: torch.Tensor,
    extra_args: dict | None = None,
    callback: Callable | None = None,
    disable: bool | None = None,
    eta: float = 0.0,
) -> torch.Tensor:
    return _ddim(model, x, timesteps, extra_args, callback, eta, False)


@torch.no_grad()
def ddim_cfgpp(
    model: Any,
    x: torch.Tensor,
    timesteps: torch.Tensor,
    extra_args: dict | None = None,
    callback: Callable | None = None,
    disable: bool | None = None,
    eta: float = 0.0,
) -> torch.Tensor:
    """The guided prediction gives x0, the unconditional one the direction; scale 12.5 is CFG++'s 1."""
    model.cond_scale_miltiplier = 1 / 12.5
    model.need_last_noise_uncond = True
    return _ddim(model, x, timesteps, extra_args, callback, eta, True)


_ADAMS_BASHFORTH = {2: (1.5, -0.5), 3: (23 / 12, -16 / 12, 5 / 12), 4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}


@torch.no_grad()
def plms(
    model: Any,
    x: torch.Tensor,
    timesteps: torch.Tensor,
    extra_args: dict | None = None,
    callback: Callable | None = None,
    disable: bool | None = None,
) -> torch.Tensor:
    grid = _Grid(model, timesteps)
    ones = x.new_ones(x.shape[0])
    history: list[torch.Tensor] = []  # newest first
    for i, index in enumerate(grid):
        eps = model(x, grid.timesteps[index] * ones, **(extra_args or {}))
        history = [eps, *history[:3]]
        if len(history) == 1:
            probe = grid.step(x, index, eps)[0]
            mean = (eps + model(probe, grid.timesteps[index - 1] * ones, **(extra_args or {}))) / 2
        else:
            mean = sum(c * e for c, e in zip(_ADAMS_BASHFORTH[len(history)], history))  # type: ignore[assignment]
        x, x0 = grid.step(x, index, mean)[:2]
        _report(callback, i, x, x0)
    return x


class _Schedule:
    """Continuous time from 1/1000 (least noise) to 1: α, σ, and λ = log(α/σ), with log α linear between timesteps."""

    def __init__(self, alphas_cumprod: torch.Tensor) -> None:
        self.log_alphas = 0.5 * alphas_cumprod.double().log()
        self.count = len(alphas_cumprod)

    def at(self, t: float) -> tuple[float, float, float]:
        position = min(max(t * self.count - 1, 0.0), self.count - 1.0)
        low = min(int(position), self.count - 2)
        log_alpha = float(torch.lerp(self.log_alphas[low], self.log_alphas[low + 1], position - low))
        log_sigma = 0.5 * math.log(-math.expm1(2 * log_alpha))
        return math.exp(log_alpha), math.exp(log_sigma), log_alpha - log_sigma

    def time_of(self, half_log_snr: float) -> float:
        low, high = 1.0 / self.count, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if self.at(middle)[2] > half_log_snr else (low, middle)
        return (low + high) / 2

    def grid(self, kind: str, start: float, steps: int) -> list[float]:
        end = 1.0 / self.count
        if kind == "logSNR":
            ends = torch.tensor([self.at(start)[2], self.at(end)[2]])
            return [self.time_of(float(x)) for x in torch.linspace(float(ends[0]), float(ends[1]), steps + 1)]
        power = 2 if kind == "time_quadratic" else 1
        line = torch.linspace(start ** (1 / power), end ** (1 / power), steps + 1, dtype=torch.float64)
        return [float(x) for x in line**power]


def _unipc_coefficients(ratios: list[float], hh: float, b_h: float, size: int) -> torch.Tensor:
    """Solve the order conditions of UniP (without r = 1) or UniC (with it)."""
    phi = math.expm1(hh) / hh - 1
    right, factorial = [], 1
    for i in range(1, size + 1):
        right.append(phi * factorial / b_h)
        factorial *= i + 1
        phi = phi / hh - 1 / factorial
    r = torch.tensor(ratios, dtype=torch.float64)
    matrix = torch.stack([r**i for i in range(size)])
    return torch.linalg.solve(matrix, torch.tensor(right, dtype=torch.float64))


@torch.no_grad()
def unipc(
    model: Any,
    x: torch.Tensor,
    timesteps: torch.Tensor,
    extra_args: dict | None = None,
    callback: Callable | None = None,
    disable: bool | None = None,
    is_img2img: bool = False,
) -> torch.Tensor:
    """Multistep predictor-corrector on predictions of x0; the first timestep is 999 and others are no integers."""
    opts = shared.opts
    steps, order = len(timesteps), int(opts.uni_pc_order)
    assert steps >= order, "UniPC needs at least as many steps as its order"
    schedule = _Schedule(model.inner_model.inner_model.alphas_cumprod)
    start = (float(timesteps[-1]) + 1) / 1000 if is_img2img else 1.0
    times = schedule.grid(opts.uni_pc_skip_type, start, steps)

    def predict(x: torch.Tensor, t: float) -> torch.Tensor:
        alpha, sigma, _ = schedule.at(t)
        timestep = x.new_full((x.shape[0],), (t - 1 / schedule.count) * 1000)
        return (x - sigma * model(x, timestep, **(extra_args or {}))) / alpha

    past = [(schedule.at(times[0])[2], predict(x, times[0]))]  # newest last
    for i in range(1, steps + 1):
        p = i if i < order else min(order, steps + 1 - i) if opts.uni_pc_lower_order_final else order
        alpha, sigma, lam = schedule.at(times[i])
        lam0, m0 = past[-1]
        hh = lam0 - lam
        b_h = math.expm1(hh) if opts.uni_pc_variant == "bh2" else hh
        ratios = [(lam_k - lam0) / -hh for lam_k, _ in past[-2 : -p - 1 : -1]]
        slopes = [(m_k - m0) / r for (_, m_k), r in zip(past[-2 : -p - 1 : -1], ratios)]
        base = sigma / schedule.at(times[i - 1])[1] * x - alpha * math.expm1(hh) * m0

        rho = [0.5] if p == 2 else _unipc_coefficients(ratios, hh, b_h, p - 1) if p > 2 else []
        x = base - alpha * b_h * sum(float(c) * d for c, d in zip(rho, slopes))
        if i == steps:
            _report(callback, i - 1, x, m0)
            break
        m = predict(x, times[i])
        rho = [0.5] if p == 1 else _unipc_coefficients([*ratios, 1.0], hh, b_h, p)
        x = base - alpha * b_h * sum(float(c) * d for c, d in zip(rho, [*slopes, m - m0]))
        _report(callback, i - 1, x, m)
        past = [*past, (lam, m)][-order:]
    return x
