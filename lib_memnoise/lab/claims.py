"""The paper's claims, measured on prompts of the miniature that no setting was chosen on.

Each holds or fails by a fixed yardstick, as a test does. Those of a run of the evaluation (`lab.evaluation.claims`) are
judged by their intervals alone, which may leave them open.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from lib_memnoise.core.delta import magnitude
from lib_memnoise.lab.experiment import Images, Subject, begin, first_predictions, record, seed_of, subjects
from lib_memnoise.lab.miniature.model import Miniature
from lib_memnoise.lab.miniature.scenes import ordinary_caption, validation_scenes
from lib_memnoise.lab.miniature.text import words
from lib_memnoise.lab.processes import Workers
from lib_memnoise.lab.simulator import PER_SAMPLE, STEPS, noises
from lib_memnoise.lab.stats import RESAMPLES, Estimate, Indices, Values, along, auc, interval
from lib_memnoise.lab.text_table import aligned, in_markdown, markdown
from lib_memnoise.settings import Settings

TAUS = (940.0, 900.0, 860.0, 820.0, 780.0, 740.0, 700.0, 660.0)
NONE = Settings(enabled=False)
BATCH_WISE = Settings(enabled=True, preset="sd1")
AUTOMATIC = {
    "automatic tau": Settings(enabled=True, preset="sd1", method="none", guidance="transition"),
    "batch-wise, automatic tau": replace(BATCH_WISE, guidance="transition"),
}
"""Guidance from each image's own transition point on."""
HALF = replace(PER_SAMPLE, target=0.5)
"""As the preset of checkpoints without published numbers has it."""


@dataclass(frozen=True)
class Claim:
    """A sentence, the number that decides it, its 95 % interval, and whether it holds.

    What is copied is any memorised picture.
    """

    claim: str
    value: float
    low: float
    high: float
    holds: bool
    required: bool = True
    """False: the paper says so of Stable Diffusion, and the miniature is not expected to show it."""
    own: tuple[float, float, float] | None = None
    """The number and its interval if copies of the prompt's own picture alone count; None where that is no other."""


def scores(model: Miniature, chosen: Sequence[Subject], images: int, seed: int, sampler: str = "DDIM") -> Values:
    """‖Δ(x_T, T)‖ of fresh noises, `(S, I)`."""
    delta, _ = first_predictions(model, chosen, images, seed, sampler=sampler)
    return magnitude(delta).double().numpy().reshape(len(chosen), images)


def ordinary_subjects(count: int, seed: int = 7) -> list[Subject]:
    """Captions as most training pictures have them, of scenes that no training set has; another seed draws others."""
    random = np.random.default_rng(seed)
    found = []
    for scene in validation_scenes(count, seed=seed):
        caption = ordinary_caption(scene, random)
        true = {scene.colour, *scene.names}
        found.append(Subject(caption, tuple(word for word in words(caption) if word in true), None))
    return found


def displaced(chosen: Sequence[Subject], images: int, seed: int, moved: Tensor) -> Tensor:
    """The seeds' noises, each moved in a random direction as far as a method moved it to `moved`."""
    every = [(s, i) for s in range(len(chosen)) for i in range(images)]
    x = noises([seed_of(s, i, seed) for s, i in every])
    direction = noises([seed_of(s, i, seed + 50_000_000) for s, i in every])
    length = (moved - x).flatten(1).norm(dim=1) / direction.flatten(1).norm(dim=1)
    return x + length[:, None, None, None] * direction


def largest_fall(images: Images, before: float = 500.0, within: int = 5) -> Values:
    """How much ‖Δ‖ of each image falls at most within a few steps early on, `(S, I)`: 0.5 is to half of it.

    A share, which has a yardstick; 0 where there are too few steps.
    """
    trace = images.trace[[t > before for t in images.timesteps]]
    if len(trace) <= within:
        return np.zeros(trace.shape[1:])
    return np.asarray((1 - trace[within:] / trace[:-within]).max(0))


def static(tau: float) -> Settings:
    """A static transition point: guidance off until τ, the noise as it is."""
    return Settings(enabled=True, preset="sd1", gamma=0.0, tau=tau)


@dataclass(frozen=True)
class Measured:
    """All that the claims are judged by. `points` has a row for each method and setting."""

    none: Images
    unguided: Images
    """Guidance off all the way, ‖Δ‖ traced."""
    curve: dict[float, Images]
    batch_wise: Images
    per_sample: Images
    half: Images
    """Per-sample, to half of the first ‖Δ‖."""
    displaced: Images
    controls: Images
    ordinary: Images
    control_scores: Values
    points: list[dict[str, Any]]


ORDINARY = 60
"""Images of ordinary captions, one each."""


