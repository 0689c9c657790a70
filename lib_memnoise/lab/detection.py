"""How well scores at (x_T, T) tell the miniature's memorised prompts from ordinary ones, on prompts held out.

‖Δ‖ of one noise is the score of Wen et al. (2024). What else the same two rows hold, and more noises, is put beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from lib_memnoise.core.calibration import Calibration, Key
from lib_memnoise.core.delta import magnitude
from lib_memnoise.lab.claims import NONE, ordinary_subjects
from lib_memnoise.lab.experiment import Subject, first_predictions, seed_of, subjects
from lib_memnoise.lab.miniature.model import Miniature
from lib_memnoise.lab.simulator import generate, noises
from lib_memnoise.lab.stats import RESAMPLES, Values, auc, interval
from lib_memnoise.settings import Settings, size_factor

RATE = 0.01
"""The false-positive rate at which true positives are counted."""
NOISES = (1, 2, 4, 8)
MOST = max(NOISES)


@dataclass(frozen=True)
class Scores:
    """Of the noises of every image, `(S, I, MOST)`: S subjects, I images each."""

    magnitude: Values
    """‖Δ(x_T, T)‖."""
    cosine: Values
    """cos(Δ, ε_uncond)."""

    def of(self, name: str, ordinary: Scores) -> Values:
        """A measure by name, high for memorised prompts; `ordinary` gives the scales on which two are added."""
        parts = {"magnitude": [self.magnitude], "cosine": [self.cosine], "both": [self.magnitude, self.cosine]}[name]
        others = {"magnitude": [ordinary.magnitude], "cosine": [ordinary.cosine]}.get(
            name, [ordinary.magnitude, ordinary.cosine]
        )
        return np.asarray(sum((part - other.mean()) / other.std() for part, other in zip(parts, others)))


MEASURES = {
    "magnitude": "‖Δ‖",
    "cosine": "cos(Δ, ε_uncond)",
    "both": "‖Δ‖ and cos, each by its spread over ordinary prompts, added",
}


def measured(
    model: Miniature, chosen: Sequence[Subject], images: int, seed: int, progress: Callable[[int], None]
) -> Scores:
    """Score every image of every subject with `MOST` noises of its own."""
    delta, unconditional = first_predictions(model, chosen, images * MOST, seed, progress=progress)
    cosine = torch.cosine_similarity(delta.flatten(1), unconditional.flatten(1))
    shape = (len(chosen), images, MOST)
    return Scores(*(values.double().numpy().reshape(shape) for values in (magnitude(delta), cosine)))


@dataclass(frozen=True)
class Line:
    """One measure with one number of noises. `low` and `high` bound the 95 % bootstrap interval over captions."""

    measure: str
    noises: int
    rows: int
    """Network rows of one score, the unconditional ones among them."""
    auc: float
    auc_low: float
    auc_high: float
    caption_auc: float
    """With the scores of all of a caption's images averaged."""
    true_positives: float
    """The share of memorised images above the threshold that `RATE` of the ordinary ones exceed."""
    low: float
    high: float


def true_positives(memorised: Values, ordinary: Values, rate: float = RATE) -> float:
    """The share of memorised scores above the threshold that a calibration with the ordinary ones has."""
    known = Calibration(Key("", 0, 0, "eps", 0), tuple(sorted(ordinary.ravel().tolist())))
    return float((memorised > known.threshold(rate)).mean())


@dataclass(frozen=True)
class Plan:
    images: int = 16
    """Of each memorised prompt."""
    ordinary: int = 500
    """Ordinary prompts, an image each."""
    resamples: int = RESAMPLES

    @property
    def total(self) -> int:
        """Pairs of rows in all."""
        memorised = sum(len(subjects(memorised=True, held_out=held)) for held in (True, False))
        return MOST * (memorised * self.images + self.ordinary + DEVELOPMENT)


DEVELOPMENT = 100
"""Ordinary prompts, none of them among those that are counted, whose spread puts measures on one scale."""


def detect(
    model: Miniature, plan: Plan | None = None, *, seed: int = 1, progress: Callable[[int], None] = lambda done: None
) -> list[Line]:
    """Score held-out memorised prompts against held-out ordinary ones."""
    plan = plan or Plan()
    every = ordinary_subjects(plan.ordinary + DEVELOPMENT)
    chosen = subjects(memorised=True, held_out=True)
    memorised = measured(model, chosen, plan.images, seed, progress)
    ordinary = measured(model, every[: plan.ordinary], 1, seed + 7_000_000, progress)
    scale = measured(model, every[plan.ordinary :], 1, seed + 9_000_000, progress)
    known = measured(model, subjects(memorised=True, held_out=False), plan.images, seed, progress)
    # Which way the cosine points is decided on prompts that are not counted.
    turn = 1.0 if known.cosine.mean() >= scale.cosine.mean() else -1.0
    memorised, ordinary, scale = (
        Scores(scores.magnitude, turn * scores.cosine) for scores in (memorised, ordinary, scale)
    )
    return [line(name, count, memorised, ordinary, scale, plan) for name in MEASURES for count in NOISES]


