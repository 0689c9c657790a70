"""Tell scripts about every component that is made, as the host does by patching gradio."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr

_patched = False


def _watched(original: Callable) -> Callable:
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        from modules import script_callbacks, scripts

        self.webui_tooltip = kwargs.pop("tooltip", None)
        if scripts.scripts_current is not None:
            scripts.scripts_current.before_component(self, **kwargs)
        script_callbacks.before_component_callback(self, **kwargs)
        original(self, *args, **kwargs)
        self.elem_classes = [f"gradio-{self.get_block_name()}", *(self.elem_classes or [])]
        script_callbacks.after_component_callback(self, **kwargs)
        if scripts.scripts_current is not None:
            scripts.scripts_current.after_component(self, **kwargs)

    return __init__


def install() -> None:
    global _patched
    if not _patched:
        _patched = True
        for base in (gr.components.IOComponent, gr.blocks.BlockContext):
            base.__init__ = _watched(base.__init__)
