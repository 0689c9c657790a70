"""Errors, and the words of a sentence about bad input: the value as given, shortened, and what was likely meant."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any


class Interrupted(Exception):
    """The user asked to interrupt or skip."""


class Unsupported(RuntimeError):
    """What memnoise cannot work with, in one sentence."""


class NotCalibrated(Unsupported):
    """A generation depends on a calibration that does not exist."""


class SettingError(ValueError):
    """A setting that cannot be used. The message is one sentence: name, value and what would be right."""


MOST = 80
"""Characters of a value that a sentence repeats."""


def echo(value: Any, most: int = MOST) -> str:
    """A value as JSON, in at most `most` printable characters that any encoding of Unicode takes.

    Raises nothing, whatever the value: numbers of any length, unpaired surrogates, nesting of any depth.
    """
    text = ""
    for piece in _pieces(value, most):
        text += piece
        if len(text) > most:
            return text[: most - 3] + "..."
    return text


def _pieces(value: Any, most: int) -> Iterator[str]:
    """JSON from left to right; who reads on only as far as there is room meets no depth or length without end."""
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
    """Text in which quotation marks, line ends, unpaired surrogates and the like are escaped as in JSON."""
    return "".join(c if c.isprintable() and c not in '"\\' else json.dumps(c)[1:-1] for c in text)


def _digits(value: int) -> str:
    # Python refuses to write out very long ones.
    if value.bit_length() <= 256:
        return str(value)
    at_most = int(value.bit_length() * math.log10(2)) + 1
    first = str(abs(value) // 10 ** (at_most - 21))
    return f"{'-' if value < 0 else ''}{first[:20]}... ({at_most - 21 + len(first)} digits)"


def is_encodable(text: str) -> bool:
    """Whether every encoding of Unicode takes it; JSON may hold half a surrogate pair, which none does."""
    return not any("\ud800" <= c <= "\udfff" for c in text)


def likeliest(given: Any, known: Mapping[str, str]) -> str | None:
    """The name that was likely meant by one that is unknown, of names and what people see for them."""
    if not isinstance(given, str) or not given:
        return None
    table = {_plain(text): name for name, label in known.items() for text in (label, name)}
    wanted = _plain(given[:MOST])
    close = difflib.get_close_matches(wanted, table, n=1, cutoff=0.65)
    return table[close[0]] if close else None


def _plain(text: str) -> str:
    return " ".join(text.casefold().replace("_", " ").replace("-", " ").removeprefix("[memnoise]").split())


def meant(given: Any, known: Mapping[str, str]) -> str:
    """`likeliest` as a part of a sentence behind the unknown name; empty if nothing is alike."""
    name = likeliest(given, known)
    return "" if name is None else f" (did you mean {echo(name)}?)"
