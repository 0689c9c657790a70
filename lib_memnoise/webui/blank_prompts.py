"""Prompts that add nothing: there is nothing to adjust for them, and no guidance to hold back."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from lib_memnoise.sampling.cond_rows import Cond, equal
from lib_memnoise.webui.host_conditions import follows_negative

NO_WORDS = re.compile(r"(?:AND|[()\[\]\s])*")
"""A text with nothing in it but the WebUI's syntax."""


def blank_images(p: Any, c: Any, empty: Callable[[], Cond], reference: str) -> list[int]:
    """The images of a batch whose prompt is empty, or is encoded as the empty prompt is, in every step and part.

    `c`: the host's own condition of the prompts. The text alone says it where the host encodes an empty negative prompt
    otherwise (zeroed, on SDXL), and where a longer prompt of the batch gives an empty one its length; the condition
    where what there is of a text has no tokens.
    """
    texts = p.hr_prompts if getattr(p, "is_hr_pass", False) else p.prompts
    # The empty prompt is not encoded for this alone.
    nothing = None if reference == "negative" and not follows_negative(p, "empty") else empty()

    def is_blank(text: str, parts: Any) -> bool:
        if NO_WORDS.fullmatch(text):
            return True
        conds = [scheduled.cond for part in parts for scheduled in part.schedules]
        return nothing is not None and all(equal(cond, row_of(nothing)) for cond in conds)

    return [image for image, (text, parts) in enumerate(zip(texts, c.batch)) if is_blank(text, parts)]


def row_of(cond: Cond) -> Cond:
    """The first row of a condition, as the host keeps a prompt's in its schedule: without its dimension."""
    return {key: value[0] for key, value in cond.items()} if isinstance(cond, dict) else cond[0]
