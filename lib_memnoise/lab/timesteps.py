"""How far a threshold of one first timestep holds at another: the miniature's scores of ordinary prompts along T.

The prompts are none that anything else is measured on; `lib_memnoise.calibration.TOLERANCE` was chosen on them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lib_memnoise.calibration import TOLERANCE
from lib_memnoise.lab.bench import make_network, noises
from lib_memnoise.lab.claims import ordinary_subjects
from lib_memnoise.lab.detection import RATE
from lib_memnoise.lab.study import BATCH, seed_of
from lib_memnoise.miniature.model import Miniature
from lib_memnoise.prediction import magnitude

TIMESTEPS = (999, 981, 951, 926, 901, 876, 851, 801, 741, 681)
"""The last is DPM++ and DDIM at few steps; 981 and 951 are DDIM with 50 and 20 steps, 999 the k-diffusion samplers."""
PROMPTS = 21
"""The draw of the prompts: others are drawn for what is reported elsewhere."""

Values = NDArray[np.float64]


@torch.no_grad()
def scores(
    model: Miniature,
    count: int,
    *,
    timesteps: Sequence[int] = TIMESTEPS,
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
        found = [magnitude(network.delta(x, float(t), counted=False)[0]) for t in timesteps]
        parts.append(torch.stack(found))
        progress(len(captions))
    return np.asarray(torch.cat(parts, dim=1).double().numpy())


def false_positives(found: Values, rate: float = RATE) -> Values:
    """The share of scores at each T (columns) above the (1 − rate) quantile of those at another (rows), `(T, T)`."""
    thresholds = np.quantile(found, 1 - rate, axis=1)
    return np.asarray((found[None] > thresholds[:, None, None]).mean(2))


def documents(found: Values, timesteps: Sequence[int] = TIMESTEPS) -> list[dict[str, Any]]:
    """A record for every pair of a calibration's timestep and another."""
    shares = false_positives(found)
    return [
        {"calibrated_at": t, "scored_at": other, "false_positives": float(shares[i, j])}
        for i, t in enumerate(timesteps)
        for j, other in enumerate(timesteps)
    ]


def report(found: Values, timesteps: Sequence[int] = TIMESTEPS) -> str:
    """A table: how ordinary prompts score at each T, and their false positives by the threshold of another."""
    shares = false_positives(found)
    lines = [
        f"{found.shape[1]} ordinary prompts, a noise each. Rows: T of the calibration; columns: T at which is scored; "
        f"% above the threshold of {RATE:.0%}. *: further away than {TOLERANCE} timesteps.",
        "",
        f"{'T':>5}  median  {1 - RATE:.0%}    " + " ".join(f"{t:>6}" for t in timesteps),
    ]
    for i, t in enumerate(timesteps):
        cells = (f"{100 * shares[i, j]:.1f}" + "*" * (abs(t - o) > TOLERANCE) for j, o in enumerate(timesteps))
        middle, high = np.quantile(found[i], [0.5, 1 - RATE])
        lines.append(f"{t:>5}  {middle:6.2f}  {high:6.2f} " + " ".join(f"{cell:>6}" for cell in cells))
    return "\n".join(lines)
