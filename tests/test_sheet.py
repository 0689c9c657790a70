"""Labels of a comparison's grid are never cut, whatever the pictures' size."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
from PIL import Image, ImageChops, ImageFont

from lib_memnoise.webui.services.sheet import Sheet, Text, lay_out, line_height, render, wrapped

FAILURE = (
    "not mitigated: another extension's functions in the network give a wrong gradient: 0.123 where the difference "
    "quotient is 4.567; the sampler started at t = 999, the noise was adjusted for 981"
)
CAPTIONS = {
    "usual": ["score 7.468", "similarity -0.12", "38 rows"],
    "backward": ["score 0.2251", "similarity 0.97", "238 rows, 200 backward"],
    "failure": [FAILURE, "similarity 1.00"],
    "one word": ["not mitigated: " + "f4" * 90],
    "nothing": [],
}
LABELS = ("None", "Batch-wise, gamma 0.7, rho 50.0, steps 2, tau 917.449, when flagged, exact_batches True", "W" * 120)


def fonts(size: int) -> Any:
    return ImageFont.load_default(size)


def sheet_of(width: int, height: int, caption: list[str], label: str, *, shown: bool = True) -> Sheet:
    two = [[True, True], [shown, shown]]
    return lay_out((width, height), two, [[caption] * 2] * 2, ["Seed 4294967295", "Seed 8"], [label, "None"], fonts)


def overlap(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def box(text: Text) -> tuple[int, int, int, int]:
    return text.left, text.top, text.left + text.width, text.top + text.height


@pytest.mark.parametrize("caption", CAPTIONS)
@pytest.mark.parametrize("label", LABELS, ids=lambda label: label[:10])
@pytest.mark.parametrize("shown", [True, False])
def test_every_text_has_its_place(caption: str, label: str, shown: bool) -> None:
    for width in (64, 72, 128, 200, 256, 512, 768, 1024, 2048):
        height = 64 if width > 1000 else width
        made = sheet_of(width, height, CAPTIONS[caption], label, shown=shown)
        places = [place for row in made.pictures for place in row]
        assert [place is not None for place in places] == [True, True, shown, shown]
        boxes = [box(text) for text in made.texts if text.lines]
        boxes += [(x, y, x + width, y + height) for x, y in filter(None, places)]
        for text in made.texts:
            assert all(made.font.getlength(line) <= text.width for line in text.lines), (width, text)
            assert len(text.lines) * line_height(made.font) <= text.height
        for left, top, right, bottom in boxes:
            assert left >= 0 and top >= 0 and right <= made.width and bottom <= made.height
        assert not any(overlap(a, b) for a, b in combinations(boxes, 2)), width


@pytest.mark.parametrize("text", [FAILURE, *LABELS, "f4" * 90, "similarity -0.12"])
def test_nothing_is_lost_in_wrapping(text: str) -> None:
    for width in (30, 56, 120, 500):
        lines = wrapped([text], fonts(12), width)
        assert "".join(lines).replace(" ", "") == text.replace(" ", "")
        assert all(fonts(12).getlength(line) <= width for line in lines)


def test_what_is_drawn_is_where_it_was_laid_out() -> None:
    """Ink lies in the texts' places, and in each of them there is some."""
    made = sheet_of(64, 64, CAPTIONS["failure"], LABELS[1])
    picture = Image.new("RGB", (64, 64), "white")
    sheet = render(made, [[picture] * 2] * 2, background="white", ink="black")
    ink = ImageChops.invert(sheet.convert("L"))
    for text in made.texts:
        assert ink.crop(box(text)).getbbox() is not None
        left, top, right, bottom = box(text)
        ink.paste(0, (left - 2, top - 2, right + 2, bottom + 2))  # letters lean over their own width
    assert ink.getbbox() is None