@dataclass(frozen=True)
class Plan:
    """How much is generated."""

    images: int = 18
    """Of each memorised prompt, at every point."""
    taus: Sequence[float] = TAUS
    """The points of the τ curve."""
    controls: int = 3
    """Images of each control."""
    steps: int = STEPS

    @property
    def total(self) -> int:
        """Images in all."""
        memorised, controls = (len(subjects(memorised=kind, held_out=True)) for kind in (True, False))
        return memorised * self.images * (6 + len(AUTOMATIC) + len(self.taus)) + controls * self.controls + ORDINARY


SHORT = Plan(images=3, taus=(940.0, 900.0, 840.0), controls=1)
"""For a first look: intervals are wide."""


def measure(
    model: Miniature,
    plan: Plan | None = None,
    *,
    seed: int = 1,
    processes: int = 1,
    progress: Callable[[int], None] = lambda done: None,
) -> Measured:
    """Generate the held-out prompts under every method, all from the same noises (DDIM, guidance 7).

    Args:
        processes: that generate; the results are the same to the bit.
        progress: called with the number of images just finished, from any thread.
    """
    plan = plan or Plan()
    chosen = subjects(memorised=True, held_out=True)
    others = subjects(memorised=False, held_out=True)
    points: dict[str, Settings] = {
        "none": NONE,
        **{f"static tau {tau:g}": static(tau) for tau in plan.taus},
        "batch-wise": BATCH_WISE,
        "per-sample, to a quarter": PER_SAMPLE,
        "per-sample, to half": HALF,
        **AUTOMATIC,
    }
    tau = BATCH_WISE.resolved("sd1").tau
    assert tau is not None
    with Workers(model, processes) as workers:

        def later(
            chosen: Sequence[Subject], settings: Settings, images: int = plan.images, **how: Any
        ) -> Callable[[], Images]:
            return begin(
                workers, chosen, settings, images=images, seed=seed, steps=plan.steps, progress=progress, **how
            )

        # First what another waits for, then what takes longest.
        first = ("batch-wise", "per-sample, to a quarter", "per-sample, to half")
        begun = {name: later(chosen, points[name]) for name in dict.fromkeys((*first, *points))}
        # Guidance never comes on; looking at Δ is all that a prompt does here.
        unguided = later(chosen, static(0.0), looking=True)
        control = later(others, NONE, plan.controls)
        ordinary = later(ordinary_subjects(ORDINARY), NONE, 1)
        random = displaced(chosen, plan.images, seed, begun["batch-wise"]().noise)
        points["random displacement"] = static(tau)
        begun["random displacement"] = later(chosen, static(tau), replaced=random)
        control_scores = scores(model, others, plan.images, seed)
        found = {name: begun[name]() for name in points}
        return Measured(
            none=found["none"],
            unguided=unguided(),
            curve={tau: found[f"static tau {tau:g}"] for tau in plan.taus},
            batch_wise=found["batch-wise"],
            per_sample=found["per-sample, to a quarter"],
            half=found["per-sample, to half"],
            displaced=found["random displacement"],
            controls=control(),
            ordinary=ordinary(),
            control_scores=control_scores,
            points=[record(name, points[name], model.parameterization, result) for name, result in found.items()],
        )


Statistic = Callable[[Measured, Indices], float]
"""A number of what was measured, of the captions of these indices."""


def _falls(at: str) -> Statistic:
    def fall(found: Measured, drawn: Indices) -> float:
        return float((found.none.similarity - getattr(found, at).similarity)[drawn].mean())

    return fall


def _loses(at: str) -> Statistic:
    def loss(found: Measured, drawn: Indices) -> float:
        return float((found.none.alignment - getattr(found, at).alignment)[drawn].mean())

    return loss


def _ratio(found: Measured, drawn: Indices) -> float:
    """Similarity of batch-wise over that of static τ at the same alignment.

    Below the alignment of all static points there is nothing to compare with: next to nothing is divided by, so that
    no method looks good there.
    """
    curve = [(images.alignment[drawn].mean(), images.similarity[drawn].mean()) for images in found.curve.values()]
    same = along(curve, float(found.batch_wise.alignment[drawn].mean()), left=1e-9)
    return float(found.batch_wise.similarity[drawn].mean()) / same


def _gains(found: Measured, drawn: Indices) -> float:
    tau = BATCH_WISE.resolved("sd1").tau
    assert tau is not None
    return float((found.curve[tau].similarity - found.displaced.similarity)[drawn].mean())


@dataclass(frozen=True)
class _Test:
    """A claim before anything is measured."""

    claim: str
    statistic: Statistic
    holds: Callable[[Estimate], bool]
    of: str = "none"
    """Whose captions are drawn from."""
    copying: bool = False
    """Its number is other where the prompt's own picture alone counts."""
    required: bool = True


