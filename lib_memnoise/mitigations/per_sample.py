"""Per-sample mitigation: descend on ‖Δ‖ until it is below a target, guidance on from the start (Figure 7)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lib_memnoise.mitigations.outcome import Outcome
from lib_memnoise.prediction import Delta, magnitude, select, working_precision
from lib_memnoise.settings import Settings

LOSS_SCALE = 1024.0
"""Keeps gradients inside a half-precision network above its smallest numbers. A power of two: dividing it out
again is exact, so in float32 it changes nothing."""


class Adjusted(NamedTuple):
    """What per-sample adjustment did. All but `x` are `(B,)`, one entry an image.

    `before` is NaN where the network's first answer was not finite; `after` belongs to the latent in `x`.
    """

    x: Tensor
    steps: Tensor
    before: Tensor
    after: Tensor
    reached: Tensor


def adjust(
    x: Tensor,
    delta: Delta,
    *,
    lr: float,
    target: float | Callable[[Tensor], Tensor],
    max_steps: int,
    weight_decay: float = 0.01,
) -> Adjusted:
    """Minimise ‖Δ(x, T)‖₂ of every image over its initial latent, with AdamW (Figure 7).

    Args:
        x: initial latents x_T, `(B, C, H, W)`, unit variance.
        delta: `delta(x)` returns Δ(x, T) in the shape of x, differentiable in x. It is given only the images
            that are still running; one that must know which these are has a method `select(images)`
            (`lib_memnoise.prediction.SelectableDelta`).
        lr: AdamW's learning rate, in units of x.
        target: l_target, in the units of Δ: an image stops as soon as ‖Δ‖ < target. A function is given the
            first magnitudes `(B,)` and returns a target for each image.
        max_steps: the most optimiser steps an image takes.
        weight_decay: AdamW's, 0.01 as in the paper; it keeps ‖x̃_T‖ near √d (Appendix C).

    Returns:
        `Adjusted`: the latents (float32, float64 if x is) and, per image, steps taken, magnitude before and
        after, and whether the target was reached. Where it was not, the latent is the best one seen.

    Raises:
        RuntimeError: Δ carries no gradient (for instance an inference-only network).

    Every image has its own optimiser state and its own stop, so its result does not depend on the batch it is
    in; those still running are evaluated together. Cost an image: (steps + 1) evaluations of Δ forward, that is
    two network rows each, and `steps` backward, with respect to x alone.
    """
    start = working_precision(x)
    batch = start.shape[0]
    latents = [image.clone().requires_grad_() for image in start]
    optim = torch.optim.AdamW(latents, lr=lr, weight_decay=weight_decay)

    best = start.clone()
    before = start.new_full((batch,), float("nan"))
    after = before.clone()
    taken = torch.zeros(batch, dtype=torch.long, device=start.device)
    reached = torch.zeros(batch, dtype=torch.bool, device=start.device)
    targets = start.new_zeros(batch)

    running = list(range(batch))
    for step in range(max_steps + 1):
        with torch.set_grad_enabled(step < max_steps):
            latent = torch.stack([latents[i] for i in running])
            prediction = select(delta, running)(latent)
            loss = magnitude(prediction.to(start.dtype))

        value = loss.detach()
        if step == 0:
            before[:] = after[:] = value
            targets = target(value).to(start) if callable(target) else start.new_full((batch,), target)
        for k, i in enumerate(running):
            if value[k] <= after[i]:
                best[i], after[i] = latent[k].detach(), value[k]

        # `if loss < target_loss: break`, image by image; a magnitude that is not finite ends its image as well.
        below = value < targets[running]
        reached[running] = below
        going = (~below & torch.isfinite(value)).tolist()
        if step == max_steps or not any(going):
            break
        if not loss.requires_grad:
            raise RuntimeError("the network gave no gradient with respect to the latent")

        # `optim.zero_grad(); loss.backward(); optim.step()`: summed over images, each keeps its own gradient.
        with torch.enable_grad():
            total = LOSS_SCALE * loss[going].sum()
        (gradient,) = torch.autograd.grad(total, latent)
        finite = torch.isfinite(gradient).flatten(1).all(1).tolist()
        optim.zero_grad()
        for k, i in enumerate(running):
            if going[k] and finite[k]:
                latents[i].grad = gradient[k] / LOSS_SCALE
        optim.step()
        running = [i for i in running if latents[i].grad is not None]
        taken[running] += 1
        if not running:
            break

    return Adjusted(best, taken, before, after, reached)


def mitigate(x: Tensor, delta: Delta, settings: Settings, factor: float) -> Outcome:
    """`adjust` with resolved settings; `factor` scales an absolute target to the size of the latent."""
    assert settings.lr is not None and settings.target is not None
    lr, fraction, absolute = settings.lr, settings.target, settings.target * factor
    relative = settings.target_kind == "fraction"
    result = adjust(
        x,
        delta,
        lr=lr,
        target=(lambda before: fraction * before) if relative else absolute,
        max_steps=settings.max_steps,
        weight_decay=settings.weight_decay,
    )
    outcome = Outcome(
        result.x,
        before=result.before,
        after=result.after,
        steps=result.steps,
        used={"lr": lr, "target": f"{fraction:g}x" if relative else absolute},
    )
    for image, (reached, steps) in enumerate(zip(result.reached.tolist(), result.steps.tolist())):
        if not reached:
            outcome.notes.setdefault(image, []).append(
                f"the target was not reached in {steps} steps and the best noise was kept"
            )
    return outcome
