"""Errors, and the parts of a sentence about bad input: the value, shortened, and the name that was likely meant."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any


class Interrupted(Exception):
    """The user has asked to interrupt or skip."""


class Unsupported(RuntimeError):
    """Something that memnoise cannot work with; the message is one sentence."""


class NotCalibrated(Unsupported):
    """A generation depends on a calibration that does not exist."""


class SettingError(ValueError):
    """A setting that cannot be used. The message is one sentence with its name, its value and what would be valid."""


MOST = 80
"""The most characters of a value that a sentence repeats."""


def echo(value: Any, most: int = MOST) -> str:
    """A value as JSON, in at most `most` printable characters that every encoding of Unicode can represent.

    It never raises, whatever the value: numbers of any length, unpaired surrogates, nesting of any depth.
    """
    text = ""
    for piece in _pieces(value, most):
        text += piece
        if len(text) > most:
            return text[: most - 3] + "..."
    return text


def _pieces(value: Any, most: int) -> Iterator[str]:
    """A value as JSON, piece by piece from left to right, so that the caller can stop at any depth and length."""
    if isinstance(value, str):
        yield f'"{printable(value[: most + 1])}"'
    elif value is None or isinstance(value, (bool, float)):
        yield json.dumps(value).removesuffix(".0")
    elif isinstance(value, int):
        yield _digits(int(value))
    elif isinstance(value, (list, tuple)):
        yield "["
        for number, entry in enumerate(value):
            yield ", " if number else ""
            yield from _pieces(entry, most)
        yield "]"
    elif isinstance(value, Mapping):
        yield "{"
        for number, (key, entry) in enumerate(value.items()):
            yield ", " if number else ""
            yield from _pieces(key, most)
            yield ": "
            yield from _pieces(entry, most)
        yield "}"
    else:
        yield f"<{type(value).__name__}>"


def printable(text: str) -> str:
    """The text with quotation marks, line ends, unpaired surrogates and the like escaped as in JSON."""
    return "".join(c if c.isprintable() and c not in '"\\' else json.dumps(c)[1:-1] for c in text)


def _digits(value: int) -> str:
    # Python refuses to convert very long integers to text.
    if value.bit_length() <= 256:
        return str(value)
    at_most = int(value.bit_length() * math.log10(2)) + 1
    first = str(abs(value) // 10 ** (at_most - 21))
    return f"{'-' if value < 0 else ''}{first[:20]}... ({at_most - 21 + len(first)} digits)"


def is_encodable(text: str) -> bool:
    """Whether a text can be encoded. JSON may hold half a surrogate pair, which no encoding can represent."""
    return not any("\ud800" <= c <= "\udfff" for c in text)


def likeliest(given: Any, known: Mapping[str, str]) -> str | None:
    """The known name that was likely meant by an unknown one; None where nothing is similar.

    Args:
        known: names, and what people see for them.
    """
    if not isinstance(given, str) or not given:
        return None
    # A name goes before another one's label that is spelled like it.
    table = {_plain(label): name for name, label in known.items()} | {_plain(name): name for name in known}
    wanted = _plain(given[:MOST])
    close = difflib.get_close_matches(wanted, table, n=1, cutoff=0.65)
    return table[close[0]] if close else None


def _plain(text: str) -> str:
    return " ".join(text.casefold().replace("_", " ").replace("-", " ").removeprefix("[memnoise]").split())


def meant(given: Any, known: Mapping[str, str]) -> str:
    """`likeliest` as a parenthesis that follows the unknown name in a sentence; empty where nothing is similar."""
    name = likeliest(given, known)
    return "" if name is None else f" (did you mean {echo(name)}?)"
