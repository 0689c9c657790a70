"""Batch-wise mitigation: a few forward evaluations, then guidance off until τ (Algorithm 1, Eq. 10)."""

from __future__ import annotations

import torch
from torch import Tensor

from lib_memnoise.core.delta import Delta, magnitude, per_image, working_precision
from lib_memnoise.core.progress import OnProgress, Progress, ignore_progress
from lib_memnoise.methods.batch import BatchContext, Outcome
from lib_memnoise.settings import ResolvedSettings


def step(x: Tensor, prediction: Tensor, delta: Delta, *, gamma: float, rho: float) -> Tensor:
    """One adjustment of Algorithm 1, at one evaluation of Δ.

    Args:
        x: latents, `(B, C, H, W)`.
        prediction: ε̃(x, T, y), which is Δ(x, T), in the shape and dtype of x.
        delta, gamma, rho: as in `adjust`.
    """
    length = per_image(magnitude(prediction))
    # δ̂(x_T) = ρ · ε̃(x_T, T, y) / ‖ε̃(x_T, T, y)‖₂
    probe = rho * prediction / torch.where(length == 0, torch.ones_like(length), length)
    # x̃_T = x_T − γ̃ (ε̃(x_T + δ̂(x_T), T, y) − ε̃(x_T, T, y))
    return x - gamma * (delta(x + probe).to(x.dtype) - prediction)


@torch.no_grad()
def adjust(
    x: Tensor, delta: Delta, *, gamma: float, rho: float, steps: int, on_progress: OnProgress = ignore_progress
) -> Tensor:
    """Adjust initial latents along the sharpness of the conditional prediction (Algorithm 1, first loop).

    Args:
        x: initial latents x_T, `(B, C, H, W)`, unit variance.
        delta: `delta(x)` returns Δ(x, T) in the shape of x, in units of the network's native output (ε or v).
        gamma: adjustment strength γ̃ (Eq. 10), in units of x per unit of Δ.
        rho: sharpness parameter ρ: the length ‖δ̂‖₂ of the probe, in units of x.
        steps: number of adjustments M.
        on_progress: called after each adjustment.

    Returns:
        x̃_T in the shape of x, float32 (float64 if x is). x itself is not changed.

    Every image is adjusted on its own: δ̂ is normalised per sample. An image whose Δ is exactly zero has no
    direction to probe and is not changed. Cost: 2·M evaluations of Δ, which are 4·M network rows for each
    image, forward only; none where γ̃, ρ or M is zero, since then x̃_T = x_T.
    """
    x = working_precision(x)
    if gamma == 0 or rho == 0:
        return x
    for number in range(steps):
        x = step(x, delta(x).to(x.dtype), delta, gamma=gamma, rho=rho)
        on_progress(Progress(number + 1, steps, "adjustment", len(x)))
    return x


def mitigate(x: Tensor, delta: Delta, settings: ResolvedSettings, context: BatchContext) -> Outcome:
    """`adjust` with resolved settings; ρ is scaled to the size of the latent."""
    assert settings.gamma is not None and settings.rho is not None and settings.steps is not None
    factor = context.factor(x)
    return Outcome(
        adjust(
            x,
            delta,
            gamma=settings.gamma,
            rho=settings.rho * factor,
            steps=settings.steps,
            on_progress=context.on_progress,
        ),
        used={"gamma": settings.gamma, "rho": settings.rho * factor, "steps": settings.steps},
    )
