"""The one pipeline: score the images, choose, adjust, set when guidance starts. Every front end calls `mitigate`."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lib_memnoise.core.delta import NORM_BOUND, Delta, magnitude, norm_ratio, select, working_precision
from lib_memnoise.core.guidance import ALWAYS, Start, make_start, start_timestep
from lib_memnoise.core.progress import part_of_progress
from lib_memnoise.core.report import ImageReport
from lib_memnoise.methods.batch import BatchContext, Outcome
from lib_memnoise.registry import METHODS
from lib_memnoise.settings import ResolvedSettings, Settings


def only_measures(settings: Settings) -> bool:
    """Whether the method, with these settings, evaluates Δ(x_T, T) and changes nothing."""
    s = settings
    return {
        "none": True,
        "per_sample": s.max_steps == 0,
        "prompt_embedding": s.max_steps == 0,
        "sail": s.max_steps == 0 and s.redraws == 0,
        "noise_selection": s.candidates == 1,
        "divin": s.eta == 0,
        "repulsion": s.beta == 0,
    }.get(s.method, False)


def needs_gradient(settings: Settings) -> bool:
    """Whether the method, as it is set, back-propagates through the network."""
    return METHODS[settings.method].needs_gradient and settings.rule != "forward"


def run(x: Tensor, delta: Delta, settings: ResolvedSettings, context: BatchContext) -> Outcome:
    """Run the method that the settings name on a whole batch, and check its result.

    Args:
        x: initial latents x_T, `(B, C, H, W)`, unit variance.
        delta: Δ(x, T); each method's `adjust` says what it needs of it.
        settings: resolved settings (`Settings.resolved`).

    Returns:
        The outcome. An image whose values are not finite keeps its latent and is listed in `failed`.

    Raises:
        TypeError: the settings are not resolved.
    """
    if not isinstance(settings, ResolvedSettings):
        raise TypeError("settings are to be resolved first (`Settings.resolved`)")
    module = importlib.import_module(f"lib_memnoise.methods.{METHODS[settings.method].module or settings.method}")
    outcome: Outcome = module.mitigate(x, delta, settings, context)
    if settings.start != "first":
        tau, share = start_timestep(settings, context.first)
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
    """Δ(x_T, T) of a batch, evaluated once. ‖Δ‖ is the score by which an image counts as memorised."""

    x: Tensor
    delta: Tensor

    @property
    def values(self) -> Tensor:
        """The scores ‖Δ(x_T, T)‖, `(B,)`."""
        return magnitude(self.delta)


@dataclass(frozen=True)
class Choice:
    """Which images of a batch are mitigated, and the scores of all of them."""

    known: Score
    threshold: float | None
    """The score above which an image is mitigated; None where all are."""
    images: list[int]
    """The images that are mitigated."""


@torch.no_grad()
def choose(x: Tensor, delta: Delta, settings: ResolvedSettings, context: BatchContext) -> Choice:
    """Evaluate Δ(x_T, T) once, and choose images by their scores if the settings say so.

    The images chosen are those whose score is above the threshold or is NaN; without a threshold, all of them. Cost:
    two network rows for each image.
    """
    x = working_precision(x)
    known = Score(x, delta(x).to(x.dtype))
    if settings.when != "flagged" or settings.threshold is None:
        return Choice(known, None, list(range(len(x))))
    threshold = settings.threshold * context.factor(x)
    return Choice(known, threshold, [i for i, value in enumerate(known.values.tolist()) if not value <= threshold])


@dataclass(frozen=True)
class Scored:
    """A Δ whose value at x_T is known and need not be evaluated again, unless its gradient is needed."""

    inner: Delta
    known: Score

    def __call__(self, x: Tensor) -> Tensor:
        if not x.requires_grad and torch.equal(x, self.known.x):
            return self.known.delta
        return self.inner(x)

    def select(self, images: list[int]) -> Delta:
        """The Δ of some images of the batch."""
        return replace(
            self, inner=select(self.inner, images), known=Score(self.known.x[images], self.known.delta[images])
        )


Runner = Callable[[Tensor, Delta, BatchContext], Outcome]
"""Mitigates every image of a batch: `run` with its settings, or a front end's own function."""


def run_some(images: Sequence[int], x: Tensor, delta: Delta, context: BatchContext, runner: Runner) -> Outcome:
    """Mitigate these images of a batch and leave the others unchanged."""
    images = list(images)
    outcome = Outcome(working_precision(x))
    if not images:
        return outcome
    part = runner(x[images], select(delta, images), context.select(images))
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
    """The result of the pipeline. The noise to sample is `outcome.x`."""

    outcome: Outcome
    starts: list[Start]
    """When guidance starts, for each image. They serve for one sampling; `starts_of` makes new ones."""


def is_measured_first(settings: Settings) -> bool:
    """Whether Δ(x_T, T) is evaluated on its own, before anything is adjusted."""
    return settings.when == "flagged" or only_measures(settings)


