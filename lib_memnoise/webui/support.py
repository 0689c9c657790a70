"""Whether this host has what memnoise needs, and the script that stands in where it does not."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

import gradio as gr
from modules import scripts

HOOK = "process_before_every_sampling"


def lacks() -> str | None:
    """Why memnoise cannot work here, in one sentence; None where it can. Hosts are recognised by what they have."""
    if hasattr(scripts.Script, HOOK):
        return None
    if importlib.util.find_spec("modules.sd_samplers_cfg_denoiser") is None:
        return (
            "memnoise cannot work in this WebUI, which samples by pipelines of its own (as SD.Next does): it has no "
            "hook for the initial noise; AUTOMATIC1111 1.10 or later, Forge and reForge have one."
        )
    return f"memnoise needs AUTOMATIC1111 1.10 or later, Forge or reForge: this WebUI has no hook {HOOK}."


class Refused(scripts.Script):  # type: ignore[misc]
    """The script in hosts without support: it says why, on the page and in images that were to be mitigated."""

    def title(self) -> str:
        return "Memnoise"

    def show(self, is_img2img: bool) -> Any:
        return scripts.AlwaysVisible

    def ui(self, is_img2img: bool) -> list[Any]:
        with gr.Accordion("Memnoise", open=False):
            gr.HTML(f"<p>{lacks()}</p>")
            enabled = gr.Checkbox(False, visible=False, label="enabled")
            options = gr.JSON(visible=False, label="options (API: a dict of settings)")
        return [enabled, options]

    def before_process(self, p: Any, enabled: Any = False, options: Any = None) -> None:
        settings = enabled if isinstance(enabled, Mapping) else options if isinstance(options, Mapping) else {}
        if not (settings.get("enabled", True) if isinstance(enabled, Mapping) else enabled):
            return
        reason = lacks()
        p.extra_generation_params["Memnoise failed"] = reason
        if hasattr(p, "comment"):
            p.comment(f"Not mitigated: {reason}")
        if settings.get("fail_instead"):

            def init(*args: Any, **kwargs: Any) -> None:
                raise RuntimeError(reason)

            p.init = init
