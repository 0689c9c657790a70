"""Algorithm 1's step, repeated until ‖Δ‖ is below a target: per-sample mitigation without a backward pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lib_memnoise.core.delta import Delta, magnitude, per_image, select, working_precision
from lib_memnoise.core.progress import OnProgress, ignore_progress
from lib_memnoise.methods.descent import Descent, is_far, progress_of


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
    lengths, best = magnitude(x), x.clone()
    before = after = targets = x.new_zeros(0)
    taken, reached, hopeless = [0] * len(x), [False] * len(x), [False] * len(x)
    running, lowest = list(range(len(x))), []
    for step in range(max_steps + 1):
        prediction = select(delta, running)(x[running]).to(x.dtype)
        value = magnitude(prediction)
        if step == 0:
            before, after = value.clone(), value.clone()
            targets = target(value).to(x) if callable(target) else torch.full_like(value, target)
        better, aims = value <= after[running], targets[running]
        best[running] = torch.where(per_image(better), x[running], best[running])
        after[running] = torch.where(better, value, after[running])

        lowest.append(after.clone())
        far = torch.zeros_like(value)
        if patience is not None and patience <= step < max_steps:
            far = is_far(lowest[step - patience], after, targets, patience, max_steps - step)[running].to(value)
        is_below = (value < aims) | (value == 0)  # 0 cannot fall, and half of it is no target
        below, finite, is_hopeless, values, wanted = torch.stack(
            [is_below.to(value), torch.isfinite(value).to(value), far, value, aims]
        ).tolist()
        for k, i in enumerate(running):
            reached[i], hopeless[i] = bool(below[k]), bool(is_hopeless[k] and not below[k])
        going = [k for k in range(len(running)) if finite[k] and not below[k] and not is_hopeless[k]]
        on_progress(progress_of(step, max_steps, [(values[k], wanted[k]) for k in going]))
        if step == max_steps or not going:
            break

        running, prediction = [running[k] for k in going], prediction[going]
        length = per_image(magnitude(prediction))
        # δ̂(x_T) = ρ · ε̃(x_T, T, y) / ‖ε̃(x_T, T, y)‖₂
        probe = rho * prediction / torch.where(length == 0, torch.ones_like(length), length)
        # x̃_T = x_T − γ̃ (ε̃(x_T + δ̂(x_T), T, y) − ε̃(x_T, T, y))
        probed = select(delta, running)(x[running] + probe).to(x.dtype)
        moved = x[running] - gamma * (probed - prediction)
        if keep_length:
            moved = moved * per_image(lengths[running] / magnitude(moved))
        x[running] = moved
        for i in running:
            taken[i] += 1
    return Descent(list(best), torch.tensor(taken), before, after, torch.tensor(reached), torch.tensor(hopeless))
