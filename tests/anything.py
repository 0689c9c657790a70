"""Hypothesis strategies: whatever JSON, a text field or an infotext may hold."""

from __future__ import annotations

import math
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

HARMLESS = settings(deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
"""The same examples each time; how long one takes says nothing on a busy machine."""

BOTTOM: Any = None
for _ in range(200):
    BOTTOM = [BOTTOM]

TEXTS = st.text(st.characters(), max_size=60) | st.sampled_from(
    ["\ud800", "a\udfff", "\0", "\r", "\n\u2028", '"', "x" * 200_000, "9" * 5000, "1e999", "-1", "nan", "1-5", "1e-5"]
)
"""Unpaired surrogates too."""
NUMBERS = (
    st.integers()
    | st.floats()
    | st.integers(-(10**420), 10**420)
    | st.sampled_from([10**400, -(10**400), 2**1024, math.nan, math.inf, -0.0, 5e-324])
)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS | st.just(BOTTOM),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=8,
)


def is_sentence(text: str, most: int = 1000) -> bool:
    """Whether it may stand in an answer: one line that can be encoded, with an end, and not a book."""
    text.encode("utf-8")
    return text.startswith("memnoise: ") and text.endswith(".") and text.isprintable() and len(text) <= most
