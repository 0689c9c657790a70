"""Runs generations of our own inside one of the host's, before it samples."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from modules import devices, processing, rng, sd_models, shared

from lib_memnoise.webui import quirks

STATE = (
    "job", "job_no", "job_count", "processing_has_refined_job_count", "sampling_step", "sampling_steps",
    "current_latent", "current_image", "current_image_sampling_step", "id_live_preview", "textinfo",
)  # fmt: skip
"""The attributes of `shared.state` that hold a request's progress; not the user's wishes: interrupt, skip, stop."""

_NONE = object()


@contextlib.contextmanager
def host_set_aside(p: Any) -> Iterator[None]:
    """A context in which other generations may run from a `process` hook of p without affecting p's own.

    A skip within the context ends with it; an interrupt stays, and ends p's generation as well.
    """
    with contextlib.ExitStack() as stack:
        for kept in (progress, randomness, comments, lambda: patches(p)):
            stack.enter_context(kept())
        yield


@contextlib.contextmanager
def progress() -> Iterator[None]:
    """A context whose progress starts from zero. Afterwards p's progress is restored, without the time spent."""
    state = shared.state
    before = {name: getattr(state, name) for name in STATE if hasattr(state, name)}
    began, started = time.time(), getattr(state, "time_start", None)
    state.job_no = state.sampling_step = state.sampling_steps = state.current_image_sampling_step = 0
    state.current_latent = None
    state.time_start = began
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(state, name, value)
        state.time_start = None if started is None else started + time.time() - began
        state.skipped = False


@contextlib.contextmanager
def randomness() -> Iterator[None]:
    """A context that restores the state of all random generators at its end."""
    python_state, arrays, philox = random.getstate(), np.random.get_state(), getattr(rng, "nv_rng", _NONE)
    with torch.random.fork_rng([devices.device] if devices.device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(arrays)
            if philox is not _NONE:
                rng.nv_rng = philox


@contextlib.contextmanager
def comments() -> Iterator[None]:
    """A context that restores the text encoder's comments, which the host clears when a generation begins."""
    kept = [
        (holder, name, value)
        for holder in (getattr(processing, "model_hijack", None), shared.sd_model)
        for name in ("comments", "extra_generation_params")
        if (value := getattr(holder, name, _NONE)) is not _NONE
    ]
    try:
        yield
    finally:
        for holder, name, value in kept:
            setattr(holder, name, value)


@contextlib.contextmanager
def patches(p: Any) -> Iterator[None]:
    """A context that restores the network's patches for p: tiling, token merging, and the forks' own."""
    model = shared.sd_model
    names = ("forge_objects", "forge_objects_after_applying_lora")
    kept = {name: getattr(model, name) for name in names if hasattr(model, name)}
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(model, name, value)
        if quirks.has("tiles by a function"):
            processing.apply_circular_forge(model, p.tiling)
        else:
            processing.model_hijack.apply_circular(p.tiling)
        if not kept:  # the forks merge tokens by patches
            sd_models.apply_token_merging(model, p.get_token_merging_ratio())
