"""Keeps the outputs of the last evaluation of Δ, which are the sampler's first: they need not be evaluated again."""

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
    """One network row: what went in, and the network's native output. No batch dimension but in `cond`."""

    x: Tensor
    t: Tensor
    cond: Any
    out: Tensor
    attention: Row = PLAIN
    """How its prompt was attended to."""

    def is_to(self, x: Tensor, t: Tensor, cond: Any, attention: Row) -> bool:
        """Whether this very row is asked for again."""
        return self.attention == attention and equal(self.t, t) and equal(self.x, x) and equal(self.cond, cond)


@dataclass
class OutputCache:
    """The rows of each image's smallest Δ: those of the noise that it is left with."""

    of_image: dict[int, tuple[float, list[CachedRow]]] = field(default_factory=dict)
    state: tuple[Any, ...] = ()

    def keep(self, image: int, magnitude: float, rows: list[CachedRow]) -> None:
        if image not in self.of_image or magnitude <= self.of_image[image][0]:
            self.of_image[image] = magnitude, rows

    def find(self, x: Tensor, t: Tensor, cond: Any, attention: Row) -> Tensor | None:
        every = (answer for _, rows in self.of_image.values() for answer in rows)
        return next((answer.out for answer in every if answer.is_to(x, t, cond, attention)), None)


class CachedModel:
    """Stands in front of the checkpoint's model for one pass, and takes from the cache what is there."""

    def __init__(
        self,
        model: Any,
        cache: OutputCache,
        backend: Backend,
        *,
        compared: Callable[[Any], Any] = lambda cond: cond,
        selected: Callable[[Any, list[int]], Any] = select_rows,
    ) -> None:
        """`compared` is what an output depends on of a condition, `selected(cond, rows)` the condition of some rows."""
        self._model = model
        self._cache = cache
        self._backend = backend
        self._compared = compared
        self._selected = selected
        self.known: list[bool] = []
        """Which rows of the last call were known."""
        self.native: Tensor = torch.empty(0)
        """The network's native output for the rows of the last call."""
        self.attention: list[Row] = []
        """How the rows of the next call are attended to; empty: as usual."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def apply_model(self, x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # The wrappers give the condition by place or by name, and nothing else.
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
        """Around an evaluation of these rows of the call."""
        attention = [self.attention[row] for row in rows] if self.attention else []
        if all(row == PLAIN for row in attention):
            return contextlib.nullcontext()
        return scaled(self._backend.unet, attention)
