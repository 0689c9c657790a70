"""The network that the host samples with, and how it is asked.

Hosts differ in it, and are told apart by what their checkpoint has, not by their names: AUTOMATIC1111 (`compvis`)
calls the checkpoint's `apply_model`; hosts whose checkpoint has `forge_objects` patch a U-Net (`unet_patcher`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from modules import sd_models, shared
from torch import Tensor, nn

from lib_memnoise.sampling.cond_rows import Cond
from lib_memnoise.webui.sampler_start import FirstStep

Conditions = dict[str, Any]
"""What the network is given beside latents and time, a row for each row of latents."""
Evaluated = list[tuple[Conditions, Tensor]]
"""Conditions and outputs: of the prompts' rows, of the unconditional ones, and what else the sampler will ask for."""
Composition = list[list[tuple[int, float]]]
"""For each image, the rows of its prompt's parts (AND), each with its weight."""


class Network(Protocol):
    """A host's way to ask. Stateless: the checkpoint is the host's loaded one."""

    @property
    def unet(self) -> nn.Module:
        """The network itself."""

    @property
    def kind(self) -> str:
        """The loaded checkpoint's native output: "eps", "v" or "flow"."""

    def alpha_bar(self, t: float) -> float:
        """ᾱ_t."""

    def load(self, x: Tensor) -> None:
        """Have the network where it can be asked for latents like x."""

    def first_step(self, p: Any, sampler: Any, x: Tensor) -> FirstStep: ...

    def composition(self, parts: Composition) -> Composition:
        """The prompts' parts as this host hears them."""

    def padded(self, denoiser: Any, cond: Cond, uncond: Cond) -> tuple[Cond, Cond]:
        """Both conditions, of equal lengths where this host evaluates them so."""

    def first_calls(self, p: Any, rows: int, images: int, *, equal: bool, sigma: float) -> tuple[tuple[int, int], ...]:
        """The calls in which the sampler's first step evaluates its rows, where that can be chosen."""

    def evaluate(self, predictor: Any, inputs: Tensor, owners: list[int], cond: Cond) -> Evaluated:
        """The rows of a predictor's prompts and of what they are measured against."""

    def unconditional(self, predictor: Any, inputs: Tensor) -> Tensor:
        """Outputs of the unconditional rows alone."""

    def native(self, difference: Tensor, at: Tensor) -> Tensor:
        """A difference of outputs as one of the network's native outputs."""

    def state(self) -> tuple[Any, ...]:
        """What besides its input an answer depends on: equal states, equal answers."""

    def is_patched(self) -> bool:
        """Whether other extensions have put functions of their own into the network.

        These may count on the rows that the host has in a call, and on the order of calls.
        """

    def is_doubtful(self) -> bool:
        """Whether other extensions change what it computes: by the step for instance, or without a right gradient."""

    def is_used(self) -> bool:
        """Whether the network at hand carries an earlier pass's gate, and another will be sampled with."""

    def left_as_it_was(self) -> AbstractContextManager[None]:
        """Within, another pass may be sampled without a trace in this one."""

    def gradients(self) -> AbstractContextManager[None]:
        """Within, x gets a gradient and nothing else does."""

    def gate(self, *args: Any, **kwargs: Any) -> Any:
        """See `lib_memnoise.sampling.guider`."""


def network() -> Network:
    """The way to ask that fits the loaded checkpoint."""
    if hasattr(shared.sd_model, "forge_objects"):
        from lib_memnoise.webui.backends import unet_patcher

        return unet_patcher.NETWORK
    from lib_memnoise.webui.backends import compvis

    return compvis.NETWORK


def loads_late() -> bool:
    """Whether the host loads the chosen checkpoint only when it generates, as Forge does."""
    return hasattr(sd_models, "forge_model_reload")


def load_checkpoint() -> None:
    """Load the chosen checkpoint where that is not done yet; the caller holds the host's queue."""
    if loads_late():
        with contextlib.suppress(ValueError):  # there is none to choose
            sd_models.forge_model_reload()


def token_length(cond: Cond) -> int:
    return int(cond.shape[1])


def joined(first: Mapping[str, Any], second: Mapping[str, Any]) -> Conditions:
    """One condition dict for the rows of two."""
    return {
        key: [torch.cat(pair) for pair in zip(value, second[key])]
        if isinstance(value, list)
        else torch.cat([value, second[key]])
        for key, value in first.items()
    }
