"""Which of the paper's claims hold in a run: each is judged by the interval of a number, which may leave it open."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from lib_memnoise.core.guidance import transition_point
from lib_memnoise.lab.evaluation.metrics import label_of
from lib_memnoise.lab.evaluation.plan import Curve
from lib_memnoise.lab.evaluation.results import Results
from lib_memnoise.lab.evaluation.trajectories import baseline, crossing, half_of_first, largest_fall, traced
from lib_memnoise.lab.stats import NOTHING, Estimate, Indices, Values, along, estimate, interval, ratio, slopes

COMPARABLE = 0.02
"""A difference of copying up to which methods are as good as each other."""
CLAIMS = {
    1: "From adjusted noise less is copied than from noise as drawn, at equal alignment (Figure 4)",
    2: "The transition comes earlier with larger γ̃ (Figure 3)",
    3: "Per-sample removes the transition (Figure 10)",
    4: "Per-sample copies least of all methods at equal alignment; batch-wise is as good as cross-attention (Figure 5)",
}
"""The paper's claims, by their number here."""


@dataclass(frozen=True)
class Claim:
    """A part of one of the paper's claims, and the number that decides it in this run."""

    number: int
    """Of `CLAIMS`."""
    claim: str
    measured: str
    estimate: Estimate
    needed: float
    """The number must be above it, or with `below` below it."""
    below: bool = False
    beside: Estimate | None = None
    """The number if copies are counted the other way (see `Results.copying`), where they can be."""
    beside_of: str = ""
    """Which way that is."""

    @property
    def holds(self) -> bool | None:
        """The whole interval is on the claim's side; False: on the other; None: on both, or there is none."""
        return self.estimate.verdict(self.needed, below=self.below)


def overall(parts: Sequence[Claim]) -> bool | None:
    """Whether a claim holds: all of its parts do; False: one does not."""
    verdicts = [part.holds for part in parts]
    return False if False in verdicts else None if None in verdicts or not verdicts else True


# The trade-off


def _curve(found: Results, curve: Curve, copy: str, alignment: str) -> list[tuple[Values, Values]]:
    """A curve's points, with no mitigation as its weakest where the plan has that."""
    keys = list(dict.fromkeys((*curve.points, *(["none"] if "none" in found.plan.points else []))))
    pairs = [(found.prompt_means(key, alignment), found.prompt_means(key, copy)) for key in keys]
    return [pair for pair in pairs if not np.isnan(pair[0] + pair[1]).all()]


def difference(found: Results, ours: Curve, theirs: Curve, copy: str, alignment: str) -> tuple[Estimate, int]:
    """How much more a curve copies than ours does, at our points' alignment; averaged over our points.

    Our points whose alignment their curve does not reach are left out: nothing is known of it there.

    Returns:
        The difference, and how many of our points it is of.
    """
    mine = [(found.prompt_means(key, alignment), found.prompt_means(key, copy)) for key in ours.points]
    other = _curve(found, theirs, copy, alignment)
    if not other:
        return NOTHING, 0
    columns = np.stack([part for pair in (*mine, *other) for part in pair])
    complete = np.flatnonzero(~np.isnan(columns).any(0))
    if not len(complete):
        return NOTHING, 0
    reached = [float(a[complete].mean()) for a, _ in other]
    mine = [(a, c) for a, c in mine if min(reached) <= float(a[complete].mean()) <= max(reached)]
    if not mine:
        return NOTHING, 0

    def statistic(drawn: Indices) -> float:
        rows = complete[drawn]
        curve = [(float(a[rows].mean()), float(c[rows].mean())) for a, c in other]
        return float(np.mean([along(curve, float(a[rows].mean())) - float(c[rows].mean()) for a, c in mine]))

    low, high = interval(len(complete), statistic=statistic)
    return Estimate(statistic(np.arange(len(complete))), low, high, len(complete)), len(mine)


# The paper's claims


def claims(found: Results) -> list[Claim]:
    """What this run says of each of the paper's claims."""
    copying, alignment = found.copying, found.metric("alignment")
    made: list[Claim] = []
    if copying and alignment is not None:
        made += _adjustment(found, copying, alignment)
    made += _transitions(found)
    if copying and alignment is not None:
        made += _ordering(found, copying, alignment)
    return made


