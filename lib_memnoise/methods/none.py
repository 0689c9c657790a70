"""No adjustment: the noise stays as drawn. For measuring the score."""

from __future__ import annotations

from torch import Tensor

from lib_memnoise.core.delta import Delta, working_precision
from lib_memnoise.methods.batch import BatchContext, Outcome
from lib_memnoise.settings import ResolvedSettings


def mitigate(x: Tensor, delta: Delta, settings: ResolvedSettings, context: BatchContext) -> Outcome:
    """The latents unchanged, in working precision."""
    return Outcome(working_precision(x))
