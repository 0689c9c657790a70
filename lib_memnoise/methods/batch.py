"""A method's input besides latents and Δ, and its result."""

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
    """What a method may use of a batch besides its latents and Δ."""

    parameterization: str
    """"eps" or "v": the network's native output, in which Δ is measured."""
    first: float = ALWAYS
    """T, the timestep of the first step."""
    alpha_bar: float = 0.0
    """ᾱ_T, the clean picture's share of the variance at the first timestep."""
    seeds: Sequence[int] = ()
    """The images' seeds. All random numbers of a method come from them, so that an image can be made again."""
    texts: Sequence[str] = ()
    """The images' prompts at the first step."""
    vocabulary: Callable[[], Sequence[str]] = tuple
    """The text encoder's ordinary tokens, as text; "" for a token that its own text is not encoded to."""
    tokens: Callable[[str], int | None] = lambda text: None
    """The number of tokens that a prompt is encoded to at the first step; None where it is not known."""
    on_progress: OnProgress = ignore_progress
    """Called with the method's progress as it goes on."""

    def factor(self, x: Tensor) -> float:
        """The factor by which ρ and an absolute target scale with the size of the latents x, `(B, C, H, W)`."""
        return size_factor(x[0].numel(), self.parameterization)

    def select(self, images: Sequence[int]) -> BatchContext:
        """The context of some images of the batch."""
        return replace(
            self,
            seeds=[self.seeds[i] for i in images] if self.seeds else (),
            texts=[self.texts[i] for i in images] if self.texts else (),
        )

    def generator(self, image: int, *purpose: int) -> torch.Generator:
        """A random generator from an image's seed, independent of the one that its noise was drawn from."""
        state = np.random.SeedSequence([self.seeds[image] % 2**64, *purpose]).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))

    def noise(self, x: Tensor, image: int, *purpose: int) -> Tensor:
        """Gaussian noise `(C, H, W)` from an image's seed, with the dtype and device of x. It is drawn on the CPU."""
        return torch.randn(x.shape[1:], generator=self.generator(image, *purpose)).to(x)


@dataclass(frozen=True)
class Prompt:
    """What replaces an image's prompt, in every step."""

    text: str | None = None
    """A text to encode instead."""
    pad_zero: bool = False
    """Whether the prompt and the negative prompt are padded with token 0 instead of the end token."""
    zero_end: bool = False
    """Whether the vector at the prompt's end token is set to zero."""
    vectors: Tensor | None = None
    """Vectors to use instead, `(parts, tokens, width)`."""
    attention: Attention | None = None
    """How the prompt is attended to; None means as usual."""


@dataclass
class Outcome:
    """A method's result: adjusted latents, and what it measured, `(B,)` each; None where it did not measure it."""

    x: Tensor
    """Adjusted latents x̃_T, `(B, C, H, W)`."""
    before: Tensor | None = None
    """‖Δ(x_T, T)‖."""
    after: Tensor | None = None
    """‖Δ(x̃_T, T)‖."""
    steps: Tensor | None = None
    """Optimiser steps taken."""
    norm: Tensor | None = None
    """‖x̃_T‖/√d."""
    used: dict[str, object] = field(default_factory=dict)
    """The values that took effect, after presets and scaling."""
    notes: dict[int, list[str]] = field(default_factory=dict)
    """Sentences for the metadata of each image that has any."""
    failed: dict[int, str] = field(default_factory=dict)
    """Images whose latent could not be adjusted and was left unchanged, and why."""
    prompts: dict[int, Prompt] = field(default_factory=dict)
    """Images whose prompt is replaced."""


def aimed(settings: ResolvedSettings, factor: float) -> tuple[float | Callable[[Tensor], Tensor], object]:
    """The target of a descent, as `adjust` takes it, and as the metadata show it.

    Args:
        factor: `BatchContext.factor`, by which an absolute target is scaled.
    """
    assert settings.target is not None
    value = settings.target
    if settings.target_kind == "fraction":
        return (lambda before: value * before), f"{value:g}x"
    return value * factor, value * factor


class DescentResult(Protocol):
    """How a batch's descents ended, `(B,)` each."""

    @property
    def reached(self) -> Tensor: ...

    @property
    def hopeless(self) -> Tensor: ...

    @property
    def steps(self) -> Tensor: ...


def missed_targets(result: DescentResult, what: str, most: int) -> dict[int, list[str]]:
    """A note for each image that did not reach its target.

    Args:
        what: the thing that was adjusted, in a word.
        most: the most steps that were allowed.
    """
    notes = {}
    for image, (ok, far, taken) in enumerate(
        zip(result.reached.tolist(), result.hopeless.tolist(), result.steps.tolist())
    ):
        if not ok:
            why = f", too slowly to reach it in {most}," if far else ""
            notes[image] = [f"the target was not reached in {taken} steps{why} and the image has the best {what} found"]
    return notes
