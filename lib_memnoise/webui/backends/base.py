"""What a WebUI's backend can do besides evaluating its network."""

from __future__ import annotations

import abc
from typing import Any

from torch import Tensor

from lib_memnoise.sampling.backend import Backend, Composition, FirstStep
from lib_memnoise.sampling.cond_rows import Cond
from lib_memnoise.sampling.guider import GuidancePlan, Guider
from lib_memnoise.webui import failures


class WebuiBackend(Backend):
    """A backend whose generations are a WebUI's processing objects, called p."""

    def load(self, x: Tensor) -> None:
        """Load the model, leaving room for latents shaped like x; hosts that keep it loaded do nothing."""

    @abc.abstractmethod
    def first_step(self, p: Any, sampler: Any, x: Tensor) -> FirstStep:
        """The first evaluation of a pass. x: the clean latent where sampling starts from a picture, else the noise."""

    def composition(self, parts: Composition) -> Composition:
        """The prompts' parts as this host combines them."""
        return parts

    def padded(self, denoiser: Any, cond: Cond, uncond: Cond) -> tuple[Cond, Cond]:
        """Both conditions, of equal lengths where this host evaluates them so."""
        return cond, uncond

    def first_calls(self, p: Any, rows: int, images: int, *, equal: bool, sigma: float) -> tuple[tuple[int, int], ...]:
        """The calls in which the sampler's first step evaluates its rows, where that can be chosen.

        Each is a range of rows; rows are those of the prompts, then the unconditional rows.
        """
        return ()

    def is_used(self) -> bool:
        """Whether the network at hand carries an earlier pass's guider, and another one will be sampled with."""
        return False

    @abc.abstractmethod
    def guider(self, p: Any, denoiser: Any, plan: GuidancePlan) -> Guider:
        """A guider for the pass that this denoiser samples."""

    def raise_if_interrupted(self) -> None:
        # A direct call of the network bypasses the host's own check.
        failures.raise_if_interrupted()
