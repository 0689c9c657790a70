"""Noise selection: of several noises from an image's seed, the one with the smallest ‖Δ‖.

No noise is changed, so the one chosen has the usual length of noise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lib_memnoise.core.delta import Delta, magnitude, per_image, working_precision
from lib_memnoise.core.progress import Progress
from lib_memnoise.methods.batch import BatchContext, Outcome
from lib_memnoise.settings import ResolvedSettings


@torch.no_grad()
def adjust(x: Tensor, delta: Delta, context: BatchContext, *, candidates: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Choose among the noise as drawn and `candidates − 1` others from each image's seed.

    Args:
        x: initial latents x_T, `(B, C, H, W)`, unit variance.
        delta: `delta(x)` returns Δ(x, T) in the shape of x.
        candidates: how many noises there are to choose from.

    Returns:
        The latents, ‖Δ‖ of the noise as drawn, ‖Δ‖ of the chosen noise, and the number of the chosen noise (0: the
        noise as drawn). All but the latents are `(B,)`.

    Cost: two network rows for each image and candidate, forward only.
    """
    x = working_precision(x)
    best, before = x.clone(), magnitude(delta(x).to(x.dtype))
    least, chosen = before.clone(), torch.zeros(len(x), dtype=torch.long, device=x.device)
    for k in range(1, candidates):
        other = torch.stack([context.noise(x, image, k) for image in range(len(x))])
        value = magnitude(delta(other).to(x.dtype))
        better = value < least
        best, least = torch.where(per_image(better), other, best), torch.where(better, value, least)
        chosen = torch.where(better, k, chosen)
        context.on_progress(Progress(k + 1, candidates, "noise", len(x)))
    return best, before, least, chosen


def mitigate(x: Tensor, delta: Delta, settings: ResolvedSettings, context: BatchContext) -> Outcome:
    best, before, after, chosen = adjust(x, delta, context, candidates=settings.candidates)
    notes = {image: [f"noise {k} of {settings.candidates} was chosen"] for image, k in enumerate(chosen.tolist()) if k}
    return Outcome(best, before=before, after=after, used={"candidates": settings.candidates}, notes=notes)
