"""A backend evaluates the network that a host is about to sample with. This is its interface, free of any host."""

from __future__ import annotations

import abc
import contextlib
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from lib_memnoise.sampling.cond_rows import Cond, Conditions

Evaluated = list[tuple[Conditions, Tensor]]
"""Conditions and outputs: of the prompts' rows, of the unconditional rows, and of any others the sampler will need."""
Composition = list[list[tuple[int, float]]]
"""For each image, the rows of its prompt's parts (AND), each with its weight."""


@dataclass(frozen=True)
class FirstStep:
    """The sampler's first evaluation: network input `(base + scale · noise) · c_in`."""

    t: float
    """T, as the network receives it: a timestep, 0…999."""
    at: Tensor
    """`(1,)`, the time as the host's network takes it: a timestep or a sigma."""
    scale: float | Tensor
    c_in: float | Tensor = 1.0
    base: float | Tensor = 0.0
    """0 in txt2img; where sampling starts from a picture, its clean latent, scaled as the sampler scales it."""
    sigma: float = float("inf")
    """What the sampler's denoiser is given: a sigma, or infinity where it counts in timesteps."""

    def network_input(self, noise: Tensor) -> Tensor:
        return (self.base + noise * self.scale) * self.c_in

    def cloned(self) -> FirstStep:
        """The same with tensors of its own."""
        own = {name: value.clone() for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **own)  # type: ignore[arg-type]

    def select(self, images: list[int]) -> FirstStep:
        return replace(self, base=self.base[images]) if isinstance(self.base, Tensor) else self


@dataclass(frozen=True, kw_only=True)
class DeltaQuery:
    """What Δ(x, T) of a batch is evaluated under."""

    step: FirstStep
    parts: Composition
    """For each image, the rows of `cond` that are its prompt, with their weights."""
    cond: Cond
    uncond: Cond
    image_cond: Tensor
    images: list[int]
    """The places of these images in the batch."""
    host_uncond: Cond = None
    """The host's own unconditional rows, where they differ from `uncond`."""
    unconditional: Tensor | None = None
    """The native outputs of the unconditional rows, where they are known."""
    calls: tuple[tuple[int, int], ...] = ()
    """If given, the host's rows are evaluated in these calls, as its first step would."""


class Backend(abc.ABC):
    """One host's way to evaluate its network. Stateless: the checkpoint is the one the host has loaded.

    The methods with a body are right for hosts that have nothing of the kind.
    """

    @property
    @abc.abstractmethod
    def unet(self) -> nn.Module:
        """The network itself."""

    @property
    @abc.abstractmethod
    def kind(self) -> str:
        """The loaded checkpoint's native output: "eps", "v" or "flow"."""

    @abc.abstractmethod
    def alpha_bar(self, t: float) -> float:
        """ᾱ_t."""

    @abc.abstractmethod
    def evaluate(self, query: DeltaQuery, inputs: Tensor, owners: list[int], cond: Cond) -> Evaluated:
        """Evaluate the prompts' rows and the unconditional rows.

        Args:
            inputs: the network's input, `(B, C, H, W)`.
            owners: the image of each row of `cond`.
            cond: the prompts' rows, in the order of the images.
        """

    @abc.abstractmethod
    def unconditional(self, query: DeltaQuery, inputs: Tensor) -> Tensor:
        """Outputs of the unconditional rows alone."""

    def native(self, difference: Tensor, at: Tensor) -> Tensor:
        """Convert a difference of this backend's outputs to the network's native output."""
        return difference

    @abc.abstractmethod
    def state(self) -> tuple[Any, ...]:
        """Everything besides its input that an output depends on: equal states, equal outputs."""

    @abc.abstractmethod
    def gradients(self) -> AbstractContextManager[None]:
        """Within, x gets a gradient and nothing else does."""

    @abc.abstractmethod
    def raise_if_interrupted(self) -> None:
        """Raises `Interrupted` if the user asked to interrupt or skip."""

    def is_patched(self) -> bool:
        """Whether other extensions have put functions of their own into the network.

        These may count on the rows that the host has in a call, and on the order of calls.
        """
        return False

    def is_doubtful(self) -> bool:
        """Whether what other extensions put there may depend on the step, or lack a right gradient."""
        return False

    def left_as_it_was(self) -> AbstractContextManager[None]:
        """Within, another pass may be sampled without a trace in this one."""
        return contextlib.nullcontext()