_TESTS = (
    _Test(
        "memorised prompts are copied without mitigation (share, at least 0.95)",
        lambda found, drawn: float(found.none.copied[drawn].mean()),
        lambda number: number.value >= 0.95,
        copying=True,
    ),
    _Test(
        "controls are not (share, at most 0.10)",
        lambda found, drawn: float(found.controls.copied[drawn].mean()),
        lambda number: number.value <= 0.10,
        of="controls",
    ),
    _Test(
        "controls are recognisable (alignment, at least 0.85)",
        lambda found, drawn: float(found.controls.alignment[drawn].mean()),
        lambda number: number.value >= 0.85,
        of="controls",
    ),
    _Test(
        "ordinary prompts are recognisable (alignment, at least 0.85)",
        lambda found, drawn: float(found.ordinary.alignment[drawn].mean()),
        lambda number: number.value >= 0.85,
        of="ordinary",
    ),
    _Test(
        "batch-wise is less similar than static tau at the same alignment (ratio, at most 0.75, interval below 1)",
        _ratio,
        lambda number: number.value <= 0.75 and number.high < 1,
        copying=True,
    ),
    _Test(
        "per-sample, to half of the first magnitude, is less similar than none (difference, at least 0.3)",
        _falls("half"),
        lambda number: number.value >= 0.3,
        copying=True,
    ),
    _Test(
        "per-sample, to half, keeps the alignment (loss, at most 0.05)",
        _loses("half"),
        lambda number: number.value <= 0.05,
    ),
    _Test(
        "per-sample, to a quarter of the first magnitude, is less similar than none (difference, at least 0.3)",
        _falls("per_sample"),
        lambda number: number.value >= 0.3,
        copying=True,
    ),
    _Test(
        "per-sample, to a quarter, keeps the alignment (loss, at most 0.05)",
        _loses("per_sample"),
        lambda number: number.value <= 0.05,
    ),
    _Test(
        "a random displacement as long as batch-wise's gains nothing at its tau (interval not above 0)",
        _gains,
        lambda number: number.low <= 0,
        copying=True,
    ),
    _Test(
        "the score tells memorised prompts from controls (AUC of one noise, at least 0.9)",
        lambda found, drawn: auc(found.none.before[drawn], found.control_scores),
        lambda number: number.value >= 0.9,
    ),
    _Test(
        "the paper's sharp drop: with guidance off, the magnitude halves within 5 steps before t = 500 (median fall)",
        lambda found, drawn: float(np.median(largest_fall(found.unguided)[drawn])),
        lambda number: number.value >= 0.5,
        required=False,
    ),
)


def own_alone(found: Measured) -> Measured:
    """As if the prompts' own pictures alone could be copied."""

    def owned(images: Images) -> Images:
        return replace(images, similarity=images.similarity_own)

    return replace(
        found,
        none=owned(found.none),
        curve={tau: owned(images) for tau, images in found.curve.items()},
        batch_wise=owned(found.batch_wise),
        per_sample=owned(found.per_sample),
        half=owned(found.half),
        displaced=owned(found.displaced),
    )


def judge(found: Measured, resamples: int = RESAMPLES) -> list[Claim]:
    """The claims, each with the number that decides it."""
    own = own_alone(found)

    def number(test: _Test, found: Measured) -> Estimate:
        size = len(getattr(found, test.of).similarity)
        low, high = interval(size, statistic=lambda drawn: test.statistic(found, drawn), resamples=resamples)
        return Estimate(test.statistic(found, np.arange(size)), low, high, size)

    claims = []
    for test in _TESTS:
        decides = number(test, found)
        beside = number(test, own) if test.copying else None
        claims.append(
            Claim(
                test.claim,
                decides.value,
                decides.low,
                decides.high,
                test.holds(decides),
                test.required,
                None if beside is None else (beside.value, beside.low, beside.high),
            )
        )
    return claims


def _verdict(claim: Claim) -> str:
    return "holds" if claim.holds else "FAILS" if claim.required else "is not seen"


def report(found: Measured, claims: Sequence[Claim]) -> str:
    """Points and claims as text."""
    lines = aligned(found.points)
    prompts, images = found.none.similarity.shape
    lines += [
        "",
        f"{prompts} held-out prompts, {images} images each, at every point.",
        "any, and so the claims: the nearest of all memorised pictures; own: the prompt's own alone.",
        "",
    ]
    for claim in claims:
        own = "" if claim.own is None else " (own: {:.3f} [{:.3f}, {:.3f}])".format(*claim.own)
        lines.append(
            f"{_verdict(claim):11}  {claim.value:7.3f} [{claim.low:.3f}, {claim.high:.3f}]  {claim.claim}{own}"
        )
    return "\n".join(lines)


def markdown_report(found: Measured, claims: Sequence[Claim]) -> str:
    """Points and claims as two Markdown tables."""

    def number(value: float, low: float, high: float) -> str:
        return f"{value:.3f} [{low:.3f}, {high:.3f}]".replace("-", "−")

    rows = [
        (
            claim.claim,
            number(claim.value, claim.low, claim.high),
            "" if claim.own is None else number(*claim.own),
            "yes" if claim.holds else "no",
        )
        for claim in claims
    ]
    titles = ("Claim", "measured, 95 % interval", "own alone", "holds")
    return "\n".join([*markdown(found.points), "", *in_markdown(titles, rows)])
