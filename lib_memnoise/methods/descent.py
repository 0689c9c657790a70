"""Gradient descent for a batch in which every image has its own variable, optimiser state and stop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lib_memnoise.core.progress import OnProgress, Progress, ignore_progress

LOSS_SCALE = 1024.0
"""Multiplies the loss, to keep gradients inside a half-precision network above its smallest numbers. It is a power of
two, so dividing it out again is exact: in float32 it changes nothing."""

PATIENCE, FAR = 30, 2.0
"""When the methods give up (see `descend`'s `patience`). With these values no descent on the miniature is given up that
would reach its target within its steps, by either step rule (`benchmarks/hopeless.py`). Losses fall ever more slowly,
so the present pace overestimates what is still to come; near the target they fluctuate, and may reach it by luck."""

Loss = Callable[[list[Tensor], list[int]], Tensor]
"""`loss(variables, images)` returns `(n,)`: the losses of the images with these indices, each at its variable."""


class NoGradient(RuntimeError):
    """The network can be evaluated but not differentiated."""


class Descent(NamedTuple):
    """The result of a descent. All fields but `best` are `(B,)`.

    `before` is the loss at the start, `after` the loss of `best`.
    """

    best: list[Tensor]
    steps: Tensor
    before: Tensor
    after: Tensor
    reached: Tensor
    hopeless: Tensor
    """Whether the image was given up because its target was too far away (see `descend`'s `patience`)."""


def gradients(loss: Tensor, variables: Sequence[Tensor]) -> list[Tensor]:
    """∂loss[i]/∂variables[i] for every image; each loss depends on its own variable alone.

    Raises:
        NoGradient: the loss carries no gradient (for instance an inference-only network).
    """
    if not loss.requires_grad:
        raise NoGradient("the network gave no gradient")
    # The gradient of the sum with respect to one image's variable is that of its own loss.
    with torch.enable_grad():
        total = LOSS_SCALE * loss.sum()
    return [gradient / LOSS_SCALE for gradient in torch.autograd.grad(total, list(variables))]


def descend(
    start: Sequence[Tensor],
    loss: Loss,
    *,
    optimiser: Callable[[list[Tensor]], torch.optim.Optimizer],
    target: float | Callable[[Tensor], Tensor],
    max_steps: int,
    on_progress: OnProgress = ignore_progress,
    patience: int | None = None,
) -> Descent:
    """Minimise each image's loss over its variable until it is below the target (the loop of Figure 7).

    Args:
        start: a variable for every image, of any shape, float32 or float64.
        loss: evaluated for all images that are still running together.
        optimiser: makes an optimiser for the variables. It must not change a variable that has no gradient.
        target: an image stops as soon as its loss < target. A function receives the first losses `(B,)` and returns a
            target for each.
        max_steps: the most optimiser steps an image takes.
        on_progress: called after every evaluation.
        patience: a number of steps. An image also stops if, at the pace of its last `patience` steps, the steps left
            would not bring its loss below `FAR` times its target. With None, or a target of 0, all steps are taken.

    Returns:
        `Descent`. Where the target was not reached, `best` is the best variable seen. An image stops where its loss or
        its gradient is not finite.

    Raises:
        NoGradient: the loss carries no gradient.

    Cost for each image: (steps + 1) losses, `steps` of them differentiated.
    """
    variables = [value.detach().clone().requires_grad_() for value in start]
    optim = optimiser(variables)
    best = [value.detach().clone() for value in start]
    batch, like = len(best), best[0]
    before = like.new_full((batch,), float("nan"))
    after = before.clone()
    taken = torch.zeros(batch, dtype=torch.long, device=like.device)
    reached = torch.zeros(batch, dtype=torch.bool, device=like.device)
    targets = like.new_zeros(batch)
    hopeless = torch.zeros(batch, dtype=torch.bool, device=like.device)
    lowest: list[Tensor] = []  # for every step, the lowest losses so far

    running = list(range(batch))
    for step in range(max_steps + 1):
        with torch.set_grad_enabled(step < max_steps):
            current = loss([variables[i] for i in running], running)
        value = current.detach()
        if step == 0:
            before[:] = after[:] = value
            targets = target(value).detach().to(like) if callable(target) else like.new_full((batch,), target)
        for k, i in enumerate(running):
            if value[k] <= after[i]:
                best[i], after[i] = variables[i].detach().clone(), value[k]

        # `if loss < target_loss: break`, image by image.
        below = value < targets[running]
        reached[running] = below
        lowest.append(after.clone())
        if patience is not None and patience <= step < max_steps:
            far = is_far(lowest[step - patience], after, targets, patience, max_steps - step)[running]
            hopeless[running] = far & ~below
        going = [k for k, go in enumerate((~below & torch.isfinite(value) & ~hopeless[running]).tolist()) if go]
        on_progress(_progress(step, max_steps, value[going], targets[running][going]))
        if step == max_steps or not going:
            break

        # `optim.zero_grad(); loss.backward(); optim.step()`
        with torch.enable_grad():
            slopes = gradients(current[going], [variables[running[k]] for k in going])
        optim.zero_grad()
        for k, gradient in zip(going, slopes):
            if bool(torch.isfinite(gradient).all()):
                variables[running[k]].grad = gradient
        optim.step()
        running = [i for i in running if variables[i].grad is not None]
        taken[running] += 1
        if not running:
            break
    return Descent(best, taken, before, after, reached, hopeless)


def is_far(before: Tensor, now: Tensor, target: Tensor, steps: int, left: int) -> Tensor:
    """Whether images would stay above `FAR` times their target, `(B,)`, at the present pace.

    Args:
        before, now: losses `steps` steps ago and now, `(B,)`.
        target: `(B,)`; never far where it is 0.
        left: the number of steps left.
    """
    return (target > 0) & (now - (before - now) / steps * left >= FAR * target)


def _progress(step: int, most: int, value: Tensor, target: Tensor) -> Progress:
    """The progress after a step; `value` and `target` are those of the images still running."""
    if not len(value):
        return Progress(step, most, "step", 0)
    worst = int((value - target).argmax())
    return Progress(step, most, "step", len(value), float(value[worst]), float(target[worst]))
