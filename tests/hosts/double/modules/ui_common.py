"""Parts of the page that both tabs have."""

from __future__ import annotations

import html
from collections.abc import Callable
from typing import Any, NamedTuple

import gradio as gr
from modules.ui_components import ToolButton


def plaintext_to_html(text: str, classname: str | None = None) -> str:
    content = "<br>\n".join(html.escape(line) for line in text.split("\n"))
    return f"<p class='{classname}'>{content}</p>" if classname else f"<p>{content}</p>"


def create_refresh_button(refresh_component: Any, refresh_method: Callable, refreshed_args: Any, elem_id: str) -> Any:
    return ToolButton(value="\U0001f504", elem_id=elem_id)


class OutputPanel(NamedTuple):
    gallery: Any
    generation_info: Any
    infotext: Any
    html_log: Any


def create_output_panel(tabname: str) -> OutputPanel:
    with gr.Column(variant="panel", elem_id=f"{tabname}_results"):
        gallery = gr.Gallery(label="Output", show_label=False, elem_id=f"{tabname}_gallery", columns=4)
        infotext = gr.HTML(elem_id=f"html_info_{tabname}", elem_classes="infotext")
        log = gr.HTML(elem_id=f"html_log_{tabname}", elem_classes="html-log")
        info = gr.Textbox(visible=False, elem_id=f"generation_info_{tabname}")
    return OutputPanel(gallery, info, infotext, log)
