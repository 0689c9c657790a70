"""Finds blank prompts, for which there is nothing to adjust and no guidance to hold back."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from lib_memnoise.sampling.cond_rows import Cond, equal
from lib_memnoise.webui.host_conditions import follows_negative

NO_WORDS = re.compile(r"(?:AND|[()\[\]\s])*")
"""Matches a text that consists of the WebUI's syntax alone."""


def blank_images(p: Any, c: Any, empty: Callable[[], Cond], reference: str) -> list[int]:
    """The images of a batch whose prompt is empty, or is encoded like the empty prompt in every step and part.

    Both the text and its condition are looked at. The text decides where the conditions of empty prompts differ: SDXL
    zeroes that of an empty negative prompt, and a longer prompt in the batch pads an empty one. The condition decides
    where a text has no tokens.

    Args:
        c: the host's condition of the prompts.
        empty: encodes the empty prompt.
        reference: what Δ is measured against, "empty" or "negative".
    """
    texts = p.hr_prompts if getattr(p, "is_hr_pass", False) else p.prompts
    # The empty prompt is not encoded for this purpose alone.
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
