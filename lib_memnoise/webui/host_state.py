"""Restores the host's state that evaluating its network changes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from modules import devices, shared


@contextlib.contextmanager
def left_as_it_was(p: Any) -> Iterator[None]:
    """A context that restores random state, infotext and the progress text at its end.

    An inpainting checkpoint uses the global random generator when its blank image is encoded, and a sampler writes
    infotext keys when it makes its schedule.
    """
    params, textinfo = dict(p.extra_generation_params), shared.state.textinfo
    device = devices.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            p.extra_generation_params.clear()
            p.extra_generation_params.update(params)
            shared.state.textinfo = textinfo
