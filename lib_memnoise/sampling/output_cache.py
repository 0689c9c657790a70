"""Keeps the outputs of the last evaluation of Δ: they are the sampler's first, and need not be evaluated again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lib_memnoise.sampling.backend import Backend
from lib_memnoise.sampling.cond_rows import equal, select_rows
from lib_memnoise.torch_utils.cross_attention import PLAIN, Row, scaled


@dataclass(frozen=True)
class CachedRow:
    """One network row: its inputs and the network's native output. Only `cond` has a batch dimension, of 1."""

    x: Tensor
    t: Tensor
    cond: Any
    out: Tensor
    attention: Row = PLAIN
    """How its prompt was attended to."""

    def has_inputs(self, x: Tensor, t: Tensor, cond: Any, attention: Row) -> bool:
        """Whether the row has exactly these inputs."""
        return self.attention == attention and equal(self.t, t) and equal(self.x, x) and equal(self.cond, cond)


@dataclass
class OutputCache:
    """For each image, the rows of its smallest ‖Δ‖, which belong to the noise that will be sampled."""

    of_image: dict[int, tuple[float, list[CachedRow]]] = field(default_factory=dict)
    state: tuple[Any, ...] = ()
    """`Backend.state` when the rows were evaluated."""

    def keep(self, image: int, magnitude: float, rows: list[CachedRow]) -> None:
        """Keep an image's rows if no smaller ‖Δ‖ has been kept."""
        if image not in self.of_image or magnitude <= self.of_image[image][0]:
            self.of_image[image] = magnitude, rows

    def find(self, x: Tensor, t: Tensor, cond: Any, attention: Row) -> Tensor | None:
        """The output of a row with exactly these inputs; None where there is none."""
        every = (row for _, rows in self.of_image.values() for row in rows)
        return next((row.out for row in every if row.has_inputs(x, t, cond, attention)), None)


class CachedModel:
    """Stands in front of the checkpoint's model for one pass, and takes outputs from the cache where it has them."""

    def __init__(
        self,
        model: Any,
        cache: OutputCache,
        backend: Backend,
        *,
        compared: Callable[[Any], Any] = lambda cond: cond,
        selected: Callable[[Any, list[int]], Any] = select_rows,
    ) -> None:
        """
        Args:
            compared: the part of a condition that an output depends on.
            selected: `selected(cond, rows)` is the condition of some rows.
        """
        self._model = model
        self._cache = cache
        self._backend = backend
        self._compared = compared
        self._selected = selected
        self.known: list[bool] = []
        """For each row of the last call, whether its output came from the cache."""
        self.native: Tensor = torch.empty(0)
        """The network's native output for the rows of the last call."""
        self.attention: list[Row] = []
        """How the rows of the next call are attended to; empty means as usual."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def apply_model(self, x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # Hosts' wrappers pass the condition by position or by name, and nothing else.
        conds = [*args, *kwargs.values()]
        outputs = self._known(x, t, conds[0]) if len(conds) == 1 else [None] * len(x)
        self.known = [output is not None for output in outputs]
        rest = [row for row, known in enumerate(self.known) if not known]
        if len(rest) == len(x):
            with self._attending(rest):
                self.native = self._model.apply_model(x, t, *args, **kwargs)
            return self.native
        if rest:
            with self._attending(rest):
                fresh = self._model.apply_model(
                    x[rest],
                    t[rest],
                    *[self._selected(value, rest) for value in args],
                    **{name: self._selected(value, rest) for name, value in kwargs.items()},
                )
            for row, output in zip(rest, fresh):
                outputs[row] = output
        self.native = torch.stack([output for output in outputs if output is not None])
        return self.native

    def _known(self, x: Tensor, t: Tensor, cond: Any) -> list[Tensor | None]:
        if not self._cache.of_image or self._cache.state != self._backend.state():
            return [None] * len(x)
        attention, compared = self.attention or [PLAIN] * len(x), self._compared(cond)
        return [self._cache.find(x[row], t[row], select_rows(compared, [row]), attention[row]) for row in range(len(x))]

    def _attending(self, rows: list[int]) -> AbstractContextManager[None]:
        """The context in which these rows of the call are evaluated."""
        attention = [self.attention[row] for row in rows] if self.attention else []
        if all(row == PLAIN for row in attention):
            return contextlib.nullcontext()
        return scaled(self._backend.unet, attention)
