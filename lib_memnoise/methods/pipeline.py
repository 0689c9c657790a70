"""What a mitigation did to a batch of initial latents, and the one way to run it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from lib_memnoise.core.delta import NORM_BOUND, Delta, magnitude, norm_ratio, select, working_precision
from lib_memnoise.core.guidance import ALWAYS, start_timestep
from lib_memnoise.core.progress import Tell, part, untold
from lib_memnoise.registry import METHODS
from lib_memnoise.settings import Settings, size_factor
from lib_memnoise.torch_utils.cross_attention import Attention


@dataclass(frozen=True)
class Initial:
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
    tell: Tell = untold
    """Is told how far a method is that takes its time."""

    def factor(self, x: Tensor) -> float:
        """By which ρ and an absolute target scale."""
        return size_factor(x[0].numel(), self.parameterization)

    def select(self, images: Sequence[int]) -> Initial:
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
    """What the network hears of an image instead of its prompt, in every step."""

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
    """Images whose prompt is heard otherwise."""


def aimed(settings: Settings, factor: float) -> tuple[float | Callable[[Tensor], Tensor], object]:
    """The target that resolved settings ask for, as the methods' `adjust` takes it, and how metadata show it."""
    assert settings.target is not None
    value = settings.target
    if settings.target_kind == "fraction":
        return (lambda before: value * before), f"{value:g}x"
    return value * factor, value * factor


class Ended(Protocol):
    """How the descents of a batch ended, `(B,)` each."""

    @property
    def reached(self) -> Tensor: ...

    @property
    def hopeless(self) -> Tensor: ...

    @property
    def steps(self) -> Tensor: ...


def missed(ended: Ended, what: str, most: int) -> dict[int, list[str]]:
    """A note for each image that has not reached its target."""
    notes = {}
    for image, (ok, far, taken) in enumerate(
        zip(ended.reached.tolist(), ended.hopeless.tolist(), ended.steps.tolist())
    ):
        if not ok:
            why = f", too slowly to reach it in {most}," if far else ""
            notes[image] = [f"the target was not reached in {taken} steps{why} and the image has the best {what} found"]
    return notes


def only_measures(settings: Settings) -> bool:
    """Whether the method evaluates Δ(x_T, T) and, as it is set, changes nothing."""
    s = settings
    return {
        "none": True,
        "per_sample": s.max_steps == 0,
        "prompt_embedding": s.max_steps == 0,
        "sail": s.max_steps == 0 and s.redraws == 0,
        "noise_selection": s.candidates == 1,
        "divin": s.eta == 0,
    }.get(s.method, False)


def run(x: Tensor, delta: Delta, settings: Settings, initial: Initial) -> Outcome:
    """Mitigate by the chosen method; what every host and the command line call.

    Args:
        x: initial latents x_T, `(B, C, H, W)`, unit variance.
        delta: Δ(x, T); see the methods' own `adjust` for what they ask of it.
        settings: resolved settings (`Settings.resolved`).
    """
    module = importlib.import_module(f"lib_memnoise.methods.{METHODS[settings.method].module or settings.method}")
    outcome: Outcome = module.mitigate(x, delta, settings, initial)
    if settings.start != "first":
        tau, share = start_timestep(settings, initial.first)
        outcome.used["tau" if settings.start == "tau" else "latest"] = tau
        if share is not None:
            outcome.used["tau_share"] = share
        if settings.opposite:
            outcome.used["opposite"] = settings.opposite

    finite = torch.isfinite(outcome.x).flatten(1).all(1)
    if outcome.before is not None:
        finite &= torch.isfinite(outcome.before)
    for image, prompt in outcome.prompts.items():
        if prompt.vectors is not None:
            finite[image] &= bool(torch.isfinite(prompt.vectors).all())
    outcome.x = torch.where(finite.reshape(-1, 1, 1, 1), outcome.x, x.to(outcome.x.dtype))
    outcome.norm = norm_ratio(outcome.x)
    for image, (ok, norm) in enumerate(zip(finite.tolist(), outcome.norm.tolist())):
        if not ok:
            outcome.failed[image] = "the network returned values that are not finite"
            outcome.notes.pop(image, None)
            outcome.prompts.pop(image, None)
        elif abs(norm - 1) > NORM_BOUND and not torch.equal(outcome.x[image], x[image].to(outcome.x.dtype)):
            outcome.notes.setdefault(image, []).append(
                f"the adjusted noise has {norm:.3f} times its usual length and may look wrong"
            )
    return outcome


@dataclass(frozen=True)
class Score:
    """Δ(x_T, T) of a batch, evaluated once: ‖Δ‖ is the score by which an image counts as memorised."""

    x: Tensor
    delta: Tensor

    @property
    def values(self) -> Tensor:
        """`(B,)`."""
        return magnitude(self.delta)


@dataclass(frozen=True)
class Choice:
    """Which images of a batch are mitigated, and what is known of all of them."""

    known: Score
    threshold: float | None
    """None: all are."""
    images: list[int]


