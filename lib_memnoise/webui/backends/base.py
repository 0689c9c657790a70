"""The interface of a WebUI's backend, which adds to evaluating its network what a pass needs to know of its sampler."""

from __future__ import annotations

import abc
from typing import Any

from torch import Tensor

from lib_memnoise.sampling.backend import Backend, Composition, FirstStep
from lib_memnoise.sampling.guider import GuidancePlan, Guider
from lib_memnoise.webui import failures


class WebuiBackend(Backend):
    """A backend for a WebUI, whose generations are processing objects called p."""

    @abc.abstractmethod
    def first_step(self, p: Any, sampler: Any, x: Tensor) -> FirstStep:
        """The first evaluation of a pass.

        Args:
            x: the clean latent where sampling starts from a picture, otherwise the noise, `(B, C, H, W)`.
        """

    def composition(self, parts: Composition) -> Composition:
        """The prompts' parts as this host combines them."""
        return parts

    def first_calls(self, p: Any, rows: int, images: int, *, equal: bool, sigma: float) -> tuple[tuple[int, int], ...]:
        """The calls in which the sampler's first step evaluates its rows; empty where they cannot be reproduced.

        Each call is a range of rows, which are the prompts' rows followed by the unconditional rows.

        Args:
            rows: the number of the prompts' rows.
            images: the number of images.
            equal: whether the prompts' condition and the unconditional one have equal lengths.
            sigma: the sigma of the first step.
        """
        return ()

    def is_used(self) -> bool:
        """Whether the current network carries an earlier pass's guider, so that another one will be sampled with."""
        return False

    @abc.abstractmethod
    def guider(self, p: Any, denoiser: Any, plan: GuidancePlan) -> Guider:
        """A guider for the pass that this denoiser samples."""

    def raise_if_interrupted(self) -> None:
        # Calling the network directly bypasses the host's own check.
        failures.raise_if_interrupted()
