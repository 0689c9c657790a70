"""‖Δ‖ along the trajectories of a run: where it falls, and how far."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from lib_memnoise.lab.evaluation.results import Results
from lib_memnoise.lab.stats import Values


def crossing(trace: Values, level: float) -> float:
    """The timestep at which ‖Δ‖ is below a level for the first time; 0 if it never is."""
    below = np.flatnonzero(trace[:, 1] < level)
    return float(trace[below[0], 0]) if len(below) else 0.0


def largest_fall(trace: Values, before: float = 500.0, within: int = 5) -> float:
    """How far ‖Δ‖ falls at most within a few steps, in the first half of the trajectory; NaN where there are too few.

    Absolute: one method's is compared with another's. `lab.claims` has the share of ‖Δ‖ that is lost.
    """
    early = trace[trace[:, 0] > before][:, 1]
    return float((early[:-within] - early[within:]).max()) if len(early) > within else math.nan


def traced(found: Results, point: str, value: Callable[[tuple[int, int], Values], float]) -> Values:
    """The mean of something of each image's trace, for every prompt, `(P,)`."""
    per_prompt: dict[int, list[float]] = {}
    for (key, prompt, image), trace in found.traces.items():
        if key == point:
            per_prompt.setdefault(prompt, []).append(value((prompt, image), trace))
    return np.array([np.mean(per_prompt[k]) if k in per_prompt else math.nan for k in range(len(found.plan.prompts))])


def baseline(found: Results) -> str | None:
    """The point that is traced as it was drawn: γ̃ = 0."""
    for curve in found.curves("strengths"):
        if curve.sweep == "gamma" and 0 in curve.strengths:
            return curve.points[curve.strengths.index(0)]
    return None


def half_of_first(found: Results, point: str) -> dict[tuple[int, int], float]:
    """Of each traced image, half of the ‖Δ‖ that it starts from."""
    return {key[1:]: float(trace[0, 1]) / 2 for key, trace in found.traces.items() if key[0] == point}
