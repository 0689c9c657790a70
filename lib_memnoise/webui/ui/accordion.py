"""The accordion: its controls, which are made from the schema, and how infotext fills them."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Mapping
from typing import Any

import gradio as gr
from modules import shared
from modules.ui_components import FormGroup, InputAccordion

from lib_memnoise.registry import METHODS
from lib_memnoise.settings import (
    DEFAULTS,
    SPECS,
    Settings,
    from_infotext,
    is_open,
    is_used,
    preset_values,
    shown,
    type_of,
)
from lib_memnoise.webui.request import CONTROLS, SLOTS
from lib_memnoise.webui.ui.buttons import JS, Page

CUSTOM = Settings(preset="custom").resolved("sd1")


def initial(name: str) -> Any:
    """A control's first value: the setting's default, or Custom's value; "" for a setting that may be empty."""
    value = getattr(DEFAULTS, name)
    return "" if is_open(name) else shown(name, getattr(CUSTOM, name) if value is None else value)


def control(name: str, elem_id: str) -> Any:
    """The gradio component of a setting."""
    spec, value = SPECS[name], initial(name)
    common: dict[str, Any] = {"label": spec.label, "info": spec.help, "elem_id": elem_id, "value": value}
    if spec.choices is not None:
        # The labels are the values, since gradio 3.41's dropdown has no separate ones.
        return gr.Dropdown(choices=list(spec.choices.values()), **common)
    if type_of(name) is bool:
        return gr.Checkbox(**common)
    if is_open(name):
        return gr.Textbox(**common, placeholder="by the checkpoint's calibration", max_lines=1)
    if name == "lr":  # too fine for a slider
        return gr.Number(**common)
    return gr.Slider(minimum=spec.low, maximum=spec.high, step=spec.step, **common)


CHOOSING = ("method", "preset", "when", "guidance", "rule")
"""The dropdowns that decide which other controls are shown."""


def classes(name: str) -> list[str]:
    """The CSS classes by which the page's script shows and hides a control."""
    spec = SPECS[name]
    names = ["memnoise-custom"] if spec.preset else []
    if spec.methods:
        names += ["memnoise-part", *(f"memnoise-{method}" for method in spec.methods)]
    if spec.only is not None:
        names += ["memnoise-only", *(f"memnoise-only-{spec.only[0]}-{value}" for value in spec.only[1:])]
    for method, (other, *values) in (spec.only_with or {}).items():
        names += [f"memnoise-with-{method}", *(f"memnoise-with-{method}-{other}-{value}" for value in values)]
    return names


def build(elem_id: Callable[[str], str], page: Page) -> tuple[list[Any], list[tuple[Any, Any]]]:
    """Build the accordion.

    Returns:
        The components in the order of `SLOTS`, and pairs of a component and the function that a pasted infotext calls
        for it.
    """
    controls: dict[str, Any] = {}

    def add(name: str) -> None:
        controls[name] = control(name, elem_id(name))
        if name == "hires" and page.tab == "img2img":
            controls[name].visible = False
        if classes(name):
            controls[name].elem_classes = classes(name)

    with InputAccordion(False, label="Memnoise", elem_id=elem_id("enabled")) as enabled:
        gr.HTML(f"<div class='memnoise-labels' hidden data-labels='{labels()}'></div>", visible=True)
        with gr.Row():
            for name in ("method", "preset"):
                add(name)
        gr.HTML(hints(), elem_classes=["memnoise-hints"])
        with gr.Row():
            for name in ("when", "guidance"):
                add(name)
        with FormGroup():
            for name in CONTROLS:
                if SPECS[name].only is not None and not SPECS[name].advanced:
                    add(name)
        for methods in dict.fromkeys(SPECS[name].methods for name in CONTROLS if SPECS[name].methods):
            names = [name for name in CONTROLS if SPECS[name].methods == methods and not SPECS[name].advanced]
            if names:
                with FormGroup(elem_classes=["memnoise-part", *(f"memnoise-{method}" for method in methods)]):
                    for name in names:
                        add(name)
        with gr.Accordion("More", open=False, elem_id=elem_id("more")):
            for name in CONTROLS:
                if name not in controls:
                    add(name)
        unreadable = gr.Textbox(
            "",
            label="Pasted settings that could not be read (clear to go on with the values above)",
            visible=False,
            elem_id=elem_id("unreadable"),
        )
        options = gr.JSON(visible=False, label="options (API: a dict of settings)")
        surplus = gr.JSON(visible=False, label="(leave empty)")
        page.build(elem_id)

    chosen = [controls[name] for name in CHOOSING]
    for component in chosen:
        component.change(
            fn=None, inputs=chosen, outputs=[], **{JS: f"(...values) => memnoiseShow('{page.tab}', ...values)"}
        )

    slots = {"enabled": enabled, "options": options, "surplus": surplus, "unreadable": unreadable, **controls}
    restore: list[tuple[Any, Any]] = [(enabled, lambda params: from_infotext(params)[0]["enabled"])]
    restore += [(controls[name], restorer(name)) for name in CONTROLS]
    restore.append((unreadable, restore_unreadable))
    return [slots[name] for name in SLOTS], restore


