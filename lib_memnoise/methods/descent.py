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


class Judge:
    """Decides after every evaluation which images of a descent go on, and keeps what has come of each.

    Everything is decided from one copy of the device's values, since each further question, and each index that comes
    from Python as a list, makes a GPU wait.
    """

    def __init__(self, target: float | Callable[[Tensor], Tensor], max_steps: int, patience: int | None) -> None:
        """The arguments are those of `descend`."""
        self.target = target
        self.max_steps = max_steps
        self.patience = patience
        self.before = torch.empty(0)
        """The first losses, `(B,)`."""
        self.after: list[Tensor] = []
        """The lowest loss of each image so far."""
        self.targets: list[Tensor] = []
        self.lowest: list[list[Tensor]] = []
        """`after` at every step."""
        self.taken: list[int] = []
        self.reached: list[bool] = []
        self.hopeless: list[bool] = []

    def improved(self, running: list[int], value: Tensor) -> Tensor:
        """Take in the losses of the images that are running. Returns which are their lowest so far, `(n,)`."""
        if not self.taken:
            self.before, self.after = value, list(value)
            targets = self.target(value).to(value) if callable(self.target) else torch.full_like(value, self.target)
            self.targets = list(targets)
            self.taken = [0] * len(value)
            self.reached, self.hopeless = [False] * len(value), [False] * len(value)
        better = value <= torch.stack([self.after[i] for i in running])
        for k, i in enumerate(running):
            self.after[i] = torch.where(better[k], value[k], self.after[i])
        self.lowest.append(self.after.copy())
        return better

    def going(self, step: int, running: list[int], value: Tensor, on_progress: OnProgress) -> list[int]:
        """The places in `running` of the images that go on after this step; their progress is reported."""
        aims, far = torch.stack([self.targets[i] for i in running]), torch.zeros_like(value)
        if self.patience is not None and self.patience <= step < self.max_steps:
            then, now = (
                torch.stack([losses[i] for i in running]) for losses in (self.lowest[step - self.patience], self.after)
            )
            far = is_far(then, now, aims, self.patience, self.max_steps - step).to(value)
        is_below = (value < aims) | (value == 0)  # 0 cannot fall, and half of it is no target
        below, finite, is_hopeless, values, wanted = torch.stack(
            [is_below.to(value), torch.isfinite(value).to(value), far, value, aims]
        ).tolist()
        for k, i in enumerate(running):
            self.reached[i], self.hopeless[i] = bool(below[k]), bool(is_hopeless[k] and not below[k])
        going = [k for k in range(len(running)) if finite[k] and not below[k] and not is_hopeless[k]]
        on_progress(progress_of(step, self.max_steps, [(values[k], wanted[k]) for k in going]))
        return [] if step == self.max_steps else going

    def result(self, best: list[Tensor]) -> Descent:
        """The descent that led to these variables."""
        return Descent(
            best, torch.tensor(self.taken), self.before, torch.stack(self.after),
            torch.tensor(self.reached), torch.tensor(self.hopeless),
        )  # fmt: skip


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
    judge = Judge(target, max_steps, patience)
    running = list(range(len(best)))
    for step in range(max_steps + 1):
        with torch.set_grad_enabled(step < max_steps):
            current = loss([variables[i] for i in running], running)
        value = current.detach().to(best[0])
        for i, better in zip(running, judge.improved(running, value)):
            best[i] = torch.where(better, variables[i].detach(), best[i])

        # `if loss < target_loss: break`, image by image.
        going = judge.going(step, running, value, on_progress)
        if not going:
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
            judge.taken[i] += 1
        if not running:
            break
    return judge.result(best)


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
