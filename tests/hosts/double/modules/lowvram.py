"""Low memory modes: only the flag."""

from __future__ import annotations

from typing import Any


def is_needed(sd_model: Any) -> bool:
    from modules.shared import cmd_opts

    return bool(cmd_opts.lowvram or cmd_opts.medvram or (cmd_opts.medvram_sdxl and hasattr(sd_model, "conditioner")))


def apply(sd_model: Any) -> None:
    from modules import shared

    sd_model.lowvram = is_needed(sd_model)
    shared.parallel_processing_allowed = not sd_model.lowvram


def is_enabled(sd_model: Any) -> bool:
    return sd_model.lowvram


def send_everything_to_cpu() -> None:
    pass