def restorer(name: str) -> Callable[[Mapping[str, Any]], Any]:
    """A function that returns a control's value from a picture's infotext, or None to leave it. It never raises."""

    def restore(params: Mapping[str, Any]) -> Any:
        given, _ = from_infotext(params)
        if not given["enabled"]:
            return None
        if "preset" not in given and any(SPECS[other].preset for other in given):
            given["preset"] = "custom"  # the page has controls for a preset's values only with Custom
        # The host casts to the type of the control's first value, via float for whole numbers.
        value = shown(name, given[name]) if name in given else initial(name)
        return f"{value:g}" if is_open(name) and name in given else type(initial(name))(value)

    return restore


def restore_unreadable(params: Mapping[str, Any]) -> Any:
    """Show what could not be read of a pasted infotext, or hide the field."""
    problems = from_infotext(params)[1]
    return gr.update(value=" ".join(problems), visible=bool(problems))


def labels() -> str:
    """Data for the page's script, as JSON: each dropdown's values by label, and when each method starts guidance."""
    names: dict[str, Any] = {
        name: {label: key for key, label in (SPECS[name].choices or {}).items()} for name in CHOOSING
    }
    names["starts"] = {name: method.guidance for name, method in METHODS.items()}
    return html.escape(json.dumps(names), quote=True)


def hints() -> str:
    """HTML with a line for each method and for each preset's values; the page's script shows the chosen ones."""
    lines = [f"<p class='memnoise-part memnoise-{name}'>{method.help}</p>" for name, method in METHODS.items()]
    for preset in ("auto", "sd1", "sd2_v", "custom"):
        for method in METHODS:
            if not preset_line(preset, method):
                continue
            lines.append(
                f"<p class='memnoise-preset-hint memnoise-part memnoise-{method} memnoise-preset-{preset}'>"
                f"{preset_line(preset, method)}</p>"
            )
    return "".join(lines)


AUTO = (("sd1_like", "SD 1.x"), ("sd2_v_like", "SD 2.x v"), ("relative", "others"))
"""The presets that "auto" may stand for, and their labels."""
PUBLISHED_FOR = (("sd1", "SD 1.4's own file"), ("sd2_v", "SD 2.0 v's"))


def differs(preset: str, method: str) -> bool:
    """Whether the published checkpoint's target differs from that of other checkpoints of its kind."""
    return preset_line(preset, method) != preset_line(f"{preset}_like", method)


def preset_line(preset: str, method: str) -> str:
    """The values of a preset for a method, in one line; empty where there are none."""
    if preset == "custom":
        sd1_line = preset_line("sd1", method)
        return sd1_line and f"SD 1.x has {sd1_line}"
    if preset == "auto":
        lines = [f"{label}: {preset_line(key, method)}" for key, label in AUTO if preset_line(key, method)]
        known = [label for key, label in PUBLISHED_FOR if differs(key, method)]
        return "; ".join(lines) + (f"; on {' and '.join(known)}, the published targets" if known else "")
    values = preset_values(preset, method)
    names = [name for name in SPECS if SPECS[name].preset and is_used(name, {"method": method})]
    return ", ".join(
        f"{name} {values[name]}" + (" of the first" if name == "target" and values["target_kind"] == "fraction" else "")
        for name in names
        if name not in ("target_kind", "tau_of") and (name, values[name]) != ("opposite", 0)
    )


def settings_page() -> None:
    """Add the options to the host's settings page."""
    section = ("memnoise", "Memnoise")
    for key, default, label, info in (
        (
            "memnoise_fail_instead", False, "Fail instead of going on without",
            "always, whatever a generation asks for: an adjustment that fails makes the request fail",
        ),
        (
            "memnoise_page_note", True, "Say under each picture what memnoise did",
            "warnings and failures are always shown",
        ),
        (
            "memnoise_save_traces", False, "Save traces of the magnitude beside the pictures",
            "as JSON and PNG, where a generation traces it and its pictures are saved",
        ),
    ):  # fmt: skip
        shared.opts.add_option(key, shared.OptionInfo(default, label, section=section).info(info))
        # Otherwise an API request's override_settings would stay set after its call.
        shared.opts.data.setdefault(key, default)