def _at_equal_alignment(
    found: Results, number: int, claim: str, ours: Curve, theirs: Curve, copying: Sequence[str], alignment: str
) -> Claim:
    gained, points = difference(found, ours, theirs, copying[0], alignment)
    measured = f"{label_of(copying[0])}: that of “{theirs.name}” less that of “{ours.name}”, at the alignment of "
    count = len(ours.points)
    if not points:
        measured += f"its {count} strengths: “{theirs.name}” does not reach any"
    else:
        measured += (
            f"its {count} strengths" if points == count else f"the {points} of its {count} strengths within reach"
        )
    part = Claim(number, claim, measured, gained, 0.0)
    for column in copying[1:]:
        beside, _ = difference(found, ours, theirs, column, alignment)
        part = replace(part, beside=beside, beside_of=label_of(column))
    return part


def _adjustment(found: Results, copying: Sequence[str], alignment: str) -> list[Claim]:
    curves = found.curves("adjustment")
    adjusted = next((curve for curve in curves if curve.method == "batch_wise"), None)
    plain = next((curve for curve in curves if curve.method == "static"), None)
    if adjusted is None or plain is None:
        return []
    claim = "From adjusted noise less is copied"
    return [_at_equal_alignment(found, 1, claim, adjusted, plain, copying, alignment)]


def _transitions(found: Results) -> list[Claim]:
    made: list[Claim] = []
    start = baseline(found)
    if start is None:
        return []
    levels = half_of_first(found, start)

    def crossed(image: tuple[int, int], trace: Values) -> float:
        return crossing(trace, levels.get(image, math.nan))

    def minimum(_: tuple[int, int], trace: Values) -> float:
        return transition_point([(t, size) for t, size in trace]) or 0.0

    for curve in found.curves("strengths"):
        for how, what in (
            (crossed, "‖Δ‖ falls below half of the drawn noise's first earlier with larger γ̃"),
            (minimum, "‖Δ‖ has its first minimum earlier with larger γ̃"),
        ):
            values = np.stack([traced(found, point, how) for point in curve.points], axis=1)
            earlier = estimate(slopes(np.array(curve.strengths, dtype=float), values))
            made.append(Claim(2, what, "timesteps earlier for each unit of γ̃, by least squares", earlier, 0.0))
    for curve in found.curves("per_sample"):
        plain = traced(found, start, lambda _, trace: largest_fall(trace))
        ours = traced(found, curve.points[0], lambda _, trace: largest_fall(trace))
        falls = "–" if np.isnan(plain).all() else f"{np.nanmean(plain):.2g}"
        measured = (
            f"largest fall of ‖Δ‖ within five steps, over that of the drawn noise, {falls}; below a half is needed"
        )
        made.append(Claim(3, "No sharp drop of ‖Δ‖ is left", measured, ratio(ours, plain), 0.5, below=True))
    return made


def _ordering(found: Results, copying: Sequence[str], alignment: str) -> list[Claim]:
    """Figure 5: per-sample against every other method, and batch-wise against cross-attention scaling."""
    curves = found.curves("methods")
    made = []
    ours = next((curve for curve in curves if curve.method == "per_sample"), None)
    if ours is not None:
        for other in curves:
            if other.method not in ("per_sample", "none"):
                claim = f"Per-sample copies less than “{other.name}”"
                made.append(_at_equal_alignment(found, 4, claim, ours, other, copying, alignment))
    batch = next((curve for curve in curves if curve.method == "batch_wise"), None)
    scaling = next((curve for curve in curves if curve.method == "cross_attention"), None)
    if batch is not None and scaling is not None:
        claim = f"Batch-wise copies less than “{scaling.name}”, or as little"
        part = _at_equal_alignment(found, 4, claim, batch, scaling, copying, alignment)
        made.append(replace(part, needed=-COMPARABLE, measured=f"{part.measured}; above −{COMPARABLE} is needed"))
    return made
