"""Cross-attention scaling: the start token's logit times C, and no attention to the padding (Ren et al. 2024)."""

from __future__ import annotations

from torch import Tensor

from lib_memnoise.core.delta import Delta, working_precision
from lib_memnoise.methods.batch import BatchContext, Outcome, Prompt
from lib_memnoise.settings import ResolvedSettings
from lib_memnoise.torch_utils.cross_attention import Attention


def mitigate(x: Tensor, delta: Delta, settings: ResolvedSettings, context: BatchContext) -> Outcome:
    """The noise unchanged, and every image's prompt attended to differently in every step.

    Only conditional rows are changed; the authors' code masks the padding of the unconditional row as well.
    """
    outcome = Outcome(
        working_precision(x), used={"bos_scale": settings.bos_scale, "mask_padding": settings.mask_padding}
    )
    if settings.bos_scale != 1 or settings.mask_padding:
        prompt = Prompt(attention=Attention(settings.bos_scale, settings.mask_padding))
        outcome.prompts = dict.fromkeys(range(len(x)), prompt)
    return outcome
