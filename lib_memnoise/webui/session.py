"""The inventory of attributes that memnoise puts on the host's objects: who reads them, and when they go.

Besides these, methods of the host's objects are replaced for one generation: `p.init` and `p.sampler.sample` where a
request is to fail, and the network wrapper's `forward` and `inner_model` while a `WrapperGuider` is attached. The app's
API object has its `init_script_args` replaced for the life of the app (`payload`).
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

from lib_memnoise.core.report import Generation
from lib_memnoise.sampling.guider import Guider
from lib_memnoise.settings import Settings

GENERATION = "memnoise"
OWNER = "memnoise_owner"
LOOKS = "memnoise_looks"
PLOT = "memnoise_plot"
REFUSED = "memnoise_refused"
FAILED_CELLS = "memnoise_failed_cells"
GUIDER = "memnoise_guider"
INNER = "memnoise_inner"


@dataclass(frozen=True)
class Attribute:
    """One row of the inventory."""

    on: str
    holds: str
    read_by: str
    goes: str


ATTRIBUTES = {
    GENERATION: Attribute("p", "the `Generation`", "hooks, services.comparison", "with p, or its next generation"),
    OWNER: Attribute("p", "a weak reference to p", "`generation_of`, which tells p from its copies", "with p"),
    LOOKS: Attribute("p", "that ‖Δ‖ of the first step is wanted", "`begin_generation`", "with p"),
    PLOT: Attribute("a plot cell's p", "what its axes set, by name", "request", "with the cell"),
    REFUSED: Attribute("p", "why its plot was left out, so that p itself can say so", "request", "with p"),
    FAILED_CELLS: Attribute("p, shared by its plot's cells", "why cells failed", "failures", "with p"),
    GUIDER: Attribute("a denoiser", "the pass's `Guider`", "hooks.on_cfg_denoiser", "with its next pass"),
    INNER: Attribute("the function that wraps a U-Net", "what it wraps", "backends", "with the pass's U-Net"),
}


def clear(p: Any) -> None:
    """Forget an earlier generation of p."""
    setattr(p, GENERATION, None)


def begin_generation(p: Any, settings: Settings) -> None:
    """Begin a generation that belongs to p."""
    generation = Generation(settings)
    generation.looks_at_first = getattr(p, LOOKS, False)
    setattr(p, GENERATION, generation)
    setattr(p, OWNER, weakref.ref(p))


def generation_of(p: Any) -> Generation | None:
    """The generation that was begun for this very object. A copy of p has the original's attribute, but gets None."""
    generation: Generation | None = getattr(p, GENERATION, None)
    return generation if generation is not None and getattr(p, OWNER)() is p else None


def put_guider(denoiser: Any, guider: Guider) -> None:
    """Attach a pass's guider to its denoiser."""
    setattr(denoiser, GUIDER, guider)


def guider_of(denoiser: Any) -> Guider | None:
    """The guider that is attached to a denoiser."""
    guider: Guider | None = getattr(denoiser, GUIDER, None)
    return guider


def remove_guider(denoiser: Any) -> None:
    """Remove an earlier pass's guider from a denoiser that is used again."""
    guider = guider_of(denoiser)
    if guider is not None:
        guider.detach()
        delattr(denoiser, GUIDER)
