"""Algorithm 1's step, repeated until ‖Δ‖ is below a target: per-sample mitigation without a backward pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lib_memnoise.core.delta import Delta, magnitude, per_image, select, working_precision
from lib_memnoise.core.progress import OnProgress, ignore_progress
from lib_memnoise.methods.batch_wise import step
from lib_memnoise.methods.descent import Descent, Judge


@torch.no_grad()
def descend_forward(
    x: Tensor,
    delta: Delta,
    *,
    gamma: float,
    rho: float,
    target: float | Callable[[Tensor], Tensor],
    max_steps: int,
    keep_length: bool = False,
    on_progress: OnProgress = ignore_progress,
    patience: int | None = None,
) -> Descent:
    """Lower ‖Δ(x, T)‖₂ of every image over its initial latent until it is below the target.

    Args:
        x: initial latents x_T, `(B, C, H, W)`, unit variance.
        delta: Δ(x, T), given only the images that are still running (`lib_memnoise.core.delta.SelectableDelta`).
        gamma, rho: γ̃ and ρ, as in `batch_wise.adjust`.
        target: in the units of Δ. A function is given the first magnitudes `(B,)` and returns a target for each image.
        max_steps: the most steps an image takes.
        keep_length: puts each image's ‖x_T‖ back after every step.
        on_progress, patience: see `descent.descend`.

    Returns:
        `Descent`: where the target was not reached, the latent is the best one seen. A ‖Δ‖ that is not finite ends its
        image.

    Cost an image: 4 network rows a step and 2 at its end, forward only.
    """
    x = working_precision(x)
    lengths, best, running = magnitude(x), x.clone(), list(range(len(x)))
    judge = Judge(target, max_steps, patience)
    for number in range(max_steps + 1):
        prediction = select(delta, running)(x[running]).to(x.dtype)
        value = magnitude(prediction)
        better = judge.improved(running, value)
        best[running] = torch.where(per_image(better), x[running], best[running])
        going = judge.going(number, running, value, on_progress)
        if not going:
            break
        running = [running[k] for k in going]
        moved = step(x[running], prediction[going], select(delta, running), gamma=gamma, rho=rho)
        if keep_length:
            moved = moved * per_image(lengths[running] / magnitude(moved))
        x[running] = moved
        for i in running:
            judge.taken[i] += 1
    return judge.result(list(best))
