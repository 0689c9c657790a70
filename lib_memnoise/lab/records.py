"""Records of the comparisons as rows of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_COLUMNS = (
    ("method", "method", "{}"),
    ("copied", "copied", "{:.0%}"),
    ("similarity", "similarity", "{:.2f}"),
    ("alignment", "alignment", "{:.2f}"),
    ("rows", "rows", "{:.1f}"),
    ("backward_rows", "backward", "{:.1f}"),
    ("magnitude_before", "|Δ| before", "{:.2f}"),
    ("magnitude_after", "|Δ| after", "{:.2f}"),
)


def cells(records: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The records as rows of text under a row of titles."""
    lines = [[title for _, title, _ in _COLUMNS]]
    return lines + [[form.format(entry[key]) for key, _, form in _COLUMNS] for entry in records]


def aligned(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """The records as lines of plain text, in columns."""
    lines = cells(records)
    widths = [max(map(len, column)) for column in zip(*lines)]
    return ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines]
