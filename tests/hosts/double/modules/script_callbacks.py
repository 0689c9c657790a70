"""Callbacks of extensions: registration, and calling them with exceptions logged and swallowed."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

from modules import errors, extensions


class ImageSaveParams:
    def __init__(self, image: Any, p: Any, filename: str, pnginfo: dict) -> None:
        self.image, self.p, self.filename, self.pnginfo = image, p, filename, pnginfo


class ExtraNoiseParams:
    def __init__(self, noise: Any, x: Any, xi: Any) -> None:
        self.noise, self.x, self.xi = noise, x, xi


class CFGDenoiserParams:
    """Inputs of the network at one step; what callbacks put in place of them is used."""

    def __init__(
        self,
        x: Any,
        image_cond: Any,
        sigma: Any,
        sampling_step: int,
        total_sampling_steps: int,
        text_cond: Any,
        text_uncond: Any,
        denoiser: Any = None,
    ) -> None:
        self.x, self.image_cond, self.sigma = x, image_cond, sigma
        self.sampling_step, self.total_sampling_steps = sampling_step, total_sampling_steps
        self.text_cond, self.text_uncond = text_cond, text_uncond
        self.denoiser = denoiser


class CFGDenoisedParams:
    """Outputs of the network, all rows, before they are combined."""

    def __init__(self, x: Any, sampling_step: int, total_sampling_steps: int, inner_model: Any) -> None:
        self.x, self.inner_model = x, inner_model
        self.sampling_step, self.total_sampling_steps = sampling_step, total_sampling_steps


class AfterCFGCallbackParams:
    def __init__(self, x: Any, sampling_step: int, total_sampling_steps: int) -> None:
        self.x, self.sampling_step, self.total_sampling_steps = x, sampling_step, total_sampling_steps


class UiTrainTabParams:
    def __init__(self, txt2img_preview_params: Any) -> None:
        self.txt2img_preview_params = txt2img_preview_params


class ImageGridLoopParams:
    def __init__(self, imgs: list, cols: int, rows: int) -> None:
        self.imgs, self.cols, self.rows = imgs, cols, rows


@dataclasses.dataclass
class BeforeTokenCounterParams:
    prompt: str
    steps: int
    styles: list
    is_positive: bool = True


@dataclasses.dataclass
class ScriptCallback:
    script: str
    callback: Any
    name: str = "unnamed"


# The event, and the name of the host's registration function for it.
_EVENTS = {
    "app_started": "on_app_started",
    "model_loaded": "on_model_loaded",
    "ui_tabs": "on_ui_tabs",
    "ui_train_tabs": "on_ui_train_tabs",
    "ui_settings": "on_ui_settings",
    "before_image_saved": "on_before_image_saved",
    "image_saved": "on_image_saved",
    "extra_noise": "on_extra_noise",
    "cfg_denoiser": "on_cfg_denoiser",
    "cfg_denoised": "on_cfg_denoised",
    "cfg_after_cfg": "on_cfg_after_cfg",
    "before_component": "on_before_component",
    "after_component": "on_after_component",
    "image_grid": "on_image_grid",
    "infotext_pasted": "on_infotext_pasted",
    "script_unloaded": "on_script_unloaded",
    "before_ui": "on_before_ui",
    "on_reload": "on_before_reload",
    "list_optimizers": "on_list_optimizers",
    "list_unets": "on_list_unets",
    "before_token_counter": "on_before_token_counter",
}
callback_map: dict[str, list[ScriptCallback]] = {f"callbacks_{event}": [] for event in _EVENTS}


def _calling_file() -> str:
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename == __file__:
        frame = frame.f_back  # type: ignore[assignment]
    return frame.f_code.co_filename if frame is not None else "unknown file"


def add_callback(
    callbacks: list[ScriptCallback],
    fun: Callable,
    *,
    name: str | None = None,
    category: str = "unknown",
    filename: str | None = None,
) -> None:
    filename = filename or _calling_file()
    extension = extensions.find_extension(filename)
    owner = extension.canonical_name if extension else "base"
    full = "/".join(filter(None, [owner, filename.replace("\\", "/").split("/")[-1], category, name]))
    taken = {x.name for x in callbacks}
    unique, n = full, 0
    while unique in taken:
        n += 1
        unique = f"{full}-{n}"
    callbacks.append(ScriptCallback(filename, fun, unique))


def ordered_callbacks(category: str, unordered_callbacks: list | None = None, **_: Any) -> list[ScriptCallback]:
    if unordered_callbacks is None:
        unordered_callbacks = callback_map[f"callbacks_{category}"]
    return list(unordered_callbacks)


def clear_callbacks() -> None:
    for callbacks in callback_map.values():
        callbacks.clear()


def remove_current_script_callbacks() -> None:
    """Remove everything that the calling file registered."""
    _remove(lambda x, filename=_calling_file(): x.script == filename)


def remove_callbacks_for_function(callback_func: Callable) -> None:
    _remove(lambda x: x.callback == callback_func)


def _remove(unwanted: Callable[[ScriptCallback], bool]) -> None:
    for callbacks in callback_map.values():
        callbacks[:] = [x for x in callbacks if not unwanted(x)]


def _call(event: str, *args: Any, reverse: bool = False, **kwargs: Any) -> list[Any]:
    results = []
    callbacks = ordered_callbacks(event)
    for c in reversed(callbacks) if reverse else callbacks:
        try:
            results.append(c.callback(*args, **kwargs))
        except Exception:
            errors.report(f"callback {event} of {c.script} failed", exc_info=True)
    return results


def _registrar(event: str, function: str) -> Callable:
    def register(callback: Callable, *, name: str | None = None) -> None:
        add_callback(callback_map[f"callbacks_{event}"], callback, name=name, category=event)

    register.__name__ = register.__qualname__ = function
    return register


for _event, _function in _EVENTS.items():
    globals()[_function] = _registrar(_event, _function)


def app_started_callback(demo: Any, app: Any) -> None:
    _call("app_started", demo, app)


def app_reload_callback() -> None:
    _call("on_reload")


def model_loaded_callback(sd_model: Any) -> None:
    _call("model_loaded", sd_model)


def ui_tabs_callback() -> list[Any]:
    return [tab for tabs in _call("ui_tabs") for tab in tabs or []]


def ui_settings_callback() -> None:
    _call("ui_settings")


def extra_noise_callback(params: ExtraNoiseParams) -> None:
    _call("extra_noise", params)


def cfg_denoiser_callback(params: CFGDenoiserParams) -> None:
    _call("cfg_denoiser", params)


def cfg_denoised_callback(params: CFGDenoisedParams) -> None:
    _call("cfg_denoised", params)


def cfg_after_cfg_callback(params: AfterCFGCallbackParams) -> None:
    _call("cfg_after_cfg", params)


def before_component_callback(component: Any, **kwargs: Any) -> None:
    _call("before_component", component, **kwargs)


def after_component_callback(component: Any, **kwargs: Any) -> None:
    _call("after_component", component, **kwargs)


def image_grid_callback(params: ImageGridLoopParams) -> None:
    _call("image_grid", params)


def infotext_pasted_callback(infotext: str, params: dict[str, Any]) -> None:
    _call("infotext_pasted", infotext, params)


def script_unloaded_callback() -> None:
    _call("script_unloaded", reverse=True)


def before_ui_callback() -> None:
    _call("before_ui", reverse=True)


def before_image_saved_callback(params: ImageSaveParams) -> None:
    _call("before_image_saved", params)


def image_saved_callback(params: ImageSaveParams) -> None:
    _call("image_saved", params)
