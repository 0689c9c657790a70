"""The page: two tabs with the host's element ids, their scripts' controls, settings, and extensions' tabs."""

from __future__ import annotations

from typing import Any

import gradio as gr
from modules import infotext_utils, script_callbacks, scripts, sd_samplers, shared, shared_items, txt2img, ui_common
from modules.call_queue import wrap_gradio_gpu_call
from modules.infotext_utils import PasteField
from modules.ui_common import create_refresh_button, plaintext_to_html  # noqa: F401
from modules.ui_components import FormGroup, FormRow, InputAccordion, ToolButton

random_symbol = "\U0001f3b2"
reuse_symbol = "♻"
refresh_symbol = "\U0001f504"

txt2img_paste_fields: list = []
img2img_paste_fields: list = []
page_functions: dict[str, Any] = {}
"""What Generate calls in each tab, with the components it gets and sets: (function, inputs, outputs)."""


def create_override_settings_dropdown(tabname: str) -> Any:
    return gr.Dropdown(
        [], label="Override settings", visible=False, elem_id=f"{tabname}_override_settings", multiselect=True
    )


def _hires_fix(c: dict[str, Any]) -> None:
    with InputAccordion(False, label="Hires. fix", elem_id="txt2img_hr") as c["enable_hr"]:
        c["hr_upscaler"] = gr.Dropdown(
            label="Upscaler",
            elem_id="txt2img_hr_upscaler",
            choices=[*shared.latent_upscale_modes],
            value=shared.latent_upscale_default_mode,
        )
        c["hr_second_pass_steps"] = gr.Slider(
            0, 150, step=1, value=0, label="Hires steps", elem_id="txt2img_hires_steps"
        )
        c["hr_scale"] = gr.Slider(1.0, 4.0, step=0.05, value=2.0, label="Upscale by", elem_id="txt2img_hr_scale")
        c["denoising_strength"] = gr.Slider(
            0.0, 1.0, step=0.01, value=0.7, label="Denoising strength", elem_id="txt2img_denoising_strength"
        )


def _category(tab: str, category: str, runner: Any, c: dict[str, Any]) -> None:
    """The controls of one category, then those of scripts that chose it as their section."""
    if category == "prompt":
        c["prompt"] = gr.Textbox(label="Prompt", elem_id=f"{tab}_prompt", lines=3)
        c["negative_prompt"] = gr.Textbox(label="Negative prompt", elem_id=f"{tab}_neg_prompt", lines=3)
    elif category == "image" and tab == "img2img":
        c["init_image"] = gr.Image(label="Image for img2img", elem_id="img2img_image", type="pil")
    elif category == "dimensions":
        with FormRow():
            for name in ("width", "height"):
                c[name] = gr.Slider(64, 2048, step=8, value=512, label=name.title(), elem_id=f"{tab}_{name}")
            c["batch_count"] = gr.Slider(1, 100, step=1, value=1, label="Batch count", elem_id=f"{tab}_batch_count")
            c["batch_size"] = gr.Slider(1, 8, step=1, value=1, label="Batch size", elem_id=f"{tab}_batch_size")
    elif category == "cfg":
        c["cfg_scale"] = gr.Slider(1.0, 30.0, step=0.5, value=7.0, label="CFG Scale", elem_id=f"{tab}_cfg_scale")
    elif category == "denoising" and tab == "img2img":
        c["denoising_strength"] = gr.Slider(
            0.0, 1.0, step=0.01, value=0.75, label="Denoising strength", elem_id="img2img_denoising_strength"
        )
    elif category == "accordions":
        with gr.Row(elem_id=f"{tab}_accordions", elem_classes="accordions"):
            if tab == "txt2img":
                _hires_fix(c)
            runner.setup_ui_for_section(category)
        return
    elif category == "override_settings":
        c["override_settings"] = create_override_settings_dropdown(tab)
    elif category == "scripts":
        with FormGroup(elem_id=f"{tab}_script_container"):
            c["scripts"] = runner.setup_ui()
    runner.setup_ui_for_section(category)


