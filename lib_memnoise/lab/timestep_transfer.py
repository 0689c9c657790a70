"""How far a threshold of one first timestep holds at another: the miniature's scores of ordinary prompts along T.

Nothing else is measured on these prompts; `lib_memnoise.core.calibration.TOLERANCE` and `LOWEST` were chosen on them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from lib_memnoise.core.calibration import unit
from lib_memnoise.core.calibration_store import serves
from lib_memnoise.core.delta import magnitude
from lib_memnoise.core.schedule import alpha_bar
from lib_memnoise.lab.claims import ordinary_subjects
from lib_memnoise.lab.detection import RATE
from lib_memnoise.lab.experiment import BATCH, seed_of
from lib_memnoise.lab.miniature.model import Miniature
from lib_memnoise.lab.simulator import make_network, noises
from lib_memnoise.lab.stats import Values

TIMESTEPS = (999, 981, 951, 926, 901, 876, 851, 801, 741, 681)
"""999: samplers in sigmas. 981, 951, 901, 876: DDIM with 50, 20, 10, 8 steps."""
PROMPTS = 21
"""The draw of the prompts: others are drawn for what is reported elsewhere."""


@torch.no_grad()
def scores(
    model: Miniature,
    count: int,
    *,
    seed: int = 1,
    progress: Callable[[int], None] = lambda done: None,
) -> Values:
    """‖Δ(x, T)‖ of one noise of each prompt at every T, `(T, N)`."""
    chosen = ordinary_subjects(count, PROMPTS)
    parts = []
    for start in range(0, count, BATCH):
        captions = [subject.caption for subject in chosen[start : start + BATCH]]
        network = make_network(model, captions)
        x = noises([seed_of(start + k, 0, seed) for k in range(len(captions))])
        found = [magnitude(network.delta(x, float(t), counted=False)[0]) for t in TIMESTEPS]
        parts.append(torch.stack(found))
        progress(len(captions))
    return np.asarray(torch.cat(parts, dim=1).double().numpy())


def units(parameterization: str, timesteps: Sequence[int] = TIMESTEPS) -> Values:
    """By which scores are divided to be compared with those of another T, `(T,)`."""
    return np.array([unit(parameterization, alpha_bar(t)) for t in timesteps])


def false_positives(found: Values, scale: Values | None = None, rate: float = RATE) -> Values:
    """The share of scores at each T (columns) above the (1 − rate) quantile of those at another (rows), `(T, T)`.

    `scale` converts one to the other: None takes them as they are. The quantile is interpolated between scores: a
    calibration's threshold, by which `detection` counts, errs on the side of fewer false positives instead.
    """
    if scale is not None:
        found = found / scale[:, None]
    thresholds = np.quantile(found, 1 - rate, axis=1)
    return np.asarray((found[None] > thresholds[:, None, None]).mean(2))


def documents(found: Values, parameterization: str) -> list[dict[str, Any]]:
    """A record for every pair of a calibration's timestep and another; a calibration is converted unless it is raw."""
    raw, converted = false_positives(found), false_positives(found, units(parameterization))
    return [
        {"calibrated_at": t, "scored_at": o, "raw": float(raw[i, j]), "false_positives": float(converted[i, j])}
        for i, t in enumerate(TIMESTEPS)
        for j, o in enumerate(TIMESTEPS)
    ]


def report(found: Values, parameterization: str) -> str:
    """Tables: how ordinary prompts score at each T, and their false positives by the threshold of another."""
    lines = [f"{found.shape[1]} ordinary prompts, a noise each.", "", f"{'T':>5}  median  {1 - RATE:.0%}"]
    for scores_at, t in zip(found, TIMESTEPS):
        middle, high = np.quantile(scores_at, [0.5, 1 - RATE])
        lines.append(f"{t:>5}  {middle:6.2f}  {high:6.2f}")
    for title, scale in (("as they are", None), ("converted", units(parameterization))):
        shares = false_positives(found, scale)
        lines += [
            "",
            f"% of false positives where {RATE:.0%} was asked. Rows: T of the calibration; columns: T that is scored. "
            f"Thresholds {title}; *: a calibration that does not serve.",
            f"{'T':>5} " + " ".join(f"{t:>6}" for t in TIMESTEPS),
        ]
        for i, t in enumerate(TIMESTEPS):
            cells = (f"{100 * shares[i, j]:.1f}" + "*" * (not serves(t, o)) for j, o in enumerate(TIMESTEPS))
            lines.append(f"{t:>5} " + " ".join(f"{cell:>6}" for cell in cells))
    return "\n".join(lines)
