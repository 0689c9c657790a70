"""A sheet of pictures with labels that are never cut off: text is wrapped, and its box grows with it.

Nothing here depends on the host; the caller supplies the font.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw

Fonts = Callable[[int], Any]
"""A function that returns a font of a size in pixels (`PIL.ImageFont.FreeTypeFont`)."""
MARGIN = 4
NARROWEST = 10
"""A cell's least width in heights of a line of text; a narrower one hardly has room for a word."""


@dataclass(frozen=True)
class Text:
    """Lines of text and their box, in pixels from the sheet's upper left corner."""

    left: int
    top: int
    width: int
    height: int
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Sheet:
    """The layout. `pictures` are the upper left corners, row by row, with None where there is no picture."""

    width: int
    height: int
    font: Any
    texts: list[Text]
    pictures: list[list[tuple[int, int] | None]]


def wrapped(paragraphs: Sequence[str], font: Any, width: float) -> tuple[str, ...]:
    """Each paragraph in lines of at most `width` pixels, broken at blanks, or inside a word that is too long itself."""
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
    """The height of a line, in pixels."""
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
    """Lay out pictures of one size in rows and columns, with captions below them, and labels above and on the left.

    Args:
        size: width and height of a picture, in pixels.
        shown: for each row and column, whether there is a picture.
        captions: for each row and column, the paragraphs of its caption.
        columns, rows: their labels.
    """
    font = fonts(max(12, size[0] // 24))
    high = line_height(font)
    cell = max(size[0], NARROWEST * high)

    def text(left: int, top: int, width: int, paragraphs: Sequence[str]) -> Text:
        lines = wrapped(paragraphs, font, width - 2 * MARGIN)
        return Text(left + MARGIN, top + MARGIN, width - 2 * MARGIN, high * len(lines), lines)

    label_width = max(cell * 3 // 4, NARROWEST * high)
    texts = [text(label_width + k * cell, 0, cell, [label]) for k, label in enumerate(columns)]
    top = max(head.height for head in texts) + 2 * MARGIN
    pictures: list[list[tuple[int, int] | None]] = []
    for r, label in enumerate(rows):
        places = [(label_width + k * cell + (cell - size[0]) // 2, top) for k in range(len(columns))]
        pictures.append([place if there else None for place, there in zip(places, shown[r])])
        row_texts = [
            text(label_width + k * cell, top + size[1] if shown[r][k] else top, cell, captions[r][k])
            for k in range(len(columns))
        ]
        row_texts.append(text(0, top, label_width, [label]))
        texts += row_texts
        lowest = [top + size[1] if any(shown[r]) else top, *(part.top + part.height for part in row_texts)]
        top = max(lowest) + 2 * MARGIN
    return Sheet(label_width + len(columns) * cell, top, font, texts, pictures)


def render(sheet: Sheet, rows: Sequence[Sequence[Image.Image]], *, background: str, ink: str) -> Image.Image:
    """Draw the sheet with these pictures; a row without pictures is empty."""
    image = Image.new("RGB", (sheet.width, sheet.height), background)
    draw = ImageDraw.Draw(image)
    for row, places in zip(rows, sheet.pictures):
        for picture, place in zip(row, places):
            if place is not None:
                image.paste(picture, place)
    for text in sheet.texts:
        for number, line in enumerate(text.lines):
            draw.text((text.left, text.top + number * line_height(sheet.font)), line, font=sheet.font, fill=ink)
    return image
