"""Infotext: parsing it, and putting its values into fields of the page, settings and API requests."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from typing import Any

import gradio as gr
from modules import errors, prompt_parser, script_callbacks, shared

sys.modules["modules.generation_parameters_copypaste"] = sys.modules[__name__]

_PAIR = re.compile(
    r"""
    \s* (\w[\w\ \-/]+) : \s*           # the key
    ( "(?:\\.|[^\\"])+" | [^,]* )      # the value, quoted if it has commas
    (?: , | $ )
    """,
    re.X,
)
_SIZE = re.compile(r"(\d+)x(\d+)")
type_of_gr_update = type(gr.update())


class PasteField(tuple):
    """A component, and what fills it: the label of an infotext value, or a function of all of them."""

    component: Any
    label: str | None
    function: Callable | None
    api: str | None

    def __new__(cls, component: Any, target: Any, *, api: str | None = None) -> PasteField:
        self = super().__new__(cls, (component, target))
        self.component = component
        self.label = target if isinstance(target, str) else None
        self.function = target if callable(target) else None
        self.api = api
        return self


class ParamBinding:
    def __init__(
        self,
        paste_button: Any,
        tabname: str,
        source_text_component: Any = None,
        source_image_component: Any = None,
        source_tabname: str | None = None,
        override_settings_component: Any = None,
        paste_field_names: Any = None,
    ) -> None:
        self.paste_button = paste_button
        self.tabname = tabname
        self.source_text_component = source_text_component
        self.source_image_component = source_image_component
        self.source_tabname = source_tabname
        self.override_settings_component = override_settings_component
        self.paste_field_names = paste_field_names or []


paste_fields: dict[str, dict[str, Any]] = {}
registered_param_bindings: list[ParamBinding] = []
infotext_to_setting_name_mapping: list[tuple[str, str]] = []


def reset() -> None:
    paste_fields.clear()
    registered_param_bindings.clear()


def quote(text: Any) -> Any:
    """As JSON where a comma, colon or newline would confuse the parser; unchanged otherwise."""
    return json.dumps(text, ensure_ascii=False) if re.search("[,:\n]", str(text)) else text


def unquote(text: str) -> Any:
    if len(text) > 0 and text[0] == text[-1] == '"':
        try:
            return json.loads(text)
        except ValueError:
            pass
    return text


def add_paste_fields(tabname: str, init_img: Any, fields: list, override_settings_component: Any = None) -> None:
    for i, target in enumerate(fields or []):
        if not isinstance(target, PasteField):
            fields[i] = PasteField(*target)
    paste_fields[tabname] = {
        "init_img": init_img,
        "fields": fields,
        "override_settings_component": override_settings_component,
    }


def register_paste_params_button(binding: ParamBinding) -> None:
    registered_param_bindings.append(binding)


def connect_paste_params_buttons() -> None:
    for binding in registered_param_bindings:
        tab = paste_fields[binding.tabname]
        if binding.source_text_component is not None and tab["fields"] is not None:
            connect_paste(
                binding.paste_button,
                tab["fields"],
                binding.source_text_component,
                tab["override_settings_component"],
                binding.tabname,
            )


# What a missing value means, where that differs from "leave the field alone".
_ASSUMED: dict[str, Any] = {
    "Clip skip": "1",
    "Hires resize-1": 0,
    "Hires resize-2": 0,
    "Hires sampler": "Use same sampler",
    "Hires schedule type": "Use same scheduler",
    "Hires checkpoint": "Use same checkpoint",
    "Hires prompt": "",
    "Hires negative prompt": "",
    "Mask mode": "Inpaint masked",
    "Masked content": "original",
    "Inpaint area": "Whole picture",
    "Masked area padding": 32,
    "RNG": "GPU",
    "Schedule type": "Automatic",
    "Schedule max sigma": 0,
    "Schedule min sigma": 0,
    "Schedule rho": 0,
    "VAE Encoder": "Full",
    "VAE Decoder": "Full",
    "FP8 weight": "Disable",
    "Refiner switch by sampling steps": False,
}


def parse_generation_parameters(x: str, skip_fields: list[str] | None = None) -> dict[str, Any]:
    """The values of an infotext, as text; sizes `AxB` become two values, `… -1` and `… -2`."""
    lines = x.strip().split("\n")
    found = _PAIR.findall(lines[-1])
    if len(found) >= 3:
        lines.pop()
    else:
        found = []

    texts: dict[str, list[str]] = {"Prompt": [], "Negative prompt": []}
    part = "Prompt"
    for line in lines:
        line = line.strip()
        if line.startswith("Negative prompt:"):
            part = "Negative prompt"
            line = line[len("Negative prompt:") :].strip()
        if line or texts[part]:
            texts[part].append(line)

    result: dict[str, Any] = {}
    for key, value in found:
        if not value:
            continue
        value = unquote(value)
        size = _SIZE.fullmatch(value) if isinstance(value, str) else None
        if size:
            result[f"{key}-1"], result[f"{key}-2"] = size.groups()
        else:
            result[key] = value
    result.update({key: "\n".join(parts) for key, parts in texts.items()})

    for key, value in _ASSUMED.items():
        result.setdefault(key, value)
    emphasis = [
        piece
        for text in (result["Prompt"], result["Negative prompt"])
        for piece in prompt_parser.parse_prompt_attention(text)
    ]
    if any(weight != 1.0 and text != "BREAK" for text, weight in emphasis):
        result.setdefault("Emphasis", "Original")
    for key in shared.opts.infotext_skip_pasting if skip_fields is None else skip_fields:
        result.pop(key, None)
    return result


def _settings_in(params: dict[str, Any]) -> list[tuple[str, str, Any]]:
    named = [(info.infotext, name) for name, info in shared.opts.data_labels.items() if info.infotext]
    pairs = named + infotext_to_setting_name_mapping
    return [
        (label, name, shared.opts.cast_value(name, params[label]))
        for label, name in pairs
        if params.get(label) is not None
    ]


def create_override_settings_dict(text_pairs: list[str]) -> dict[str, Any]:
    """`["Clip skip: 2"]` to `{"CLIP_stop_at_last_layers": 2}`."""
    split = (pair.split(":", maxsplit=1) for pair in text_pairs)
    return {name: value for _, name, value in _settings_in({key: value.strip() for key, value in split})}


def get_override_settings(params: dict[str, Any], *, skip_fields: Any = None) -> list[tuple[str, str, Any]]:
    """Settings in an infotext that differ from those in force: (label, setting, value)."""
    opts = shared.opts
    return [
        (label, name, value)
        for label, name, value in _settings_in(params)
        if label not in (skip_fields or {})
        and not (name == "sd_model_checkpoint" and opts.disable_weights_auto_swap)
        and value != getattr(opts, name, None)
    ]


def paste_updates(infotext: str, fields: list) -> list[Any]:
    """What the page's paste button sets each of these fields to."""
    params = parse_generation_parameters(infotext)
    script_callbacks.infotext_pasted_callback(infotext, params)
    updates = []
    for component, target in fields:
        value = params.get(target) if not callable(target) else None
        if callable(target):
            try:
                value = target(params)
            except Exception:
                errors.report(f"paste function {target} failed", exc_info=True)
        if value is None:
            updates.append(gr.update())
        elif isinstance(value, type_of_gr_update):
            updates.append(value)
        else:
            try:
                updates.append(gr.update(value=_cast(value, type(component.value))))
            except Exception:
                updates.append(gr.update())
    return updates


def _cast(value: Any, kind: type) -> Any:
    if kind is bool and value == "False":
        return False
    return float(value) if kind is int else kind(value)


def connect_paste(
    button: Any, paste_fields: list, input_comp: Any, override_settings_component: Any, tabname: str
) -> None:
    fields = list(paste_fields)
    if override_settings_component is not None:
        handled = {target for _, target in fields}

        def settings(params: dict[str, Any]) -> Any:
            pairs = [f"{label}: {value}" for label, _, value in get_override_settings(params, skip_fields=handled)]
            return gr.Dropdown.update(value=pairs, choices=pairs, visible=bool(pairs))

        fields.append((override_settings_component, settings))
    button.click(
        fn=lambda text: paste_updates(text, fields),
        inputs=[input_comp],
        outputs=[x for x, _ in fields],
        show_progress=False,
    )
