"""Prompts of an evaluation: memorised captions, each with the training pictures it reproduces."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib_memnoise.lab.miniature import OneSentence

if TYPE_CHECKING:
    from lib_memnoise.lab.miniature import scenes

MINIATURE = "miniature"
"""Instead of a file: the miniature's held-out memorised captions."""
PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"}


class BadPrompts(OneSentence):
    """A file of prompts that cannot be used: which, where and why."""


@dataclass(frozen=True)
class Prompt:
    """A caption, what it is known by, and its training pictures."""

    caption: str
    index: str = ""
    """The paper's `Index`: the name of the caption's folder of ground truth."""
    kind: str = ""
    """The paper's `type`: VM, verbatim, or TM, template; of the miniature A or B; "" where it is not known."""
    references: tuple[str, ...] = ()
    """Files; of the miniature's own pictures `miniature:ROW`."""


def read(source: str, ground_truth: Path | None = None) -> list[Prompt]:
    """The prompts of a file: `.csv` as the paper has them, `.jsonl`, or a caption a line.

    Args:
        source: the file, or "miniature".
        ground_truth: a folder with a folder of pictures for every `Index`.

    Raises:
        BadPrompts: it cannot be read; with the line and the column.
    """
    if source == MINIATURE:
        return _of_the_miniature()
    path = Path(source)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadPrompts(
            f"{path} is not valid; it must be UTF-8 text ({error.reason} at byte {error.start})."
        ) from None
    readers = {".csv": _from_csv, ".jsonl": _from_jsonl}
    found = list(readers.get(path.suffix.lower(), _from_lines)(path, text.splitlines()))
    if not found:
        raise BadPrompts(f"{path} has no prompts.")
    if ground_truth is not None:
        found = [_with_ground_truth(prompt, ground_truth) for prompt in found]
        if not any(prompt.references for prompt in found):
            raise BadPrompts(f"{ground_truth} has no pictures for any prompt; it must have a folder for every Index.")
    return found


def training_pictures(prompts: Sequence[Prompt], source: str, ground_truth: Path | None = None) -> tuple[str, ...]:
    """All training pictures that are known, each once, as `Prompt.references` names them.

    Args:
        prompts, source, ground_truth: what `read` found, and where. Pictures of other captions count too: of a folder
            of ground truth all, of the miniature all that it memorised.
    """
    found = dict.fromkeys(name for prompt in prompts for name in prompt.references)
    if source == MINIATURE:
        found |= dict.fromkeys(_name(row) for row in range(len(_memorised())))
    if ground_truth is not None and ground_truth.is_dir():
        folders = sorted(path for path in ground_truth.iterdir() if path.is_dir())
        found |= dict.fromkeys(name for folder in folders for name in _pictures(folder))
    return tuple(found)


def _pictures(folder: Path) -> tuple[str, ...]:
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in PICTURES)
    return tuple(str(file.resolve()) for file in files)


def _from_csv(path: Path, lines: Sequence[str]) -> Iterator[Prompt]:
    """`;`-separated, with the columns Caption and, where known, Index and type; others are not read."""
    rows = csv.reader(lines, delimiter=";")
    columns = [name.strip() for name in next(rows, [])]
    if "Caption" not in columns:
        raise BadPrompts(f"{path}, line 1: there is no column Caption; it has {', '.join(columns) or 'none'}.")
    for row in rows:
        if not row:
            continue
        where = f"{path}, line {rows.line_num}"
        if len(row) != len(columns):
            last = columns[min(len(row), len(columns)) - 1]
            raise BadPrompts(f"{where}: it has {len(row)} columns instead of {len(columns)}; the last is {last}.")
        values = dict(zip(columns, map(str.strip, row)))
        if not values["Caption"]:
            raise BadPrompts(f"{where}, column Caption: it is empty.")
        index = values.get("Index", "")
        if "Index" in columns and not _is_a_name(index):
            raise BadPrompts(f"{where}, column Index: {index!r} is not valid; it must be the name of a folder.")
        yield Prompt(values["Caption"], index, values.get("type", ""))


def _from_jsonl(path: Path, lines: Sequence[str]) -> Iterator[Prompt]:
    """An object a line: caption and, where known, index, type and references (files, from the list's own folder)."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            values: Any = json.loads(line)
        except ValueError as error:
            raise BadPrompts(f"{where}: it is no JSON ({error}).") from None
        if not isinstance(values, dict):
            raise BadPrompts(f"{where}: it must be an object.")
        for name in values:
            if name not in ("caption", "index", "type", "references"):
                raise BadPrompts(f"{where}: {name!r} is not known; known are caption, index, type and references.")
        caption, references = values.get("caption"), values.get("references", [])
        if not isinstance(caption, str) or not caption.strip():
            raise BadPrompts(f"{where}, caption: {caption!r} is not valid; it must be text.")
        if not isinstance(references, list) or not all(isinstance(name, str) for name in references):
            raise BadPrompts(f"{where}, references: {references!r} is not valid; it must be a list of files.")
        index = str(values.get("index", ""))
        if "index" in values and not _is_a_name(index):
            raise BadPrompts(f"{where}, index: {index!r} is not valid; it must be the name of a folder.")
        files = [path.parent / name for name in references]
        for file in files:
            if not file.is_file():
                raise BadPrompts(f"{where}, references: {file} is no file.")
        yield Prompt(caption.strip(), index, str(values.get("type", "")), tuple(str(file.resolve()) for file in files))


def _from_lines(path: Path, lines: Sequence[str]) -> Iterator[Prompt]:
    return (Prompt(line.strip()) for line in lines if line.strip())


def _is_a_name(index: str) -> bool:
    return index not in ("", ".", "..") and not set(index) & set("/\\\0")


def _with_ground_truth(prompt: Prompt, folder: Path) -> Prompt:
    if not prompt.index:
        return prompt
    own = folder / prompt.index
    return Prompt(prompt.caption, prompt.index, prompt.kind, _pictures(own) if own.is_dir() else ())


def _memorised() -> list[scenes.Prompt]:
    from lib_memnoise.lab.miniature.scenes import prompts

    return [prompt for prompt in prompts() if prompt.memorised]


def _name(row: int) -> str:
    return f"{MINIATURE}:{row}"


def _of_the_miniature() -> list[Prompt]:
    return [
        Prompt(prompt.caption, str(row), prompt.kind, (_name(row),))
        for row, prompt in enumerate(_memorised())
        if prompt.held_out
    ]
