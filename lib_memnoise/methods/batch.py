"""What a method is told of a batch of initial latents, and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from lib_memnoise.core.guidance import ALWAYS
from lib_memnoise.core.progress import OnProgress, ignore_progress
from lib_memnoise.settings import ResolvedSettings, size_factor
from lib_memnoise.torch_utils.cross_attention import Attention


@dataclass(frozen=True)
class BatchContext:
    """What a method may know of a batch besides its latents and Δ."""

    parameterization: str
    """"eps" or "v": the network's native output, in which Δ is measured."""
    first: float = ALWAYS
    """T: the timestep of the first step."""
    alpha_bar: float = 0.0
    """ᾱ_T: the share of the clean picture's variance at the first timestep."""
    seeds: Sequence[int] = ()
    """Of each image: what a method draws comes from it, so that the image can be made again."""
    texts: Sequence[str] = ()
    """Of each image: its prompt at the first step."""
    vocabulary: Callable[[], Sequence[str]] = tuple
    """The text encoder's ordinary tokens, as text; "" for one that is not what it is written as."""
    tokens: Callable[[str], int | None] = lambda text: None
    """How many tokens a prompt is encoded to at the first step; None where that cannot be told."""
    on_progress: OnProgress = ignore_progress
    """Is told how far a method is that takes its time."""

    def factor(self, x: Tensor) -> float:
        """By which ρ and an absolute target scale."""
        return size_factor(x[0].numel(), self.parameterization)

    def select(self, images: Sequence[int]) -> BatchContext:
        return replace(
            self,
            seeds=[self.seeds[i] for i in images] if self.seeds else (),
            texts=[self.texts[i] for i in images] if self.texts else (),
        )

    def generator(self, image: int, *purpose: int) -> torch.Generator:
        """Random numbers of an image's own, independent of those that its noise was drawn with."""
        state = np.random.SeedSequence([self.seeds[image] % 2**64, *purpose]).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))

    def noise(self, x: Tensor, image: int, *purpose: int) -> Tensor:
        """Gaussian noise `(C, H, W)` from an image's seed, like that image of x; drawn on the CPU on any device."""
        return torch.randn(x.shape[1:], generator=self.generator(image, *purpose)).to(x)


@dataclass(frozen=True)
class Prompt:
    """What the network is given of an image instead of its prompt, in every step."""

    text: str | None = None
    """Another text."""
    pad_zero: bool = False
    """Token 0 pads it, and the negative prompt, instead of the end token."""
    zero_end: bool = False
    """The vector at its end token is zero."""
    vectors: Tensor | None = None
    """Other vectors `(parts, tokens, width)`."""
    attention: Attention | None = None


@dataclass
class Outcome:
    """Adjusted latents `x` `(B, C, H, W)` and, where a method knows them, what it measured, `(B,)` each."""

    x: Tensor
    before: Tensor | None = None
    after: Tensor | None = None
    steps: Tensor | None = None
    norm: Tensor | None = None
    """‖x̃_T‖/√d."""
    used: dict[str, object] = field(default_factory=dict)
    """The values that took effect, after presets and scaling."""
    notes: dict[int, list[str]] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    """Images whose latent could not be adjusted and is as it was."""
    prompts: dict[int, Prompt] = field(default_factory=dict)
    """Images whose prompt is changed."""


def aimed(settings: ResolvedSettings, factor: float) -> tuple[float | Callable[[Tensor], Tensor], object]:
    """The target that resolved settings ask for, as the methods' `adjust` takes it, and how metadata show it."""
    assert settings.target is not None
    value = settings.target
    if settings.target_kind == "fraction":
        return (lambda before: value * before), f"{value:g}x"
    return value * factor, value * factor


class DescentResult(Protocol):
    """How the descents of a batch ended, `(B,)` each."""

    @property
    def reached(self) -> Tensor: ...

    @property
    def hopeless(self) -> Tensor: ...

    @property
    def steps(self) -> Tensor: ...


def missed(result: DescentResult, what: str, most: int) -> dict[int, list[str]]:
    """A note for each image that has not reached its target."""
    notes = {}
    for image, (ok, far, taken) in enumerate(
        zip(result.reached.tolist(), result.hopeless.tolist(), result.steps.tolist())
    ):
        if not ok:
            why = f", too slowly to reach it in {most}," if far else ""
            notes[image] = [f"the target was not reached in {taken} steps{why} and the image has the best {what} found"]
    return notes
