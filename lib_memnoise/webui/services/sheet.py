"""A sheet of pictures with labels that are never cut: text is wrapped, and its place grows with it.

Nothing here asks the host; the font is given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw

Fonts = Callable[[int], Any]
"""A font of this size in pixels (`PIL.ImageFont.FreeTypeFont`)."""
MARGIN = 4
NARROWEST = 10
"""A cell is at least so many times as wide as its text is high: below, hardly a word fits into a line."""


@dataclass(frozen=True)
class Text:
    """Lines of text and the place they have, in pixels from the sheet's upper left corner."""

    left: int
    top: int
    width: int
    height: int
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Sheet:
    """Where everything is. `pictures` are the upper left corners, row by row, with None where there is no picture."""

    width: int
    height: int
    font: Any
    texts: list[Text]
    pictures: list[list[tuple[int, int] | None]]


def wrapped(paragraphs: Sequence[str], font: Any, width: float) -> tuple[str, ...]:
    """Each paragraph in lines no longer than `width` pixels: broken at blanks, and in a word that is too long alone."""
    lines = []
    for paragraph in paragraphs:
        line = ""
        for word in paragraph.split():
            longer = f"{line} {word}" if line else word
            if font.getlength(longer) <= width:
                line = longer
                continue
            lines += [line] if line else []
            while font.getlength(word) > width and len(word) > 1:
                end = next(k for k in range(len(word) - 1, 0, -1) if k == 1 or font.getlength(word[:k]) <= width)
                lines.append(word[:end])
                word = word[end:]
            line = word
        lines += [line] if line else []
    return tuple(lines)


def line_height(font: Any) -> int:
    ascent, descent = font.getmetrics()
    return int(ascent + descent)


def lay_out(
    size: tuple[int, int],
    shown: Sequence[Sequence[bool]],
    captions: Sequence[Sequence[Sequence[str]]],
    columns: Sequence[str],
    rows: Sequence[str],
    fonts: Fonts,
) -> Sheet:
    """Places for pictures of one size in rows and columns, with captions under them and labels beside.

    Args:
        size: width and height of a picture.
        shown: of each row and column, whether there is a picture.
        captions: of each row and column, its paragraphs.
        columns, rows: their labels.
    """
    font = fonts(max(12, size[0] // 24))
    high = line_height(font)
    cell = max(size[0], NARROWEST * high)

    def text(left: int, top: int, width: int, paragraphs: Sequence[str]) -> Text:
        lines = wrapped(paragraphs, font, width - 2 * MARGIN)
        return Text(left + MARGIN, top + MARGIN, width - 2 * MARGIN, high * len(lines), lines)

    beside = max(cell * 3 // 4, NARROWEST * high)
    texts = [text(beside + k * cell, 0, cell, [label]) for k, label in enumerate(columns)]
    top = max(head.height for head in texts) + 2 * MARGIN
    pictures: list[list[tuple[int, int] | None]] = []
    for r, label in enumerate(rows):
        places = [(beside + k * cell + (cell - size[0]) // 2, top) for k in range(len(columns))]
        pictures.append([place if there else None for place, there in zip(places, shown[r])])
        own = [
            text(beside + k * cell, top + size[1] if shown[r][k] else top, cell, captions[r][k])
            for k in range(len(columns))
        ]
        own.append(text(0, top, beside, [label]))
        texts += own
        lowest = [top + size[1] if any(shown[r]) else top, *(part.top + part.height for part in own)]
        top = max(lowest) + 2 * MARGIN
    return Sheet(beside + len(columns) * cell, top, font, texts, pictures)


def render(sheet: Sheet, rows: Sequence[Sequence[Image.Image]], *, background: str, ink: str) -> Image.Image:
    """The sheet with these pictures, a row that has none being empty."""
    made = Image.new("RGB", (sheet.width, sheet.height), background)
    draw = ImageDraw.Draw(made)
    for row, places in zip(rows, sheet.pictures):
        for picture, place in zip(row, places):
            if place is not None:
                made.paste(picture, place)
    for text in sheet.texts:
        for number, line in enumerate(text.lines):
            draw.text((text.left, text.top + number * line_height(sheet.font)), line, font=sheet.font, fill=ink)
    return made
