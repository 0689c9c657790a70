"""Records of the comparisons as rows of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_COLUMNS = (
    ("method", "method", "{}"),
    ("copied", "copied any", "{:.0%}"),
    ("copied_own", "copied own", "{:.0%}"),
    ("similarity", "similarity any", "{:.2f}"),
    ("similarity_own", "similarity own", "{:.2f}"),
    ("alignment", "alignment", "{:.2f}"),
    ("rows", "rows", "{:.1f}"),
    ("backward_rows", "backward", "{:.1f}"),
    ("magnitude_before", "|Δ| before", "{:.2f}"),
    ("magnitude_after", "|Δ| after", "{:.2f}"),
)
_IN_MARKDOWN = {"method": ("", "{}"), "rows": ("rows", "{:.0f}"), "backward_rows": ("backward", "{:.0f}"),
                "magnitude_after": ("‖Δ‖ after", "{:.2f}")}  # fmt: skip
"""Columns with another title or form there."""


def _cell(form: str, value: Any) -> str:
    return "–" if value is None else form.format(value)


def cells(records: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The records as rows of text under a row of titles; – where there is nothing to say."""
    lines = [[title for _, title, _ in _COLUMNS]]
    return lines + [[_cell(form, entry[key]) for key, _, form in _COLUMNS] for entry in records]


def aligned(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """The records as lines of plain text, in columns."""
    lines = cells(records)
    widths = [max(map(len, column)) for column in zip(*lines)]
    return ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines]


def markdown(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """The records as the lines of a Markdown table; ‖Δ‖ before is left out, which is the first row's after."""
    columns = [
        (key, *_IN_MARKDOWN.get(key, (title, form))) for key, title, form in _COLUMNS if key != "magnitude_before"
    ]
    rows = [[_cell(form, entry[key]).replace("%", " %").replace("-", "−") if key != "method" else entry[key]
             for key, _, form in columns] for entry in records]  # fmt: skip
    return in_markdown([title for _, title, _ in columns], rows)


def in_markdown(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    head, *rest = (f"| {' | '.join(row)} |".replace("|  |", "| |") for row in (titles, *rows))
    return [head, "|---" * len(titles) + "|", *rest]
