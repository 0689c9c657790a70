"""Statistics over prompts: bootstrap intervals, estimates with theirs, the value of a curve at a point of another.

Intervals are 95 % percentile bootstrap intervals over prompts: images of one prompt are not independent. Every interval
draws from the same seed, so that the same measurements always have the same one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap, mannwhitneyu

RESAMPLES = 2000

Values = NDArray[np.float64]
Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Estimate:
    """A number over prompts and its 95 % interval; NaN where there is nothing, or too little to tell."""

    value: float
    low: float
    high: float
    prompts: int

    def __str__(self) -> str:
        if math.isnan(self.value):
            return "–"
        return f"{self.value:.3f}" + ("" if math.isnan(self.low) else f" [{self.low:.3f}, {self.high:.3f}]")

    def verdict(self, needed: float, *, below: bool = False) -> bool | None:
        """Whether the whole interval is above what is needed, or with `below` below it.

        False: it is on the other side; None: on both, or there is none.
        """
        low, high = self.low, self.high
        if math.isnan(low):
            return None
        if below:
            low, high = 2 * needed - high, 2 * needed - low
        return True if low > needed else False if high <= needed else None


NOTHING = Estimate(math.nan, math.nan, math.nan, 0)


def interval(*counts: int, statistic: Callable[..., float], resamples: int = RESAMPLES) -> tuple[float, float]:
    """The bootstrap interval of a statistic, which is given the indices of the prompts drawn; NaN of fewer than two.

    With several numbers of prompts each set is drawn from on its own.
    """
    if min(counts) < 2:
        return math.nan, math.nan
    found = bootstrap(
        tuple(np.arange(count) for count in counts),
        statistic,
        n_resamples=resamples,
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
    # What `interval` draws, but the means of all resamples at once: a table has hundreds of them.
    drawn = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.percentile(values[drawn].mean(1), [2.5, 97.5])
    return Estimate(float(values.mean()), float(low), float(high), len(values))


def ratio(ours: Values, theirs: Values) -> Estimate:
    """The mean over prompts divided by another's, `(P,)` each; prompts without both do not count."""
    complete = ~np.isnan(ours + theirs)
    ours, theirs = ours[complete], theirs[complete]
    if not len(ours):
        return NOTHING
    low, high = interval(len(ours), statistic=lambda drawn: float(ours[drawn].mean() / theirs[drawn].mean()))
    return Estimate(float(ours.mean() / theirs.mean()), low, high, len(ours))


def along(curve: Iterable[tuple[float, float]], at: float, *, left: float | None = None) -> float:
    """The height of a curve of points (x, y) at an x, interpolated between them.

    Outside of the curve it is that of its end, or with `left` this number to the left of it.
    """
    x, y = np.array(sorted(curve)).T
    return float(np.interp(at, x, y, left=left))


def slopes(strengths: Values, values: Values) -> Values:
    """By how much a value `(P, S)` grows with the strength `(S,)`, of every prompt, `(P,)`; least squares."""
    centred = strengths - strengths.mean()
    return np.asarray(values @ centred / (centred @ centred))


def auc(memorised: Values, control: Values) -> float:
    """The probability that a memorised prompt's score is above a control's."""
    found = mannwhitneyu(memorised.ravel(), control.ravel())
    return float(found.statistic) / (memorised.size * control.size)