@torch.no_grad()
def choose(x: Tensor, delta: Delta, settings: Settings, initial: Initial) -> Choice:
    """Evaluate Δ(x_T, T) once, by two network rows an image, and choose by it if the settings say so.

    Chosen are the images whose score is above the threshold, and those whose score is not finite; all where there is no
    threshold.
    """
    x = working_precision(x)
    known = Score(x, delta(x).to(x.dtype))
    if settings.when != "flagged" or settings.threshold is None:
        return Choice(known, None, list(range(len(x))))
    threshold = settings.threshold * initial.factor(x)
    return Choice(known, threshold, [i for i, value in enumerate(known.values.tolist()) if not value <= threshold])


@dataclass(frozen=True)
class Scored:
    """A Δ whose answer at x_T is known and need not be evaluated again, unless a gradient is wanted of it."""

    inner: Delta
    known: Score

    def __call__(self, x: Tensor) -> Tensor:
        if not x.requires_grad and torch.equal(x, self.known.x):
            return self.known.delta
        return self.inner(x)

    def select(self, images: list[int]) -> Delta:
        return replace(
            self, inner=select(self.inner, images), known=Score(self.known.x[images], self.known.delta[images])
        )


Runner = Callable[[Tensor, Delta, Initial], Outcome]
"""`run` with its settings, or another that mitigates everything it is given."""


def run_some(images: Sequence[int], x: Tensor, delta: Delta, initial: Initial, runner: Runner) -> Outcome:
    """Mitigate these images of a batch and leave the others as they are."""
    images = list(images)
    outcome = Outcome(working_precision(x))
    if not images:
        return outcome
    part = runner(x[images], select(delta, images), initial.select(images))
    outcome.x[images] = part.x
    for name in ("before", "after", "steps", "norm"):
        values = getattr(part, name)
        if values is not None:
            whole = values.new_full((len(x),), float("nan") if values.is_floating_point() else 0)
            whole[images] = values
            setattr(outcome, name, whole)
    outcome.used = part.used
    outcome.notes = {images[i]: notes for i, notes in part.notes.items()}
    outcome.failed = {images[i]: reason for i, reason in part.failed.items()}
    outcome.prompts = {images[i]: prompt for i, prompt in part.prompts.items()}
    return outcome


@dataclass
class Mitigated:
    """What became of a batch."""

    outcome: Outcome
    images: list[int]
    """The images that were mitigated; the others are as they were."""
    choice: Choice | None
    """The scores by which they were chosen; None: nothing was scored first."""


def is_measured_first(settings: Settings) -> bool:
    """Whether Δ(x_T, T) is evaluated for itself, before anything is adjusted."""
    return settings.when == "flagged" or only_measures(settings)


def mitigate(
    x: Tensor,
    delta: Delta,
    settings: Settings,
    context: Initial,
    *,
    images: Sequence[int] | None = None,
    with_gradient: Runner | None = None,
    on_choice: Callable[[Choice | None, list[int]], object] = lambda choice, images: None,
) -> Mitigated:
    """Score the images if that is asked for, choose by it, and adjust the chosen ones: what every front end calls.

    Args:
        x: initial latents x_T, `(B, C, H, W)`, unit variance.
        delta: Δ(x, T); see the methods' own `adjust` for what they ask of it.
        settings: resolved settings (`Settings.resolved`).
        images: the images in question; None: all.
        with_gradient: runs a method that needs gradients; None: `run`.
        on_choice: told of the choice and of the images to be mitigated, before anything is adjusted.
    """
    images = list(range(len(x)) if images is None else images)
    choice = None
    if is_measured_first(settings) and images:
        choice = choose(x, delta, settings, context)
        images = [i for i in images if i in choice.images]
    on_choice(choice, images)

    def runner(x: Tensor, delta: Delta, context: Initial) -> Outcome:
        return run(x, delta, settings, context)

    if METHODS[settings.method].needs_gradient and not only_measures(settings):
        # With a gradient, what is known of the score is of no use.
        asked, chosen = delta, with_gradient or runner
    else:
        asked, chosen = delta if choice is None else Scored(delta, choice.known), runner
    every = len(images) == len(x)
    outcome = chosen(x, asked, context) if every else run_some(images, x, asked, context, chosen)
    return Mitigated(outcome, images, choice)


def run_each(x: Tensor, delta: Delta, settings: Settings, initial: Initial) -> Outcome:
    """`run`, one image at a time: the least memory. Every image is on its own in any case."""
    images = [
        run(
            x[i : i + 1],
            select(delta, [i]),
            settings,
            replace(initial.select([i]), tell=part(initial.tell, i, len(x))),
        )
        for i in range(len(x))
    ]

    def joined(name: str) -> Tensor | None:
        values = [getattr(image, name) for image in images]
        return None if any(value is None for value in values) else torch.cat(values)

    latents = joined("x")
    assert latents is not None
    return Outcome(
        latents,
        before=joined("before"),
        after=joined("after"),
        steps=joined("steps"),
        norm=joined("norm"),
        used=images[0].used,
        notes={i: image.notes[0] for i, image in enumerate(images) if image.notes},
        failed={i: image.failed[0] for i, image in enumerate(images) if image.failed},
        prompts={i: image.prompts[0] for i, image in enumerate(images) if image.prompts},
    )