def _paste_fields(tab: str, c: dict[str, Any]) -> list[Any]:
    fields = [
        PasteField(c["prompt"], "Prompt", api="prompt"),
        PasteField(c["negative_prompt"], "Negative prompt", api="negative_prompt"),
        PasteField(c["cfg_scale"], "CFG scale", api="cfg_scale"),
        PasteField(c["width"], "Size-1", api="width"),
        PasteField(c["height"], "Size-2", api="height"),
        PasteField(c["batch_size"], "Batch size", api="batch_size"),
        PasteField(c["denoising_strength"], "Denoising strength", api="denoising_strength"),
    ]
    if tab == "txt2img":
        hires = ("Hires upscale", "Hires upscaler", "Hires resize-1")
        fields += [
            PasteField(
                c["enable_hr"],
                lambda d: "Denoising strength" in d and any(key in d for key in hires),
                api="enable_hr",
            ),
            PasteField(c["hr_scale"], "Hires upscale", api="hr_scale"),
            PasteField(c["hr_upscaler"], "Hires upscaler", api="hr_upscaler"),
            PasteField(c["hr_second_pass_steps"], "Hires steps", api="hr_second_pass_steps"),
        ]
    return fields


_OWN_INPUTS = {
    "txt2img": (
        "prompt negative_prompt batch_count batch_size cfg_scale height width enable_hr denoising_strength hr_scale "
        "hr_upscaler hr_second_pass_steps override_settings"
    ).split(),
    "img2img": (
        "prompt negative_prompt batch_count batch_size cfg_scale height width init_image denoising_strength "
        "override_settings"
    ).split(),
}


def _create_tab(tab: str) -> gr.Blocks:
    runner = scripts.scripts_img2img if tab == "img2img" else scripts.scripts_txt2img
    scripts.scripts_current = runner
    runner.initialize_scripts(is_img2img=tab == "img2img")
    c: dict[str, Any] = {}
    with gr.Blocks(analytics_enabled=False) as interface:
        task = gr.Label(visible=False)
        generate = gr.Button("Generate", elem_id=f"{tab}_generate", variant="primary")
        paste = ToolButton(value="↙", elem_id="paste")
        with gr.Column(variant="compact", elem_id=f"{tab}_settings"):
            runner.prepare_ui()
            order = {name: i for i, name in enumerate(shared.opts.ui_reorder_list)}
            for category in sorted(shared_items.ui_reorder_categories(), key=lambda x: order.get(x, 1000)):
                _category(tab, category, runner, c)
        panel = ui_common.create_output_panel(tab)
        inputs = [task, *(c[name] for name in _OWN_INPUTS[tab]), *c["scripts"]]
        function = wrap_gradio_gpu_call(getattr(txt2img, tab), extra_outputs=[None, "", ""])
        page_functions[tab] = (function, inputs, list(panel))
        generate.click(fn=function, _js="submit", inputs=inputs, outputs=list(panel), show_progress=False)

        fields = [*_paste_fields(tab, c), *runner.infotext_fields]
        infotext_utils.add_paste_fields(tab, c.get("init_image"), fields, c["override_settings"])
        globals()[f"{tab}_paste_fields"] = fields
        infotext_utils.register_paste_params_button(
            infotext_utils.ParamBinding(paste_button=paste, tabname=tab, source_text_component=c["prompt"])
        )
    scripts.scripts_current = None
    return interface


def _create_settings() -> gr.Blocks:
    opts = shared.opts
    with gr.Blocks(analytics_enabled=False) as interface:
        for key, info in opts.data_labels.items():
            args = info.component_args() if callable(info.component_args) else info.component_args
            default = {bool: gr.Checkbox, int: gr.Number, float: gr.Number}.get(type(info.default), gr.Textbox)
            value = getattr(opts, key)
            if info.component is None and not isinstance(value, (str, int, float, type(None))):
                continue
            component = (info.component or default)(
                label=info.label, value=value, elem_id=f"setting_{key}", **(args or {})
            )
            shared.settings_components[key] = component
    return interface


def create_ui() -> gr.Blocks:
    infotext_utils.reset()
    script_callbacks.ui_settings_callback()
    shared.opts.reorder()
    shared.settings_components = {}
    interfaces = [(_create_tab(tab), tab, tab) for tab in ("txt2img", "img2img")]
    interfaces += script_callbacks.ui_tabs_callback()
    interfaces.append((_create_settings(), "Settings", "settings"))
    shared.tab_names = [label for _, label, _ in interfaces]
    with gr.Blocks(theme=shared.gradio_theme, analytics_enabled=False, title="Stable Diffusion") as demo:
        with gr.Tabs(elem_id="tabs"):
            for interface, label, ifid in interfaces:
                with gr.TabItem(label, id=ifid, elem_id=f"tab_{ifid}"):
                    interface.render()
        infotext_utils.connect_paste_params_buttons()
    return demo


def visible_samplers() -> list[str]:
    return sd_samplers.visible_sampler_names()
