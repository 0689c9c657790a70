"""Parses the text of a plot's axis: values and ranges of one setting, such as `1, 3, 5-9 (+2)`."""

from __future__ import annotations

import csv
import re
from decimal import Decimal
from typing import Any

from lib_memnoise.errors import SettingError, echo
from lib_memnoise.settings.rules import check, from_text, requirement, type_of

MOST_VALUES = 1000
"""The most values of one range."""
MOST_CHARACTERS = 100_000
"""The most characters of an axis."""

_NUMBER = r"([+-]?(?:\d+\.?\d*|\.\d+))"
RANGE = re.compile(rf"\s*{_NUMBER}\s*-\s*{_NUMBER}\s*(?:\(\s*{_NUMBER}\s*\)|\[\s*(\d+)\s*\])?\s*", re.ASCII)
"""The plot script's syntax of ranges: `1-5`, `1-5 (+2)` with a step, `1-5 [3]` with a count."""


def axis_values(name: str, text: Any) -> list[str]:
    """The values of an axis, written so that the plot script reads each as one value.

    Raises:
        SettingError: the setting cannot have a value, or a range never ends or has too many values.
    """
    if not isinstance(text, str):
        raise SettingError(f"memnoise: the values {echo(text)} of {name} are not valid; they must be a text.")
    if len(text) > MOST_CHARACTERS:
        raise SettingError(
            f"memnoise: the values {echo(text)} of {name} are {len(text)} characters; {MOST_CHARACTERS} is the most."
        )
    if type_of(name) not in (int, float):
        # As the plot script reads it: line ends separate values as well, and commas in quotation marks do not.
        rows = csv.reader(text.replace("\0", "\ufffd").splitlines(), skipinitialspace=True)
        values = [value.strip() for row in rows for value in row]
        for value in values:
            from_text(name, value)
        return values
    parts = [part for part in text.split(",") if part.strip()]
    return [plain(value) for part in parts for value in numbers(name, part)]


def numbers(name: str, part: str) -> list[Any]:
    """The value or values of one part of an axis's text.

    Raises:
        SettingError: see `axis_values`.
    """
    match = RANGE.fullmatch(part)
    if match is None:
        return [from_text(name, part)]
    first, last = (Decimal(str(from_text(name, end))) for end in match.groups()[:2])
    whole = type_of(name) is int
    if match[4] is not None:
        count = _bounded(name, part, Decimal(match[4]))
        values = [first + (last - first) * k / max(count - 1, 1) for k in range(count)]
        return [check(name, int(value) if whole else float(value)) for value in values]
    step = Decimal(match[3] or 1)
    if step == 0 or (last - first) * step < 0:
        raise SettingError(f"memnoise: {name} = {echo(part.strip())} is not valid; its step leads away from its end.")
    if whole and step != int(step):
        raise SettingError(f"memnoise: {name} = {echo(part.strip())} is not valid; its step must be a whole number.")
    # `decimal` raises for a quotient of too many digits.
    many = abs(last - first) >= MOST_VALUES * abs(step)
    count = _bounded(name, part, Decimal(MOST_VALUES + 1) if many else (last - first) // step + 1)
    return [check(name, (int if whole else float)(first + k * step)) for k in range(count)]


def _bounded(name: str, part: str, count: Decimal) -> int:
    if not 1 <= count <= MOST_VALUES:
        raise SettingError(
            f"memnoise: {name} = {echo(part.strip())} is not valid; it must be from 1 to {MOST_VALUES} values, "
            f"each {requirement(name)}."
        )
    return int(count)


def plain(value: Any) -> str:
    """A number without an exponent: the plot script would take the exponent's sign for a range."""
    return format(Decimal(str(value)), "f")
