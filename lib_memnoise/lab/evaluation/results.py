"""What a run's records say, as tables: means over prompts with intervals, weight decay, what changed between runs."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from scipy.spatial.distance import jensenshannon
from scipy.stats import chi

from lib_memnoise.lab.evaluation.metrics import METRICS, label_of
from lib_memnoise.lab.evaluation.plan import Curve, Plan
from lib_memnoise.lab.evaluation.run import NEAREST, Run, columns_of
from lib_memnoise.lab.stats import Estimate, Values, estimate

COUNTS = ("rows", "backward_rows", "before", "after", "norm", "seconds", "memory")
"""What a record counts, beside the metrics."""
DRAWS = 20
"""Sets of drawn noises that lengths are compared with."""


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
    return np.asarray(chi.rvs(size, size=count, random_state=np.random.default_rng(seed)) / math.sqrt(size))


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
