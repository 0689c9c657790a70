"""A stage of the miniature's training: what it trains and for how long, and its state in the work folder."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lib_memnoise.core.files import replacing
from lib_memnoise.lab.miniature import scenes


@dataclass(frozen=True)
class Stage:
    """A training run: what is trained, for how long, and how a batch's loss is computed.

    `loss(module, generator, rows, done)`, where `done` is the share of the steps behind it, draws a whole batch from
    the generator and computes the loss of the rows given, the share of one process.
    """

    name: str
    arcs: tuple[tuple[int, float], ...]
    """Steps and the highest learning rate of each arc of the schedule: a warm-up, then a cosine to zero."""
    batch: int
    make: Callable[[], nn.Module]
    loss: Callable[[nn.Module, np.random.Generator, slice, float], Tensor]
    ema: float = 0.998
    start_from: str | None = None
    """A stage whose averaged weights this one begins with."""

    @property
    def steps(self) -> int:
        return sum(steps for steps, _ in self.arcs)


def learning_rate(step: int, arcs: tuple[tuple[int, float], ...]) -> float:
    """Linear warm-up over 2 % of an arc's steps, then a cosine to zero."""
    (steps, peak), *later = arcs
    if step >= steps and later:
        return learning_rate(step - steps, tuple(later))
    warm = max(1, steps // 50)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def write(path: Path, content: Any) -> None:
    """Save with torch, whole or not at all."""
    with replacing(path) as partial:
        torch.save(content, partial)


def state_path(folder: Path, stage: str) -> Path:
    return folder / f"{stage}.pt"


def finished(folder: Path, stage: str, prefix: str = "") -> dict[str, Tensor]:
    """The averaged weights of a finished stage, those under a prefix without it."""
    weights: dict[str, Tensor] = torch.load(state_path(folder, stage), mmap=True)["average"]
    return {name[len(prefix) :]: value for name, value in weights.items() if name.startswith(prefix)}


def steps_done(folder: Path, stage: str) -> int:
    path = state_path(folder, stage)
    return int(torch.load(path, mmap=True)["step"]) if path.exists() else 0


@dataclass
class TrainingState:
    """A stage in training: what is trained, its average, and how far it is."""

    module: nn.Module
    average: dict[str, Tensor]
    optimiser: torch.optim.Optimizer
    step: int = 0
    """Steps done."""

    @classmethod
    def of(cls, stage: Stage, folder: Path) -> TrainingState:
        """As it was last written to the folder, or new."""
        torch.manual_seed(scenes.SEED)
        module = stage.make()
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # convolutions are faster so
        if stage.start_from is not None:
            module.load_state_dict(finished(folder, stage.start_from))
        average = {key: value.clone() for key, value in module.state_dict().items()}
        optimiser = torch.optim.AdamW(
            module.parameters(), lr=stage.arcs[0][1], weight_decay=0.01, betas=(0.9, 0.99), fused=True
        )
        found = cls(module, average, optimiser)
        path = state_path(folder, stage.name)
        if path.exists():
            state = torch.load(path)
            module.load_state_dict(state["module"])
            optimiser.load_state_dict(state["optimiser"])
            found.average, found.step = state["average"], state["step"]
        return found

    def save(self, path: Path) -> None:
        write(
            path,
            {
                "module": self.module.state_dict(),
                "average": self.average,
                "optimiser": self.optimiser.state_dict(),
                "step": self.step,
            },
        )

    @torch.no_grad()
    def follow(self, ema: float) -> None:
        """Have the average follow the module after a step: faster in the first ones."""
        keep = min(ema, self.step / (9 + self.step))
        for key, value in self.module.state_dict().items():
            average = self.average[key]
            average.lerp_(value, 1 - keep) if value.is_floating_point() else average.copy_(value)
