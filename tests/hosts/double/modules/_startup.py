"""Start the host: settings, extensions, scripts, page, API, in the host's order."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from modules import (
    _gradio_hooks,
    call_queue,
    extensions,
    processing,
    script_callbacks,
    scripts,
    sd_models,
    sd_samplers,
    shared,
    shared_cmd_options,
    ui,
)
from modules._record import record
from modules.api.api import Api


def start(extension_dirs: list[str], checkpoint: str, cmd_args: tuple[str, ...], settings: dict[str, Any]) -> FastAPI:
    """A freshly started host; an earlier one in this process ends without trace."""
    import gradio as gr

    shared_cmd_options.apply(cmd_args)
    shared.reset_settings()
    shared.opts.data = dict(settings)
    shared.state.__init__()  # type: ignore[misc]
    record.reset()
    call_queue.queue_lock = type(call_queue.queue_lock)() if call_queue.queue_lock.locked() else call_queue.queue_lock
    processing.reset_caches()
    sd_models.list_models()
    sd_models.model_data.__init__()  # type: ignore[misc]
    info = sd_models.get_closet_checkpoint_match(checkpoint)
    if info is None:
        raise ValueError(f"the double has no checkpoint {checkpoint!r}, only {[*sd_models.checkpoints_list]}")
    shared.opts.data["sd_model_checkpoint"] = info.title
    reload = call_queue.wrap_queued_call(lambda: sd_models.reload_model_weights())
    shared.opts.onchange("sd_model_checkpoint", reload, call=False)

    _gradio_hooks.install()
    sd_samplers.set_samplers()
    extensions.install(extension_dirs)
    scripts.load_scripts()
    sd_models.reload_model_weights()

    if shared.cmd_opts.nowebui:
        app = FastAPI()
        shared.demo = None
        Api(app, call_queue.queue_lock)
        script_callbacks.before_ui_callback()
        script_callbacks.app_started_callback(None, app)
        return app
    script_callbacks.before_ui_callback()
    shared.demo = ui.create_ui()
    shared.demo.auth = page_logins() or None
    app = gr.routes.App.create_app(shared.demo)
    if shared.cmd_opts.api:
        Api(app, call_queue.queue_lock)
    script_callbacks.app_started_callback(shared.demo, app)
    return app


def page_logins() -> list[tuple[str, ...]]:
    """User and password of everyone who may see the page; nobody: it is open."""
    pairs = (shared.cmd_opts.gradio_auth or "").split(",")
    return [tuple(pair.strip().split(":", 1)) for pair in pairs if pair.strip()]


def stop() -> None:
    script_callbacks.app_reload_callback()
    script_callbacks.script_unloaded_callback()
