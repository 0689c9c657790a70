"""Operations on rows of a host's conditions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Cond = Any
"""A condition in the host's own form: a tensor `(rows, tokens, width)`, or a dict of tensors (SDXL)."""
Conditions = dict[str, Any]
"""The network's inputs besides latents and time, with one row for each row of latents."""
CHUNK = 77
"""Tokens in a chunk. A prompt is encoded in chunks, each with a start and an end token of its own."""


def select_rows(value: Any, rows: Sequence[int]) -> Any:
    """The given rows of a tensor, or of every tensor in nested lists and dicts."""
    if isinstance(value, Tensor):
        return value[list(rows)]
    if isinstance(value, Mapping):
        selected = {key: select_rows(entry, rows) for key, entry in value.items()}
        return like(value, selected) if hasattr(value, "shape") else selected
    if isinstance(value, list):
        return [select_rows(entry, rows) for entry in value]
    return value


def like(cond: Mapping[str, Tensor], values: dict[str, Tensor]) -> Cond:
    """The values in the same class of dict as `cond`: hosts use one that has a shape."""
    return type(cond)(values)  # type: ignore[call-arg]


def vectors(cond: Cond) -> Tensor:
    """The text encoder's vectors in a condition, `(rows, tokens, width)`."""
    return cond["crossattn"] if isinstance(cond, dict) else cond


def with_vectors(cond: Cond, values: Tensor) -> Cond:
    """The condition with its vectors replaced."""
    return like(cond, {**cond, "crossattn": values}) if isinstance(cond, dict) else values


def token_length(cond: Cond) -> int:
    """The number of tokens, padding included."""
    return int(cond.shape[1])


def joined(first: Mapping[str, Any], second: Mapping[str, Any]) -> Conditions:
    """The rows of both conditions in one dict, those of `first` first."""
    return {
        key: [torch.cat(pair) for pair in zip(value, second[key])]
        if isinstance(value, list)
        else torch.cat([value, second[key]])
        for key, value in first.items()
    }


def equal(first: Any, second: Any) -> bool:
    """Whether nested lists and dicts of tensors are equal bit for bit."""
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


def detached(value: Any) -> Any:
    """Nested lists and dicts with every tensor detached from its graph."""
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, Mapping):
        return {key: detached(entry) for key, entry in value.items()}
    return [detached(entry) for entry in value] if isinstance(value, list) else value


def cloned(cond: Cond) -> Cond:
    """A copy that shares no tensors with the condition; None stays None."""
    if isinstance(cond, Mapping):
        return like(cond, {key: value.clone() for key, value in cond.items()})
    return None if cond is None else cond.clone()