def starts_of(
    reports: Sequence[ImageReport], settings: ResolvedSettings, first: float, guidance: float = math.inf
) -> list[Start]:
    """When guidance starts, for every image of a pass that begins at the timestep `first`.

    Args:
        guidance: the scale w of ε_uncond + w·Δ. Up to 1 there is no guidance to hold back.
    """
    guided = is_guided(settings, guidance)
    return [make_start(settings, first) if guided and not report.left_alone else Start() for report in reports]


def is_guided(settings: ResolvedSettings, guidance: float) -> bool:
    """Whether there is guidance to hold back, or to reverse."""
    return guidance > 1 or (settings.start != "first" and bool(settings.opposite))


def mitigate(
    x: Tensor,
    delta: Delta,
    settings: ResolvedSettings,
    context: BatchContext,
    *,
    reports: Sequence[ImageReport],
    guidance: float = math.inf,
    with_gradient: Runner | None = None,
    on_choice: Callable[[], object] = lambda: None,
    on_outcome: Callable[[Outcome], object] = lambda outcome: None,
) -> Mitigated:
    """Score the images if the settings ask for it, choose among them, adjust the chosen ones and fill in their reports.

    Args:
        x: initial latents x_T, `(B, C, H, W)`, unit variance.
        delta: Δ(x, T); each method's `adjust` says what it needs of it.
        settings: resolved settings (`Settings.resolved`).
        reports: one for each image. Images that are `left_alone` already are not changed. Everything is filled in but
            the network rows, which are counted where the network is evaluated.
        guidance: the scale w of ε_uncond + w·Δ.
        with_gradient: runs a method that needs gradients; None means `run`.
        on_choice: called when the images have been chosen, before anything is adjusted.
        on_outcome: called with the method's outcome before the reports are filled in. If it raises, they are not.
    """
    images = [i for i, report in enumerate(reports) if not report.left_alone]
    choice = None
    if is_measured_first(settings) and images:
        choice = choose(x, delta, settings, context)
        images = [i for i in images if i in choice.images]
        for i, report in enumerate(reports):
            report.threshold, report.left_alone = choice.threshold, i not in images
    elif settings.when == "flagged":
        for report in reports:
            report.threshold = None if settings.threshold is None else settings.threshold * context.factor(x)
    on_choice()

    def runner(x: Tensor, delta: Delta, context: BatchContext) -> Outcome:
        return run(x, delta, settings, context)

    if needs_gradient(settings) and not only_measures(settings):
        # A known score has no gradient, so it cannot spare an evaluation here.
        scored, method_runner = delta, with_gradient or runner
    else:
        scored, method_runner = delta if choice is None else Scored(delta, choice.known), runner
    every = len(images) == len(x)
    outcome = method_runner(x, scored, context) if every else run_some(images, x, scored, context, method_runner)
    on_outcome(outcome)
    starts = starts_of(reports, settings, context.first, guidance)
    fill_reports(reports, outcome)
    guided = is_guided(settings, guidance)
    for report, start in zip(reports, starts):
        note_effects(report, outcome, start, context.first, guided, guidance)
    return Mitigated(outcome, starts)


def fill_reports(reports: Sequence[ImageReport], outcome: Outcome) -> None:
    """Copy a method's measurements, notes and failures into the images' reports."""
    for name in ("before", "after", "steps", "norm"):
        values = getattr(outcome, name)
        if values is not None:
            for report, value in zip(reports, values.tolist()):
                if not report.left_alone:
                    setattr(report, name, value)
    for image, notes in outcome.notes.items():
        for note in notes:
            reports[image].note(note)
    for image, reason in outcome.failed.items():
        reports[image].failed = reason
    for image, prompt in outcome.prompts.items():
        reports[image].prompt = prompt.text


def note_effects(
    report: ImageReport, outcome: Outcome, start: Start, first: float, guided: bool, guidance: float
) -> None:
    """Report the values that took effect on an image, and settings that cannot have an effect."""
    if not report.left_alone:
        report.used = {**outcome.used, "T": first}
    if start.tau < ALWAYS and not start.is_off(first):
        name = "latest" if start.at_transition else "tau"
        report.note(f"guidance is never off: the first timestep {first:g} is not above {name} {start.tau:g}")
    if not guided and not report.left_alone:
        report.note(f"the CFG scale {guidance:g} is no guidance, so there is none to hold back")


def run_each(x: Tensor, delta: Delta, settings: ResolvedSettings, context: BatchContext) -> Outcome:
    """`run`, one image at a time, which takes the least memory. Results are the same: no image depends on another."""
    images = [
        run(
            x[i : i + 1],
            select(delta, [i]),
            settings,
            replace(context.select([i]), on_progress=part_of_progress(context.on_progress, i, len(x))),
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