def line(name: str, count: int, memorised: Scores, ordinary: Scores, scale: Scores, plan: Plan) -> Line:
    high, low = (scores.of(name, scale)[..., :count].mean(-1) for scores in (memorised, ordinary))

    def bounds(statistic: Callable[[Values, Values], float]) -> tuple[float, float]:
        return interval(
            len(high), len(low), statistic=lambda a, b: statistic(high[a], low[b]), resamples=plan.resamples
        )

    captions = [scores.of(name, scale).mean((1, 2)) for scores in (memorised, ordinary)]
    return Line(
        name,
        count,
        2 * count,
        auc(high, low),
        *bounds(auc),
        auc(*captions),
        true_positives(high, low),
        *bounds(true_positives),
    )


@dataclass(frozen=True)
class LeftAlone:
    """What mitigating flagged images only does to ordinary prompts, at a threshold calibrated with others of them."""

    images: int
    flagged: int
    identical: int
    """Images whose latents are bit for bit those without mitigation, of the batches in which none was flagged."""
    unflagged_batches: int
    extra_rows: int
    """Network rows beyond those without mitigation, in these batches."""
    promise: str
    """What the calibration can promise (`calibration.Promise`)."""


def left_alone(model: Miniature, *, batches: int = 6, size: int = 4, seed: int = 1) -> LeftAlone:
    """Sample ordinary prompts with and without `when = flagged`, the threshold being at `RATE` false positives."""
    every = ordinary_subjects(120 + batches * size)
    others = measured(model, every[:120], 1, seed + 11_000_000, lambda done: None).magnitude.ravel()
    known = Calibration(Key("", 0, 0, model.parameterization, 0), tuple(sorted(others.tolist())))
    factor = size_factor(noises([0])[0].numel(), model.parameterization)
    settings = Settings(enabled=True, when="flagged", threshold=known.threshold(RATE) / factor)
    flagged = identical = unflagged = extra = 0
    for batch in range(batches):
        captions = [subject.caption for subject in every[120 + batch * size :][:size]]
        x = noises([seed_of(batch, i, seed + 13_000_000) for i in range(size)])
        plain, found = (generate(model, captions, x, way) for way in (NONE, settings))
        moved = (found.noise != x).flatten(1).any(1)
        flagged += int(moved.sum())
        if not moved.any():
            unflagged += 1
            identical += int((found.latents == plain.latents).flatten(1).all(1).sum())
            extra += int((found.forward - plain.forward).sum())
    return LeftAlone(batches * size, flagged, identical, unflagged, extra, str(known.promise(RATE)))


def left_alone_text(found: LeftAlone, size: int = 4) -> str:
    return (
        f"Mitigating flagged images only ({found.promise}): of {found.images} ordinary images {found.flagged} were "
        "flagged; in the "
        f"{found.unflagged_batches} batches of {size} without a flagged one {found.identical} of "
        f"{found.unflagged_batches * size} images are bit-identical to no mitigation, at {found.extra_rows} extra rows."
    )


def report(lines: Sequence[Line], plan: Plan) -> str:
    """The lines as text."""
    prompts = len(subjects(memorised=True, held_out=True))
    said = [
        f"{'measure':10} noises  rows  AUC                    AUC a caption  true positives at {RATE:.0%} false ones",
    ]
    for entry in lines:
        said.append(
            f"{entry.measure:10} {entry.noises:6}  {entry.rows:4}  {entry.auc:.4f} [{entry.auc_low:.4f}, "
            f"{entry.auc_high:.4f}]  {entry.caption_auc:13.4f}  {entry.true_positives:.3f} [{entry.low:.3f}, "
            f"{entry.high:.3f}]"
        )
    said += [
        "",
        f"{prompts} held-out memorised prompts, {plan.images} images each; {plan.ordinary} held-out ordinary prompts, "
        "an image each.",
        *(f"{name}: {text}." for name, text in MEASURES.items()),
    ]
    return "\n".join(said)


def documents(lines: Sequence[Line]) -> list[dict[str, Any]]:
    return [asdict(entry) for entry in lines]
