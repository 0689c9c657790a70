"""The table of hosts that patch a U-Net: where their functions are, and when they leave out unconditional rows."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from lib_memnoise.webui.backends.left_out_rows import StepNow, by_a1111, by_classic, by_reforge


@dataclass(frozen=True)
class PatcherHost:
    """One row of the table. Functions are named `module:function`."""

    host: str
    """The host's name and the version that the row was written for."""
    evaluate: str
    prepare: str
    compile: str
    compile_weighted: str
    condition: str
    leaves_out_uncond: Callable[[StepNow], bool]
    """Whether the host's denoiser leaves out the unconditional rows of a step ("skip early CFG", NGMS)."""
    lacks: str = ""
    """A module that this host does not have, unlike other hosts with the same functions."""

    def function(self, name: str) -> Any:
        """One of the host's functions, by the name of its field."""
        module, _, attribute = getattr(self, name).partition(":")
        return getattr(importlib.import_module(module), attribute)

    def is_here(self) -> bool:
        """Whether the row fits the running host."""
        modules = [getattr(self, name).partition(":")[0] for name in ("evaluate", "compile")]
        return all(map(_can_import, modules)) and not (self.lacks and _can_import(self.lacks))


def _can_import(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # a package above it is missing
        return False


_REFORGE = PatcherHost(
    "reForge 3b56b268",
    evaluate="ldm_patched.modules.samplers:calc_cond_uncond_batch",
    prepare="modules_forge.forge_sampler:sampling_prepare",
    compile="modules_forge.forge_sampler:cond_from_a1111_to_patched_ldm",
    compile_weighted="modules_forge.forge_sampler:cond_from_a1111_to_patched_ldm_weighted",
    condition="ldm_patched.modules.conds:CONDRegular",
    leaves_out_uncond=by_reforge,
)
HOSTS = (
    PatcherHost(
        "Forge dfdcbab6",
        evaluate="backend.sampling.sampling_function:calc_cond_uncond_batch",
        prepare="backend.sampling.sampling_function:sampling_prepare",
        compile="backend.sampling.condition:compile_conditions",
        compile_weighted="backend.sampling.condition:compile_weighted_conditions",
        condition="backend.sampling.condition:Condition",
        leaves_out_uncond=by_a1111,
    ),
    replace(_REFORGE, host="Forge Classic 1f95d717", leaves_out_uncond=by_classic, lacks="modules.sd_schedulers"),
    _REFORGE,
)
"""The first row that fits is the running host's. A new host's row goes above those that it shares modules with."""


@functools.cache
def host() -> PatcherHost:
    """The running host's row."""
    return next(row for row in HOSTS if row.is_here())
