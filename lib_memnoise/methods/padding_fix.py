"""Padding-token fix: the prompt is padded with token 0 instead of the end token, and has no end token (Kim & No 2026).

SD 1's text encoder pads with its end token, and the vectors of the padding carry much of what is memorised.
"""

from __future__ import annotations

from torch import Tensor

from lib_memnoise.core.delta import Delta, working_precision
from lib_memnoise.methods.batch import BatchContext, Outcome, Prompt
from lib_memnoise.settings import ResolvedSettings


def mitigate(x: Tensor, delta: Delta, settings: ResolvedSettings, context: BatchContext) -> Outcome:
    """The noise unchanged, and every image's prompt encoded with other padding."""
    prompt = Prompt(pad_zero=settings.padding != "end", zero_end=settings.padding != "pad")
    return Outcome(
        working_precision(x), used={"padding": settings.padding}, prompts=dict.fromkeys(range(len(x)), prompt)
    )
