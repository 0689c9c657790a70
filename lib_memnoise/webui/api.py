"""HTTP endpoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from fastapi import Body
from modules import call_queue, devices, shared

from lib_memnoise import __version__
from lib_memnoise.errors import echo
from lib_memnoise.settings import json_schema
from lib_memnoise.webui import payload
from lib_memnoise.webui.backends import detect
from lib_memnoise.webui.checkpoint import load_checkpoint, loads_late
from lib_memnoise.webui.request import Refusal
from lib_memnoise.webui.services import calibrations, json_request, scoring
from lib_memnoise.webui.services.traces import STORE


def with_http_errors(what: Callable[[], Any]) -> Any:
    """The return value of `what`; what it refuses becomes an HTTP error with one sentence."""
    try:
        return what()
    except scoring.REFUSALS as error:
        status = 409 if isinstance(error, scoring.Stopped) else 422
        raise Refusal(scoring.sentence_of(error), status) from None
    except RecursionError:
        # The host parses brackets in prompts by recursion.
        raise Refusal("memnoise: the prompt's brackets are nested too deeply.") from None
    except OverflowError:
        # It converts the numbers of prompt editing to whole ones.
        raise Refusal("memnoise: a number in the prompt is too large.") from None


def score(body: Any = Body(...)) -> Any:  # noqa: B008
    """`POST /memnoise/v1/score`: score images without generating them."""

    def run() -> Any:
        wanted = json_request.parse(body)
        with scoring.queued("memnoise-score"):
            return scoring.score_as_json(wanted)

    return with_http_errors(run)


def calibrate(body: Any = Body(default={})) -> Any:  # noqa: B008
    """`POST /memnoise/v1/calibrate`: score ordinary prompts on the loaded checkpoint, and save the calibration."""
    from lib_memnoise.webui.services import calibrating

    def run() -> Any:
        wanted = calibrating.parse(body)
        with scoring.queued("memnoise-calibration"):
            return calibrating.calibrate_as_json(*wanted)

    return with_http_errors(run)


def compare(body: Any = Body(...)) -> Any:  # noqa: B008
    """`POST /memnoise/v1/compare`: the same seeds with several methods, as a labelled grid and numbers."""
    from lib_memnoise.webui.services import comparison

    def run() -> Any:
        wanted = comparison.parse(body)
        with scoring.queued("memnoise-compare"):
            return comparison.compare_as_json(*wanted)

    return with_http_errors(run)


def list_calibrations() -> Any:
    """`GET /memnoise/v1/calibrations`: every saved calibration, without its scores."""
    return [scoring.summary(calibration) for calibration in calibrations.store().all()]


def about() -> Any:
    """`GET /memnoise/v1/about`: the version, the loaded checkpoint and the device."""
    if loads_late():
        with call_queue.queue_lock:
            load_checkpoint()
    info = getattr(shared.sd_model, "sd_checkpoint_info", None)
    if info is None:
        raise Refusal("memnoise: no checkpoint is loaded.", 503)
    backend = detect()
    weight = next(backend.unet.parameters())
    return {
        "memnoise": __version__,
        "checkpoint": info.name_for_extra,
        "hash": info.shorthash,
        "parameterization": backend.kind,
        "device": str(devices.get_optimal_device()),
        "dtype": str(weight.dtype).removeprefix("torch."),
    }


def peak_memory() -> Any:
    """`POST /memnoise/v1/peak_memory`: the peak of GPU memory since the last call, in bytes; null without CUDA."""
    device = devices.get_optimal_device()
    if device.type != "cuda":
        return {"bytes": None}
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return {"bytes": peak}


def trace(name: str) -> Any:
    """`GET /memnoise/v1/trace/{name}`: the traces of a generation's images, while they are kept."""
    document = STORE.get(name)
    if document is None:
        raise Refusal(f"memnoise: there is no trace {echo(name, 40)} (any more).", 404)
    return document


ROUTES: tuple[tuple[str, str, Callable[..., Any]], ...] = (
    ("GET", "about", about),
    ("GET", "schema", json_schema),
    ("POST", "score", score),
    ("POST", "calibrate", calibrate),
    ("POST", "compare", compare),
    ("POST", "peak_memory", peak_memory),
    ("GET", "calibrations", list_calibrations),
    ("GET", "trace/{name}", trace),
)


def register(_: Any, app: Any) -> None:
    """`on_app_started`: add endpoints under /memnoise/v1, for everyone who may use the host's own API.

    Without `--api` the host has no API, and nothing is added: the page does not need endpoints, and a password on the
    page (`--gradio-auth`) would not protect them. Where the host's API has a password (`--api-auth`), these endpoints
    require it as well.
    """
    host_route = next((route for route in app.routes if getattr(route, "path", "") == "/sdapi/v1/txt2img"), None)
    if host_route is None:
        return
    payload.watch(app)
    for method, path, endpoint in ROUTES:
        app.add_api_route(
            f"/memnoise/v1/{path}", endpoint, methods=[method], dependencies=list(host_route.dependencies)
        )
