"""Conditions that the host makes for a pass: those of the empty prompt and of the picture."""

from __future__ import annotations

from typing import Any

from modules import devices, prompt_parser, shared
from torch import Tensor

from lib_memnoise.errors import Unsupported
from lib_memnoise.sampling.cond_rows import Cond


def empty_prompt(p: Any) -> Cond:
    """The empty prompt's condition, one row, encoded as the host encodes an empty negative prompt (zeroed on SDXL)."""
    texts = prompt_parser.SdConditioning([""], width=p.width, height=p.height, is_negative_prompt=True)
    with devices.autocast():
        schedules = prompt_parser.get_learned_conditioning(shared.sd_model, texts, p.steps)
    return prompt_parser.reconstruct_cond_batch(schedules, 0)


class EmptyPrompt:
    """The empty prompt's condition, encoded at most once for each checkpoint that a pass uses."""

    def __init__(self, p: Any) -> None:
        self.p = p
        self._checkpoint: Any = None
        self._cond: Cond = None

    def __call__(self) -> Cond:
        # A refiner of the same architecture is loaded into the same model object.
        checkpoint = (shared.sd_model, shared.sd_model.sd_checkpoint_info)
        if self._checkpoint != checkpoint:
            self._cond, self._checkpoint = empty_prompt(self.p), checkpoint
        return self._cond


def follows_negative(p: Any, reference: str) -> bool:
    """Whether Δ is measured against the host's own unconditional rows: by choice, or because they are empty."""
    prompts = p.hr_negative_prompts if getattr(p, "is_hr_pass", False) else p.negative_prompts
    return reference == "negative" or all(prompt == "" for prompt in prompts or [""])


def image_conditioning(p: Any, x: Tensor) -> Tensor:
    """The network's input about the picture (such as an inpainting mask), one row for each image.

    Args:
        x: the noise, or the clean latent where sampling starts from a picture, `(B, C, H, W)`.

    Raises:
        Unsupported: the input cannot be known, or the checkpoint edits pictures by instructions.
    """
    model = shared.sd_model
    if hasattr(p, "init_images"):
        if getattr(model, "cond_stage_key", None) == "edit":
            raise Unsupported("checkpoints that edit pictures by instructions have two kinds of guidance")
        given: Tensor = p.image_conditioning
        return given.expand(x.shape[0], *given.shape[1:])
    inpainting = getattr(model, "is_inpaint", False) or getattr(
        getattr(model, "model", None), "conditioning_key", None
    ) in ("hybrid", "concat")
    if p.is_hr_pass and inpainting:
        raise Unsupported("the hires pass of an inpainting checkpoint cannot be adjusted")
    conditioning: Tensor = p.txt2img_image_conditioning(x)
    return conditioning
