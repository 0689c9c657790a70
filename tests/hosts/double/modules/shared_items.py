"""Lists for the page."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_CATEGORIES = (
    "prompt image inpaint sampler accordions checkboxes dimensions cfg denoising seed batch override_settings"
).split()


def ui_reorder_categories() -> Iterator[str]:
    from modules import scripts

    yield from _CATEGORIES
    both = [*scripts.scripts_txt2img.scripts, *scripts.scripts_img2img.scripts]
    yield from dict.fromkeys(x.section for x in both if x.section and x.section not in _CATEGORIES)
    yield "scripts"


def list_samplers() -> list[Any]:
    from modules import sd_samplers

    return sd_samplers.all_samplers


def list_checkpoint_tiles(use_short: bool = False) -> list[str]:
    from modules import sd_models

    return sd_models.checkpoint_tiles(use_short)
