"""The table of hosts that patch a U-Net: where their functions are, and when they leave out unconditional rows."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from modules import shared


@dataclass(frozen=True)
class StepNow:
    """The facts about a step that decide whether the host leaves out its unconditional rows."""

    number: int
    total: int
    sigma: float
    handed_floor: float
    """NGMS's sigma, as it is passed to the sampler."""

    @property
    def progress(self) -> float:
        """The share of steps that are done, 0…1."""
        return self.number / self.total

    @property
    def early(self) -> float:
        """The option "skip early CFG"."""
        return float(getattr(shared.opts, "skip_early_cond", 0.0))

    def is_below(self, floor: float) -> bool:
        """Whether NGMS is on and the step's sigma is below its own."""
        return floor > 0 and self.sigma < floor

    def takes_turns(self, turn: int) -> bool:
        """Whether NGMS acts in this step, which it does in every other step or in all."""
        return self.number % 2 == turn or bool(getattr(shared.opts, "s_min_uncond_all", False))


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


def _forge(step: StepNow) -> bool:
    skips = step.early > 0 and step.progress <= step.early
    return skips or (step.is_below(step.handed_floor) and step.takes_turns(1))


def _reforge(step: StepNow) -> bool:
    skips = step.number < step.early or (step.early != 0 and step.progress <= step.early)
    floor = float(getattr(shared.opts, "s_min_uncond", 0.0))
    return skips or (step.is_below(floor) and step.takes_turns(0))


def _classic(step: StepNow) -> bool:
    # It sets the CFG scale to 1, which leaves the rows out. Its comparison is true of step 0 with the option at 0.
    return step.progress <= step.early or step.is_below(step.handed_floor)


HOSTS = (
    PatcherHost(
        "Forge dfdcbab6",
        evaluate="backend.sampling.sampling_function:calc_cond_uncond_batch",
        prepare="backend.sampling.sampling_function:sampling_prepare",
        compile="backend.sampling.condition:compile_conditions",
        compile_weighted="backend.sampling.condition:compile_weighted_conditions",
        condition="backend.sampling.condition:Condition",
        leaves_out_uncond=_forge,
    ),
    PatcherHost(
        "Forge Classic 1f95d717",
        evaluate="ldm_patched.modules.samplers:calc_cond_uncond_batch",
        prepare="modules_forge.forge_sampler:sampling_prepare",
        compile="modules_forge.forge_sampler:cond_from_a1111_to_patched_ldm",
        compile_weighted="modules_forge.forge_sampler:cond_from_a1111_to_patched_ldm_weighted",
        condition="ldm_patched.modules.conds:CONDRegular",
        leaves_out_uncond=_classic,
        lacks="modules.sd_schedulers",
    ),
    PatcherHost(
        "reForge 3b56b268",
        evaluate="ldm_patched.modules.samplers:calc_cond_uncond_batch",
        prepare="modules_forge.forge_sampler:sampling_prepare",
        compile="modules_forge.forge_sampler:cond_from_a1111_to_patched_ldm",
        compile_weighted="modules_forge.forge_sampler:cond_from_a1111_to_patched_ldm_weighted",
        condition="ldm_patched.modules.conds:CONDRegular",
        leaves_out_uncond=_reforge,
    ),
)
"""The first row that fits is the running host's. A new host's row goes above those that it shares modules with."""


@functools.cache
def host() -> PatcherHost:
    """The running host's row."""
    return next(row for row in HOSTS if row.is_here())
