"""The interface of a backend, which evaluates the network that a host is about to sample with. It knows no host."""

from __future__ import annotations

import abc
import contextlib
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from lib_memnoise.sampling.cond_rows import Cond, Conditions

Evaluated = list[tuple[Conditions, Tensor]]
"""Conditions and outputs of the prompts' rows, the unconditional rows, and any others that the sampler will need."""
Composition = list[list[tuple[int, float]]]
"""For each image, the rows of its prompt's parts (AND), each with its weight."""


@dataclass(frozen=True)
class FirstStep:
    """The sampler's first evaluation: network input `(base + scale · noise) · c_in`."""

    t: float
    """T, the timestep that the network receives, 0…999."""
    at: Tensor
    """`(1,)`: the same time in the host network's own unit, a timestep or a sigma."""
    scale: float | Tensor
    """What the sampler multiplies the noise by."""
    c_in: float | Tensor = 1.0
    """What the sampler multiplies the network's input by."""
    base: float | Tensor = 0.0
    """0 in txt2img; the clean latent, scaled as the sampler scales it, where sampling starts from a picture."""
    sigma: float = float("inf")
    """The sigma that the sampler's denoiser receives; infinity where the denoiser counts in timesteps."""

    def network_input(self, noise: Tensor) -> Tensor:
        """The network's input for unit-variance noise, both `(B, C, H, W)`."""
        return (self.base + noise * self.scale) * self.c_in

    def cloned(self) -> FirstStep:
        """A copy that shares no tensors with this one."""
        tensors = {name: value.clone() for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors)  # type: ignore[arg-type]

    def select(self, images: list[int]) -> FirstStep:
        """The first step of some images of the batch."""
        return replace(self, base=self.base[images]) if isinstance(self.base, Tensor) else self


@dataclass(frozen=True, kw_only=True)
class DeltaQuery:
    """The conditions under which Δ(x, T) of a batch is evaluated."""

    step: FirstStep
    parts: Composition
    """For each image, the rows of `cond` that make up its prompt, with their weights."""
    cond: Cond
    uncond: Cond
    image_cond: Tensor
    images: list[int]
    """The indices of these images in the batch."""
    host_uncond: Cond = None
    """The host's own unconditional rows, where they differ from `uncond`."""
    unconditional: Tensor | None = None
    """The native outputs of the unconditional rows, where these have been evaluated already."""
    calls: tuple[tuple[int, int], ...] = ()
    """If given, the host's rows are evaluated in these calls, as they will be in its first step."""


class Backend(abc.ABC):
    """One host's way to evaluate its network. It has no state: the checkpoint is the one that the host has loaded.

    Methods with a body here have the default that suits a host without the feature in question.
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
        """ᾱ_t of the checkpoint's noise schedule; `t` is a timestep, 0…999."""

    @abc.abstractmethod
    def evaluate(self, query: DeltaQuery, inputs: Tensor, owners: list[int], cond: Cond) -> Evaluated:
        """Evaluate the prompts' rows and the unconditional rows.

        Args:
            inputs: the network's input, `(B, C, H, W)`.
            owners: the image that each row of `cond` belongs to.
            cond: the prompts' rows, in the order of the images.

        Returns:
            Conditions and outputs, `(rows, C, H, W)`: first of the prompts' rows, then of the unconditional rows.
        """

    @abc.abstractmethod
    def unconditional(self, query: DeltaQuery, inputs: Tensor) -> Tensor:
        """Outputs `(B, C, H, W)` of the unconditional rows alone."""

    def native(self, difference: Tensor, at: Tensor) -> Tensor:
        """Convert a difference of this backend's outputs to the network's native output."""
        return difference

    def padded(self, denoiser: Any, cond: Cond, uncond: Cond) -> tuple[Cond, Cond]:
        """Both conditions, padded to equal lengths where this host pads them."""
        return cond, uncond

    def load(self, x: Tensor) -> None:  # noqa: B027
        """Load the model, leaving room for latents shaped like x. A no-op in hosts that keep it loaded."""

    @abc.abstractmethod
    def state(self) -> tuple[Any, ...]:
        """Everything besides its input that the network's output depends on: equal states mean equal outputs."""

    @abc.abstractmethod
    def gradients(self) -> AbstractContextManager[None]:
        """A context in which x gets a gradient and nothing else does."""

    @abc.abstractmethod
    def raise_if_interrupted(self) -> None:
        """Raise `Interrupted` if the user has asked to interrupt or skip."""

    def is_patched(self) -> bool:
        """Whether other extensions have put functions of their own into the network.

        Such functions may rely on the rows that the host puts into a call, and on the order of its calls.
        """
        return False

    def is_doubtful(self) -> bool:
        """Whether functions of other extensions may depend on the step, or may have a wrong gradient or none."""
        return False

    def left_as_it_was(self) -> AbstractContextManager[None]:
        """A context in which another pass may be sampled without affecting this one."""
        return contextlib.nullcontext()
