"""The progress of an adjustment, for whoever wants to show it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Progress:
    """How far an adjustment has come after an evaluation of the network."""

    done: int
    """The number of units that are done: optimiser steps, noises or adjustments."""
    most: int
    """The most units there can be; the adjustment may end earlier."""
    unit: str
    """What is counted, in a word."""
    running: int
    """The number of images that are not finished."""
    value: float | None = None
    """The loss of the image that is furthest from its target: ‖Δ‖, or a method's own loss."""
    target: float | None = None
    """The target of that image."""
    what: str = "magnitude"
    """What `value` is, in a word."""

    def __str__(self) -> str:
        images = "" if self.running == 1 else f", {self.running} images running"
        aim = "" if self.value is None else f", {self.what} {self.value:.4g}, target {self.target:.4g}"
        return f"{self.unit} {self.done} of at most {self.most}{images}{aim}"


OnProgress = Callable[[Progress], None]


def ignore_progress(progress: Progress) -> None:
    """The default: progress is not shown."""


def part_of_progress(on_progress: OnProgress, number: int, of: int) -> OnProgress:
    """A function that reports the progress of one of several adjustments as part of the whole.

    Args:
        number: the adjustment, counted from 0; they are made one after another.
        of: how many adjustments there are.
    """
    return lambda progress: on_progress(
        replace(progress, done=number * progress.most + progress.done, most=of * progress.most)
    )
