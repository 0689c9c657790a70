"""What a run's records say: means with intervals, and which of the paper's claims hold.

Intervals are 95 % percentile bootstrap intervals over the prompts: images of one prompt are not independent.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats
from scipy.spatial.distance import jensenshannon

from lib_memnoise.core.guidance import transition_point
from lib_memnoise.lab.evaluation.metrics import METRICS, label_of
from lib_memnoise.lab.evaluation.plan import Curve, Plan
from lib_memnoise.lab.evaluation.run import NEAREST, Run, columns_of

RESAMPLES = 2000
COUNTS = ("rows", "backward_rows", "before", "after", "norm", "seconds", "memory")
"""What a record counts, beside the metrics."""
COMPARABLE = 0.02
"""A difference of copying up to which methods are as good as each other."""
DRAWS = 20
"""Sets of drawn noises that lengths are compared with."""

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts and its 95 % interval; NaN where there is nothing, or too little to tell."""

    value: float
    low: float
    high: float
    prompts: int

    def __str__(self) -> str:
        if math.isnan(self.value):
            return "–"
        return f"{self.value:.3f}" + ("" if math.isnan(self.low) else f" [{self.low:.3f}, {self.high:.3f}]")


NOTHING = Estimate(math.nan, math.nan, math.nan, 0)


