"""Rows of the conditions that the host holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from modules import prompt_parser
from torch import Tensor

Cond = Any
"""A condition as the host holds it: a tensor `(rows, tokens, width)`, or a dict of tensors (SDXL)."""


def select_rows(value: Any, rows: Sequence[int]) -> Any:
    """The given rows of a tensor, or of every tensor in nested lists and dicts."""
    if isinstance(value, Tensor):
        return value[list(rows)]
    if isinstance(value, Mapping):
        selected = {key: select_rows(entry, rows) for key, entry in value.items()}
        return prompt_parser.DictWithShape(selected) if hasattr(value, "shape") else selected
    if isinstance(value, list):
        return [select_rows(entry, rows) for entry in value]
    return value
