"""Repulsion: noise moved away from the memory along Δ, at one evaluation. The project's own; nothing is published.

Guidance adds w·Δ to every prediction, and so moves the latent against Δ's direction. Noise that begins farther along Δ
leaves the basin sooner. Its length is put back: what counts is where it points.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lib_memnoise.core.delta import Delta, magnitude, per_image, working_precision
from lib_memnoise.methods.batch import BatchContext, Outcome
from lib_memnoise.settings import ResolvedSettings


@torch.no_grad()
def adjust(x: Tensor, delta: Delta, *, beta: float) -> tuple[Tensor, Tensor]:
    """x̃_T = ‖x_T‖ · y / ‖y‖ with y = x_T + β√d · Δ(x_T, T) / ‖Δ(x_T, T)‖.

    Args:
        x: initial latents x_T, `(B, C, H, W)`, unit variance.
        delta: `delta(x)` returns Δ(x, T) in the shape of x, in the network's native output (ε or v).
        beta: β, the displacement in units of √d, the usual length of noise of d elements.

    Returns:
        x̃_T in the shape of x, float32 (float64 if x is), and ‖Δ(x_T, T)‖, `(B,)`. An image whose Δ is zero stays as
        it is, as do all with β = 0, to the bit.

    Cost: one evaluation of Δ, that is two network rows an image, forward only.
    """
    x = working_precision(x)
    prediction = delta(x).to(x.dtype)
    before = magnitude(prediction)
    if beta == 0:
        return x, before
    length = per_image(torch.where(before == 0, torch.ones_like(before), before))
    moved = x + beta * x[0].numel() ** 0.5 * prediction / length
    back = per_image(magnitude(x) / magnitude(moved))
    return torch.where(per_image(before) == 0, x, moved * back), before


def mitigate(x: Tensor, delta: Delta, settings: ResolvedSettings, context: BatchContext) -> Outcome:
    """`adjust` with resolved settings."""
    adjusted, before = adjust(x, delta, beta=settings.beta)
    return Outcome(adjusted, before=before, used={"beta": settings.beta})