def resampled(count: int, statistic: Callable[[NDArray[np.int64]], float]) -> tuple[float, float]:
    """The interval of a statistic of prompts, which is given the indices of those drawn."""
    if count < 2:
        return math.nan, math.nan
    found = stats.bootstrap(
        (np.arange(count),),
        statistic,
        n_resamples=RESAMPLES,
        vectorized=False,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(found.low), float(found.high)


def estimate(values: Values) -> Estimate:
    """The mean of a value a prompt, `(P,)`; prompts without one (NaN) do not count."""
    values = values[~np.isnan(values)]
    if not len(values):
        return NOTHING
    if len(values) < 2:
        return Estimate(float(values[0]), math.nan, math.nan, 1)
    # The mean of resampled prompts, all at once.
    drawn = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.percentile(values[drawn].mean(1), [2.5, 97.5])
    return Estimate(float(values.mean()), float(low), float(high), len(values))


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
        low, high = self.estimate.low, self.estimate.high
        if math.isnan(low):
            return None
        if self.below:
            low, high = 2 * self.needed - high, 2 * self.needed - low
        return True if low > self.needed else False if high <= self.needed else None


def overall(parts: Sequence[Claim]) -> bool | None:
    """Whether a claim holds: all of its parts do; False: one does not."""
    verdicts = [part.holds for part in parts]
    return False if False in verdicts else None if None in verdicts or not verdicts else True


@dataclass
class Results:
    """A run's records as tables."""

    plan: Plan
    images: pd.DataFrame
    """A row an image: point, prompt, image, seed, kind, counts, `failed`, and a column for every metric."""
    traces: dict[tuple[str, int, int], Values]
    """By point, prompt and image: `(steps, 2)`, timestep and ‖Δ‖."""
    source: dict[str, Any]
    metrics: dict[str, str]
    """The metrics that measured something, and with what."""
    absent: dict[str, str] = field(default_factory=dict)
    """Metrics of the plan that could not be had, and why."""

    def metric(self, role: str) -> str | None:
        """The metric of a role ("alignment", …) that the run has, the first in the plan's order."""
        every = (name for name in self.plan.metrics if METRICS[name].role == role)
        return next((name for name in every if any(map(self.has, columns_of(name)))), None)

    def has(self, column: str) -> bool:
        return column in self.images and bool(self.images[column].notna().any())

    @property
    def copying(self) -> tuple[str, ...]:
        """How the first metric of copying that the run has was measured, what decides first.

        What decides is likeness to the nearest of all training pictures, for a copy of another prompt's is one; but of
        the paper's own metric likeness to the prompt's own, as the paper has it.
        """
        name = self.metric("copy")
        if name is None:
            return ()
        every = reversed(columns_of(name)) if METRICS[name].of_the_paper else columns_of(name)
        return tuple(column for column in every if self.has(column))

    @property
    def unknown_nearest(self) -> list[str]:
        """Metrics measured of the prompts' own training pictures alone, as old runs are."""
        return [name for name in NEAREST if self.has(f"{name}_own") and not self.has(name)]

    def prompt_means(self, point: str, name: str, kind: str | None = None) -> Values:
        """The mean of a column for every prompt of the plan, `(P,)`; NaN where there is none."""
        rows = self.images[(self.images["point"] == point) & self.images["failed"].isna()]
        if kind is not None:
            rows = rows[rows["kind"] == kind]
        means = rows.groupby("prompt")[name].mean() if name in rows else pd.Series(dtype=float)
        return means.reindex(range(len(self.plan.prompts))).to_numpy(dtype=float)

    def estimate(self, point: str, name: str, kind: str | None = None) -> Estimate:
        return estimate(self.prompt_means(point, name, kind))

    @property
    def kinds(self) -> list[str]:
        """Kinds of prompts (VM, TM), if there are several."""
        found = sorted({prompt.kind for prompt in self.plan.prompts} - {""})
        return found if len(found) > 1 else []

    def curves(self, figure: str) -> list[Curve]:
        return [curve for curve in self.plan.curves if figure in curve.figures]

    @property
    def failed(self) -> int:
        """Images that were asked for mitigated and are not."""
        return int(self.images["failed"].notna().sum())

    @property
    def missing(self) -> int:
        """Images of the plan that are not there."""
        return self.plan.total - len(self.images)

    def table(self, figure: str) -> pd.DataFrame:
        """A row for every point of a figure's curves: the mean and interval of every metric and count."""
        rows = []
        for curve in self.curves(figure):
            for strength, point in zip(curve.strengths, curve.points):
                row: dict[str, Any] = {"curve": curve.name, "sweep": curve.sweep, "strength": strength, "point": point}
                for name in (*self.metrics, *COUNTS):
                    found = self.estimate(point, name)
                    row |= {name: found.value, f"{name} low": found.low, f"{name} high": found.high}
                for kind in self.kinds:
                    for name in self.metrics:
                        found = self.estimate(point, name, kind)
                        name = f"{name} {kind}"
                        row |= {name: found.value, f"{name} low": found.low, f"{name} high": found.high}
                chosen = self.images[self.images["point"] == point]
                row |= {"images": len(chosen), "failed": int(chosen["failed"].notna().sum())}
                rows.append(row)
        data = pd.DataFrame(rows)
        if rows:  # numbers, words or nothing, which pandas would make NaN
            data["strength"] = pd.Series([row["strength"] for row in rows], dtype=object)
        return data


def results(run: Run, absent: dict[str, str] | None = None) -> Results:
    """A run's records, read."""
    rows, traces = [], {}
    for point, prompt, image, seed, text in run.rows():
        record = json.loads(text)
        row = {"point": point, "prompt": prompt, "image": image, "seed": seed, "kind": run.plan.prompts[prompt].kind}
        rows.append({**row, **{name: record.get(name) for name in (*COUNTS, "failed")}})
        if record.get("trace"):
            traces[point, prompt, image] = np.array(record["trace"], dtype=float)
    columns = ["point", "prompt", "image", "seed", "kind", *COUNTS, "failed"]
    images = pd.DataFrame(rows, columns=columns)
    images[list(COUNTS)] = images[list(COUNTS)].astype(float)
    measures = pd.DataFrame(run.measures(), columns=["point", "prompt", "image", "metric", "value"])
    if len(measures):
        wide = measures.pivot(index=["point", "prompt", "image"], columns="metric", values="value").astype(float)
        images = images.merge(wide.reset_index(), how="left", on=["point", "prompt", "image"])
    return Results(run.plan, images, traces, run.source, run.metrics, absent or {})


# The trade-off


def along(curve: Sequence[tuple[Values, Values]], alignment: float, drawn: NDArray[np.int64]) -> float:
    """A curve's copying where its alignment is the one given: interpolated between its points.

    Args:
        curve: of every point, alignment and copying a prompt.
        drawn: the prompts that count.
    """
    points = sorted((float(np.nanmean(a[drawn])), float(np.nanmean(c[drawn]))) for a, c in curve)
    alignments, copying = np.array(points).T
    return float(np.interp(alignment, alignments, copying))


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

    def statistic(drawn: NDArray[np.int64]) -> float:
        rows = complete[drawn]
        return float(np.mean([along(other, float(a[rows].mean()), rows) - float(c[rows].mean()) for a, c in mine]))

    low, high = resampled(len(complete), statistic)
    return Estimate(statistic(np.arange(len(complete))), low, high, len(complete)), len(mine)


# Along the trajectory


def crossing(trace: Values, level: float) -> float:
    """The timestep at which ‖Δ‖ is below a level for the first time; 0 if it never is."""
    below = np.flatnonzero(trace[:, 1] < level)
    return float(trace[below[0], 0]) if len(below) else 0.0


def largest_fall(trace: Values, before: float = 500.0, within: int = 5) -> float:
    """How far ‖Δ‖ falls at most within a few steps, in the first half of the trajectory."""
    early = trace[trace[:, 0] > before][:, 1]
    return float((early[:-within] - early[within:]).max()) if len(early) > within else math.nan


def traced(found: Results, point: str, value: Callable[[tuple[int, int], Values], float]) -> Values:
    """The mean of something of each image's trace, for every prompt, `(P,)`."""
    per_prompt: dict[int, list[float]] = {}
    for (key, prompt, image), trace in found.traces.items():
        if key == point:
            per_prompt.setdefault(prompt, []).append(value((prompt, image), trace))
    return np.array([np.mean(per_prompt[k]) if k in per_prompt else math.nan for k in range(len(found.plan.prompts))])


def _ratio(ours: Values, theirs: Values) -> Estimate:
    """The mean over prompts divided by another's."""
    complete = ~np.isnan(ours + theirs)
    ours, theirs = ours[complete], theirs[complete]
    if not len(ours):
        return NOTHING
    low, high = resampled(len(ours), lambda drawn: float(ours[drawn].mean() / theirs[drawn].mean()))
    return Estimate(float(ours.mean() / theirs.mean()), low, high, len(ours))


def slopes(strengths: Values, values: Values) -> Values:
    """By how much a value `(P, S)` grows with the strength `(S,)`, of every prompt, `(P,)`; least squares."""
    centred = strengths - strengths.mean()
    return np.asarray(values @ centred / (centred @ centred))


def baseline(found: Results) -> str | None:
    """The point that is traced as it was drawn: γ̃ = 0."""
    for curve in found.curves("strengths"):
        if curve.sweep == "gamma" and 0 in curve.strengths:
            return curve.points[curve.strengths.index(0)]
    return None


def half_of_first(found: Results, point: str) -> dict[tuple[int, int], float]:
    """Of each traced image, half of the ‖Δ‖ that it starts from."""
    return {key[1:]: float(trace[0, 1]) / 2 for key, trace in found.traces.items() if key[0] == point}


# Weight decay


def divergence(lengths: Values, size: int) -> float:
    """Jensen–Shannon divergence (base e) between the lengths of adjusted noises and of as many that were drawn.

    Lengths ‖x‖₂/√d, `(N,)`; those of drawn noise follow the chi distribution of `size` = d (Equation 11). In bins of a
    third of that distribution's spread, 1/√(2d); the mean over `DRAWS` sets of drawn ones.
    """
    width = 1 / (3 * math.sqrt(2 * size))
    found = []
    for k in range(DRAWS):
        drawn = _lengths(len(lengths), size, k)
        low, high = min(lengths.min(), drawn.min()), max(lengths.max(), drawn.max())
        bins = np.arange(low - width, high + 2 * width, width)
        found.append(float(jensenshannon(np.histogram(lengths, bins)[0], np.histogram(drawn, bins)[0]) ** 2))
    return float(np.mean(found))


def _lengths(count: int, size: int, seed: int) -> Values:
    """‖x‖₂/√d of drawn noises, `(count,)`."""
    return np.asarray(stats.chi.rvs(size, size=count, random_state=np.random.default_rng(seed)) / math.sqrt(size))


def weight_decay(found: Results) -> pd.DataFrame:
    """Tables 1 and 2: the divergence of lengths and the metrics, for every weight decay.

    Beside it, the divergence of as many noises as drawn: a finite number of them is never at 0.
    """
    rows = []
    size = 4 * (found.plan.width // 8) * (found.plan.height // 8)
    for curve in found.curves("weight_decay"):
        for strength, point in zip(curve.strengths, curve.points):
            own = found.images[(found.images["point"] == point) & found.images["failed"].isna()]
            norms = own["norm"].dropna().to_numpy()
            row: dict[str, Any] = {"weight decay": strength, "images": len(norms)}
            row["JSD"] = divergence(norms, size) if len(norms) else math.nan
            row["JSD as drawn"] = divergence(_lengths(len(norms), size, DRAWS), size) if len(norms) else math.nan
            row["‖x‖/√d"] = float(norms.mean()) if len(norms) else math.nan
            rows.append(row | {label_of(name): found.estimate(point, name).value for name in found.metrics})
    return pd.DataFrame(rows)


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
        made.append(Claim(3, "No sharp drop of ‖Δ‖ is left", measured, _ratio(ours, plain), 0.5, below=True))
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


# Two runs


def compared(a: Results, b: Results) -> pd.DataFrame:
    """Paired differences b − a of every metric at every point that both have, over prompts and seeds of both.

    Points are the same if their settings are; prompts, if their captions are.
    """
    captions = {prompt.caption: k for k, prompt in enumerate(a.plan.prompts)}
    of_b = {k: captions.get(prompt.caption) for k, prompt in enumerate(b.plan.prompts)}
    names = [name for name in (*a.metrics, "before", "after", "rows") if name in a.images and name in b.images]
    left = a.images[a.images["failed"].isna()]
    right = b.images[b.images["failed"].isna()].assign(prompt=b.images["prompt"].map(of_b))
    both = left.merge(right, on=["point", "prompt", "seed"], suffixes=(" a", " b"))
    labels = {point: _label(a.plan, point) for point in a.plan.points}
    rows = []
    for point in a.plan.points:
        own = both[both["point"] == point]
        for name in names:
            pairs = own[["prompt", f"{name} a", f"{name} b"]].dropna()
            if not len(pairs):
                continue
            change = (pairs[f"{name} b"] - pairs[f"{name} a"]).groupby(pairs["prompt"]).mean()
            found = estimate(change.to_numpy(dtype=float))
            rows.append(
                {
                    "point": point,
                    "method": labels[point],
                    "metric": name,
                    "images": len(pairs),
                    "a": float(pairs.groupby("prompt")[f"{name} a"].mean().mean()),
                    "b": float(pairs.groupby("prompt")[f"{name} b"].mean().mean()),
                    "difference": found.value,
                    "low": found.low,
                    "high": found.high,
                }
            )
    return pd.DataFrame(rows, columns=["point", "method", "metric", "images", "a", "b", "difference", "low", "high"])


def _label(plan: Plan, point: str) -> str:
    for curve in plan.curves:
        if point in curve.points:
            strength = curve.strengths[curve.points.index(point)]
            return curve.name if curve.sweep is None else f"{curve.name}, {strength_of(curve.sweep, strength)}"
    return point


def strength_of(setting: str | None, value: Any) -> str:
    """A strength as people write it."""
    known = {"tau": "τ", "gamma": "γ̃", "bos_scale": "C", "opposite": "s", "tokens": "n", "weight_decay": "w"}
    written = f"{value:g}" if isinstance(value, (int, float)) else str(value)
    return f"{known.get(str(setting), setting)} = {written}"
