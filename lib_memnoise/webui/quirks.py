"""The table of differences between hosts, one row for each, besides how they evaluate a network (`backends`).

A host is recognised by what it has, never by its name, so that an unknown fork is treated like the hosts it resembles.
All other code asks `has`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gradio as gr
from modules import processing, sd_models, shared

ENGINES = tuple(f"text_processing_engine{suffix}" for suffix in ("", "_l", "_g"))


@dataclass(frozen=True)
class Quirk:
    """One row of the table."""

    hosts: str
    """The hosts that have it, with the versions it was seen in."""
    symptom: str
    present: Callable[[Any], bool]
    """Whether the host has it; called with the processing object, or with None where there is none."""


def _prints_errors(p: Any) -> bool:
    if getattr(p, "is_api", False):
        return False
    try:
        from modules_forge import main_thread
    except ImportError:
        return False
    return not hasattr(main_thread, "last_exception")


QUIRKS = {
    "loads late": Quirk(
        "Forge dfdcbab6, Forge Neo 2.26",
        "the chosen checkpoint is loaded only when a generation begins",
        lambda p: hasattr(sd_models, "forge_model_reload"),
    ),
    "prints errors": Quirk(
        "reForge 3b56b268, Forge Classic 1f95d717",
        "what a generation of the page raises is only printed in the console: the page does not say it",
        _prints_errors,
    ),
    "noise is an attribute": Quirk(
        "Forge dfdcbab6, reForge 3b56b268, Forge Classic 1f95d717, Forge Neo 2.26",
        "the noise that is sampled is `p.modified_noise` where that is set, and not what the hook was given; "
        "Forge calls the hook of a hires pass twice",
        lambda p: hasattr(p, "modified_noise"),
    ),
    "hires has its own scale": Quirk(
        "Forge dfdcbab6, reForge 3b56b268",
        "the hires pass is sampled with `p.hr_cfg`",
        lambda p: hasattr(p, "hr_cfg"),
    ),
    "schedules are in sampler names": Quirk(
        "Forge Classic 1f95d717",
        "there is no list of schedule types and no `p.scheduler`",
        lambda p: importlib.util.find_spec("modules.sd_schedulers") is None,
    ),
    "tiles by a function": Quirk(
        "Forge dfdcbab6",
        "tiling is applied by `processing.apply_circular_forge`, not by the model hijack",
        lambda p: hasattr(processing, "apply_circular_forge"),
    ),
    "encodes by engines": Quirk(
        "Forge dfdcbab6, Forge Neo 2.26",
        "text encoders are the model's `text_processing_engine…`, not its `cond_stage_model` or `conditioner`",
        lambda p: any(hasattr(shared.sd_model, name) for name in ENGINES),
    ),
    "gradio 3": Quirk(
        "A1111 1.10.1, reForge 3b56b268, Forge Classic 1f95d717",
        "an event's JavaScript is its argument `_js`",
        lambda p: gr.__version__.startswith("3."),
    ),
}


def has(name: str, p: Any = None) -> bool:
    """Whether the running host has this quirk."""
    return QUIRKS[name].present(p)
