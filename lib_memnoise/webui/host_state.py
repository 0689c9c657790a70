"""State of the host that evaluating its network touches."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from modules import devices, shared


@contextlib.contextmanager
def left_as_it_was(p: Any) -> Iterator[None]:
    """Random state and infotext that evaluating the network touches are for the host to change, not for us.

    An inpainting checkpoint draws from the global generator when its blank image is encoded, and asking a
    sampler for its schedule writes infotext keys.
    """
    params, said = dict(p.extra_generation_params), shared.state.textinfo
    device = devices.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            p.extra_generation_params.clear()
            p.extra_generation_params.update(params)
            shared.state.textinfo = said
