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
    taken, reached, hopeless = [0] * len(best), [False] * len(best), [False] * len(best)
    before = best[0].new_zeros(0)
    after: list[Tensor] = []
    targets: list[Tensor] = []
    lowest: list[list[Tensor]] = []  # at every step, the lowest losses so far

    running = list(range(len(best)))
    for step in range(max_steps + 1):
        with torch.set_grad_enabled(step < max_steps):
            current = loss([variables[i] for i in running], running)
        value = current.detach()
        if step == 0:
            before = value.to(best[0])
            after = list(before)
            targets = list(target(value).detach().to(before) if callable(target) else torch.full_like(before, target))
        for k, i in enumerate(running):
            better = value[k] <= after[i]
            best[i] = torch.where(better, variables[i].detach(), best[i])
            after[i] = torch.where(better, value[k], after[i])

        # `if loss < target_loss: break`, image by image.
        aims = torch.stack([targets[i] for i in running])
        lowest.append(after.copy())
        far = torch.zeros_like(value)
        if patience is not None and patience <= step < max_steps:
            then, now = (torch.stack([values[i] for i in running]) for values in (lowest[step - patience], after))
            far = is_far(then, now, aims, patience, max_steps - step).to(value)
        # All that is decided by comes from a GPU at once: every question makes it wait.
        # A loss of 0 cannot fall, and half of it is no target.
        is_below = (value < aims) | (value == 0)
        below, finite, is_hopeless, values, wanted = torch.stack(
            [is_below.to(value), torch.isfinite(value).to(value), far, value, aims]
        ).tolist()
        for k, i in enumerate(running):
            reached[i], hopeless[i] = bool(below[k]), bool(is_hopeless[k] and not below[k])
        going = [k for k in range(len(running)) if finite[k] and not below[k] and not is_hopeless[k]]
        on_progress(progress_of(step, max_steps, [(values[k], wanted[k]) for k in going]))
        if step == max_steps or not going:
            break

        # `optim.zero_grad(); loss.backward(); optim.step()`
        with torch.enable_grad():
            slopes = gradients(current if len(going) == len(running) else current[going], [
                variables[running[k]] for k in going
            ])  # fmt: skip
        optim.zero_grad()
        are_finite = torch.stack([torch.isfinite(gradient).all() for gradient in slopes]).tolist()
        for k, gradient, ok in zip(going, slopes, are_finite):
            if ok:
                variables[running[k]].grad = gradient
        optim.step()
        running = [i for i in running if variables[i].grad is not None]
        for i in running:
            taken[i] += 1
        if not running:
            break
    return Descent(best, torch.tensor(taken), before, torch.stack(after), torch.tensor(reached), torch.tensor(hopeless))


def is_far(before: Tensor, now: Tensor, target: Tensor, steps: int, left: int) -> Tensor:
    """Whether images would stay above `FAR` times their target, `(B,)`, at the present pace.

    Args:
        before, now: losses `steps` steps ago and now, `(B,)`.
        target: `(B,)`; never far where it is 0.
        left: the number of steps left.
    """
    return (target > 0) & (now - (before - now) / steps * left >= FAR * target)


def progress_of(step: int, most: int, running: Sequence[tuple[float, float]]) -> Progress:
    """`running`: the loss and the target of each image that goes on."""
    if not running:
        return Progress(step, most, "step", 0)
    value, target = max(running, key=lambda pair: pair[0] - pair[1])
    return Progress(step, most, "step", len(running), value, target)
