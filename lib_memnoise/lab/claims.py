"""The paper's claims, measured on prompts of the miniature that no setting was chosen on.

Intervals are 95 % percentile bootstrap intervals over the captions: images of one caption are not independent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from lib_memnoise.lab.bench import PER_SAMPLE, STEPS, noises
from lib_memnoise.lab.records import aligned
from lib_memnoise.lab.study import Images, Subject, first_predictions, record, seed_of, study, subjects
from lib_memnoise.miniature.model import Miniature
from lib_memnoise.miniature.scenes import ordinary_caption, validation_scenes
from lib_memnoise.miniature.text import words
from lib_memnoise.prediction import magnitude
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
RESAMPLES = 2000

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Claim:
    """A sentence, the number that decides it, its 95 % interval, and whether it holds."""

    claim: str
    value: float
    low: float
    high: float
    holds: bool
    required: bool = True
    """False: the paper says so of Stable Diffusion, and the miniature is not expected to show it."""


def interval(*captions: int, statistic: Callable[..., float], resamples: int = RESAMPLES) -> tuple[float, float]:
    """A bootstrap interval over captions of a statistic, which is given the indices of those drawn.

    With several numbers of captions each set is drawn from on its own.
    """
    result = stats.bootstrap(
        tuple(np.arange(count) for count in captions),
        statistic,
        n_resamples=resamples,
        vectorized=False,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def along(curve: Sequence[Images], alignment: float, drawn: NDArray[np.int64]) -> float:
    """Similarity of static τ where its alignment is the one given, interpolated along the τ curve.

    Below the curve's lowest alignment there is nothing to compare with: next to nothing is returned, so that no
    method looks good there.
    """
    points = sorted((images.alignment[drawn].mean(), images.similarity[drawn].mean()) for images in curve)
    alignments, similarities = zip(*points)
    return float(np.interp(alignment, np.array(alignments), np.array(similarities), left=1e-9))


def scores(model: Miniature, chosen: Sequence[Subject], images: int, seed: int, sampler: str = "DDIM") -> Values:
    """‖Δ(x_T, T)‖ of fresh noises, `(S, I)`."""
    delta, _ = first_predictions(model, chosen, images, seed, sampler=sampler)
    return magnitude(delta).double().numpy().reshape(len(chosen), images)


def auc(memorised: Values, control: Values) -> float:
    """The probability that a memorised prompt's score is above a control's."""
    found = stats.mannwhitneyu(memorised.ravel(), control.ravel())
    return float(found.statistic) / (memorised.size * control.size)


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
    """How much ‖Δ‖ of each image falls at most within a few steps early on, `(S, I)`: 0.5 is to half of it."""
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
    model: Miniature, plan: Plan | None = None, *, seed: int = 1, progress: Callable[[int], None] = lambda done: None
) -> Measured:
    """Generate the held-out prompts under every method, all from the same noises (DDIM, guidance 7)."""
    plan = plan or Plan()
    chosen = subjects(memorised=True, held_out=True)
    points: list[dict[str, Any]] = []

    def point(name: str, settings: Settings, replaced: Tensor | None = None) -> Images:
        result = study(
            model,
            chosen,
            settings,
            images=plan.images,
            seed=seed,
            steps=plan.steps,
            replaced=replaced,
            progress=progress,
        )
        points.append(record(name, settings, model.parameterization, result))
        return result

    none = point("none", NONE)
    # Guidance never comes on; looking at Δ is all that a prompt does here.
    unguided = study(
        model,
        chosen,
        static(0.0),
        images=plan.images,
        seed=seed,
        steps=plan.steps,
        looking=True,
        progress=progress,
    )
    curve = {tau: point(f"static tau {tau:g}", static(tau)) for tau in plan.taus}
    batch_wise = point("batch-wise", BATCH_WISE)
    per_sample = point("per-sample, to a quarter", PER_SAMPLE)
    half = point("per-sample, to half", HALF)
    for name, settings in AUTOMATIC.items():
        point(name, settings)
    random = displaced(chosen, plan.images, seed, batch_wise.noise)
    tau = BATCH_WISE.resolved("sd1").tau
    assert tau is not None
    moved = point("random displacement", static(tau), replaced=random)
    others = subjects(memorised=False, held_out=True)
    control = study(model, others, NONE, images=plan.controls, seed=seed, steps=plan.steps, progress=progress)
    ordinary = study(model, ordinary_subjects(ORDINARY), NONE, images=1, seed=seed, steps=plan.steps, progress=progress)
    return Measured(
        none,
        unguided,
        curve,
        batch_wise,
        per_sample,
        half,
        moved,
        control,
        ordinary,
        scores(model, others, plan.images, seed),
        points,
    )


def judge(found: Measured) -> list[Claim]:
    """The claims, each with the number that decides it."""
    every = np.arange(len(found.none.similarity))
    curve = list(found.curve.values())
    tau = BATCH_WISE.resolved("sd1").tau
    assert tau is not None

    def share(images: Images) -> Callable[[NDArray[np.int64]], float]:
        return lambda drawn: float(images.copied[drawn].mean())

    def ratio(drawn: NDArray[np.int64]) -> float:
        same = along(curve, float(found.batch_wise.alignment[drawn].mean()), drawn)
        return float(found.batch_wise.similarity[drawn].mean()) / same

    def gain(images: Images) -> Callable[[NDArray[np.int64]], float]:
        return lambda drawn: float((found.none.similarity - images.similarity)[drawn].mean())

    def loss(images: Images) -> Callable[[NDArray[np.int64]], float]:
        return lambda drawn: float((found.none.alignment - images.alignment)[drawn].mean())

    def nothing(drawn: NDArray[np.int64]) -> float:
        return float((found.curve[tau].similarity - found.displaced.similarity)[drawn].mean())

    def separation(drawn: NDArray[np.int64]) -> float:
        return auc(found.none.before[drawn], found.control_scores)

    captions = len(every)
    claims = []

    def add(
        claim: str,
        statistic: Callable[[NDArray[np.int64]], float],
        holds: Callable[[float, float, float], bool],
        size: int = captions,
        required: bool = True,
    ) -> None:
        low, high = interval(size, statistic=statistic)
        value = statistic(np.arange(size))
        claims.append(Claim(claim, value, low, high, holds(value, low, high), required))

    add(
        "memorised prompts are copied without mitigation (share, at least 0.95)",
        share(found.none),
        lambda v, low, high: v >= 0.95,
    )
    add(
        "controls are not (share, at most 0.10)",
        share(found.controls),
        lambda v, low, high: v <= 0.10,
        len(found.controls.similarity),
    )
    add(
        "controls are recognisable (alignment, at least 0.85)",
        lambda drawn: float(found.controls.alignment[drawn].mean()),
        lambda v, low, high: v >= 0.85,
        len(found.controls.similarity),
    )
    add(
        "ordinary prompts are recognisable (alignment, at least 0.85)",
        lambda drawn: float(found.ordinary.alignment[drawn].mean()),
        lambda v, low, high: v >= 0.85,
        len(found.ordinary.similarity),
    )
    add(
        "batch-wise is less similar than static tau at the same alignment (ratio, at most 0.75, interval below 1)",
        ratio,
        lambda v, low, high: v <= 0.75 and high < 1,
    )
    for images, name in ((found.half, "half"), (found.per_sample, "a quarter")):
        add(
            f"per-sample, to {name} of the first magnitude, is less similar than none (difference, at least 0.3)",
            gain(images),
            lambda v, low, high: v >= 0.3,
        )
        add(
            f"per-sample, to {name}, keeps the alignment (loss, at most 0.05)",
            loss(images),
            lambda v, low, high: v <= 0.05,
        )
    add(
        f"a random displacement as long as batch-wise's gains nothing at tau {tau:g} (interval not above 0)",
        nothing,
        lambda v, low, high: low <= 0,
    )
    add(
        "the score tells memorised prompts from controls (AUC of one noise, at least 0.9)",
        separation,
        lambda v, low, high: v >= 0.9,
    )
    add(
        "the paper's sharp drop: with guidance off, the magnitude halves within 5 steps before t = 500 (median fall)",
        lambda drawn: float(np.median(largest_fall(found.unguided)[drawn])),
        lambda v, low, high: v >= 0.5,
        required=False,
    )
    return claims


def report(found: Measured, claims: Sequence[Claim]) -> str:
    """Points and claims as text."""
    lines = aligned(found.points)
    prompts, images = found.none.similarity.shape
    lines += ["", f"{prompts} held-out prompts, {images} images each, at every point.", ""]
    for claim in claims:
        lines.append(
            f"{'holds' if claim.holds else 'FAILS' if claim.required else 'is not seen':11}  {claim.value:7.3f} "
            f"[{claim.low:.3f}, {claim.high:.3f}]  {claim.claim}"
        )
    return "\n".join(lines)
