"""How far an adjustment has got, for whoever wants to show it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Progress:
    """Told after each evaluation of the network that an adjustment is waiting for."""

    done: int
    """Units of it: optimiser steps, noises or adjustments."""
    most: int
    """It may end before."""
    unit: str
    running: int
    """Images that are not finished."""
    value: float | None = None
    """The loss of the image that is furthest from its target: ‖Δ‖, or what a method has instead."""
    target: float | None = None
    what: str = "magnitude"
    """Of the value."""

    def __str__(self) -> str:
        images = "" if self.running == 1 else f", {self.running} images running"
        aim = "" if self.value is None else f", {self.what} {self.value:.4g}, target {self.target:.4g}"
        return f"{self.unit} {self.done} of at most {self.most}{images}{aim}"


OnProgress = Callable[[Progress], None]


def ignore_progress(progress: Progress) -> None:
    """Nobody wants to know."""


def part_of_progress(on_progress: OnProgress, number: int, of: int) -> OnProgress:
    """Tells of one of several adjustments that are made one after another, from 0, as of a part of the whole."""
    return lambda own: on_progress(replace(own, done=number * own.most + own.done, most=of * own.most))
