"""Hands the network's last answers on to the sampler, whose first question is the same."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lib_memnoise.sampling.cond_rows import select_rows
from lib_memnoise.torch_utils.cross_attention import PLAIN, Row, scaled
from lib_memnoise.webui.backends.backend import network


@dataclass(frozen=True)
class Answer:
    """One network row: what went in, and the network's native output. No batch dimension but in `cond`."""

    x: Tensor
    t: Tensor
    cond: Any
    out: Tensor
    heard: Row = PLAIN
    """How its prompt was attended to."""

    def is_to(self, x: Tensor, t: Tensor, cond: Any, heard: Row) -> bool:
        """Whether this very row is asked for again."""
        return self.heard == heard and equal(self.t, t) and equal(self.x, x) and equal(self.cond, cond)


def equal(first: Any, second: Any) -> bool:
    """Whether nested lists and dicts of tensors are the same, to the bit."""
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, Mapping):
        return (
            isinstance(second, Mapping)
            and first.keys() == second.keys()
            and all(equal(value, second[key]) for key, value in first.items())
        )
    if isinstance(first, list):
        return isinstance(second, list) and len(first) == len(second) and all(map(equal, first, second))
    return bool(first == second)


@dataclass
class Answers:
    """The rows of each image's smallest Δ: those of the noise that it is left with."""

    of_image: dict[int, tuple[float, list[Answer]]] = field(default_factory=dict)
    state: tuple[Any, ...] = ()

    def keep(self, image: int, magnitude: float, rows: list[Answer]) -> None:
        if image not in self.of_image or magnitude <= self.of_image[image][0]:
            self.of_image[image] = magnitude, rows

    def find(self, x: Tensor, t: Tensor, cond: Any, heard: Row) -> Tensor | None:
        every = (answer for _, rows in self.of_image.values() for answer in rows)
        return next((answer.out for answer in every if answer.is_to(x, t, cond, heard)), None)


class Handover:
    """Stands in front of the checkpoint's model, for one pass's network wrapper, and knows some answers already."""

    def __init__(
        self,
        model: Any,
        answers: Answers,
        *,
        compared: Callable[[Any], Any] = lambda cond: cond,
        selected: Callable[[Any, list[int]], Any] = select_rows,
    ) -> None:
        """`compared` is what an answer depends on of a condition, `selected(cond, rows)` the condition of some rows."""
        self._model = model
        self._answers = answers
        self._compared = compared
        self._selected = selected
        self.known: list[bool] = []
        """Which rows of the last call were known."""
        self.native: Tensor = torch.empty(0)
        """The network's native output for the rows of the last call."""
        self.heard: list[Row] = []
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
                asked = self._model.apply_model(
                    x[rest],
                    t[rest],
                    *[self._selected(value, rest) for value in args],
                    **{name: self._selected(value, rest) for name, value in kwargs.items()},
                )
            for row, output in zip(rest, asked):
                outputs[row] = output
        self.native = torch.stack([output for output in outputs if output is not None])
        return self.native

    def _known(self, x: Tensor, t: Tensor, cond: Any) -> list[Tensor | None]:
        if not self._answers.of_image or self._answers.state != network().state():
            return [None] * len(x)
        heard, compared = self.heard or [PLAIN] * len(x), self._compared(cond)
        return [self._answers.find(x[row], t[row], select_rows(compared, [row]), heard[row]) for row in range(len(x))]

    def _attending(self, rows: list[int]) -> AbstractContextManager[None]:
        """Around an evaluation of these rows of the call."""
        heard = [self.heard[row] for row in rows] if self.heard else []
        if all(row == PLAIN for row in heard):
            return contextlib.nullcontext()
        return scaled(network().unet, heard)
