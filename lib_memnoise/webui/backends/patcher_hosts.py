"""The hosts that patch a U-Net, one row each: where their functions are, and when they leave out unconditional rows."""

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
    """A step that a host's denoiser is about to evaluate, as far as its rules look at it."""

    number: int
    total: int
    sigma: float
    handed_floor: float
    """NGMS's sigma, as the sampler is handed it."""

    @property
    def progress(self) -> float:
        return self.number / self.total

    @property
    def early(self) -> float:
        """The option "skip early CFG"."""
        return float(getattr(shared.opts, "skip_early_cond", 0.0))

    def is_below(self, floor: float) -> bool:
        return floor > 0 and self.sigma < floor

    def takes_turns(self, turn: int) -> bool:
        """Whether NGMS acts in this step: every other one, or all."""
        return self.number % 2 == turn or bool(getattr(shared.opts, "s_min_uncond_all", False))


@dataclass(frozen=True)
class PatcherHost:
    """One row of the table. Functions are named `module:function`."""

    host: str
    """With the version it was seen in."""
    evaluate: str
    prepare: str
    compile: str
    compile_weighted: str
    condition: str
    leaves_out_uncond: Callable[[StepNow], bool]
    """Whether a step evaluates no unconditional rows: "skip early CFG" and NGMS, as the host's denoiser has them."""
    lacks: str = ""
    """A module that tells it from others that share its functions: they have it."""

    def function(self, name: str) -> Any:
        module, _, attribute = getattr(self, name).partition(":")
        return getattr(importlib.import_module(module), attribute)

    def is_here(self) -> bool:
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
    # It sets the CFG scale to 1 there, which leaves them out. Its comparison lets step 0 in with the option at 0.
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
"""The first that is here is the host's. Add a row for another one, above those that it shares modules with."""


@functools.cache
def host() -> PatcherHost:
    return next(row for row in HOSTS if row.is_here())
