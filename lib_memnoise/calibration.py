"""What a checkpoint's scores of ordinary prompts say of another score.

A score is ‖Δ(x_T, T)‖. No threshold is published, and scores differ between checkpoints, sizes and timesteps; so they
are compared with those of ordinary prompts on the same checkpoint (Wen et al. 2024 report theirs at a fixed rate of
false positives).
"""

from __future__ import annotations

import bisect
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

FORMAT = 1
FEWEST = 20
"""Scores without which there is no distribution to speak of."""
STRENGTH = 0.63
"""γ̃ times the ‖Δ‖ that counts as ordinary: 0.7 · 0.9 with SD 1.4's published values. SD 2.0's give 0.48, or 0.63 with
their conversion by 14.65 throughout. Inferred: nothing is published for other checkpoints."""


class BadCalibration(ValueError):
    """A document that is no calibration; the message says why."""


@dataclass(frozen=True)
class Key:
    """What a calibration belongs to."""

    checkpoint: str
    """The checkpoint's hash, or its name where it has none."""
    width: int
    height: int
    parameterization: str
    timestep: int
    """T, the first timestep that the sampler evaluates."""

    @property
    def name(self) -> str:
        """For a file: only letters, digits, dots and dashes."""
        checkpoint = re.sub(r"[^A-Za-z0-9.]+", "-", self.checkpoint)[:80].strip("-.") or "checkpoint"
        return f"{checkpoint}-{self.width}x{self.height}-{self.parameterization}-{self.timestep}"


@dataclass(frozen=True)
class Calibration:
    """Scores of ordinary prompts."""

    key: Key
    scores: tuple[float, ...]
    """Rising."""

    def threshold(self, rate: float) -> float:
        """The score above which at most this share of ordinary prompts lies, for scores to come as well.

        With n scores it is the ⌈(n + 1)(1 − rate)⌉-th smallest; where there are too few for so small a rate, the
        largest one.
        """
        rank = math.ceil((len(self.scores) + 1) * (1 - rate) - 1e-9)
        return self.scores[min(max(rank, 1), len(self.scores)) - 1]

    def percentile(self, score: float) -> float:
        """The share of ordinary scores at or below this one, in percent."""
        return 100 * bisect.bisect_right(self.scores, score) / len(self.scores)

    @property
    def median(self) -> float:
        middle = len(self.scores) // 2
        if len(self.scores) % 2:
            return self.scores[middle]
        return (self.scores[middle - 1] + self.scores[middle]) / 2

    def settings(self, factor: float, rate: float) -> dict[str, Any]:
        """Strength and target derived from the scores, as a preset has them.

        An image is brought to where half of the ordinary ones are; γ̃ moves the noise as far as SD 1.4's does.

        Args:
            factor: `lib_memnoise.settings.size_factor` of the latent; what scales with size is divided by it.
            rate: of false positives.
        """
        return {
            "gamma": round(min(STRENGTH * factor / self.median, 10.0), 4),
            "target": round(self.median / factor, 4),
            "target_kind": "absolute",
            "threshold": round(self.threshold(rate) / factor, 4),
        }

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {"format": FORMAT, **asdict(self.key), "scores": list(self.scores)}


def make(key: Key, scores: Iterable[float]) -> Calibration:
    """A calibration of scores in any order.

    Raises:
        BadCalibration: there are too few, or some are no positive numbers.
    """
    found = tuple(sorted(float(score) for score in scores))
    if len(found) < FEWEST:
        raise BadCalibration(f"a calibration needs at least {FEWEST} scores, not {len(found)}")
    if not all(math.isfinite(score) and score > 0 for score in found):
        raise BadCalibration("a score is not a positive number")
    return Calibration(key, found)


def from_document(document: Any) -> Calibration:
    """The calibration that `Calibration.document` gave.

    Raises:
        BadCalibration: it is none.
    """
    if not isinstance(document, Mapping) or document.get("format") != FORMAT:
        raise BadCalibration(f"it is no calibration of format {FORMAT}")
    kinds = {"checkpoint": str, "width": int, "height": int, "parameterization": str, "timestep": int}
    for name, kind in kinds.items():
        if not isinstance(document.get(name), kind):
            raise BadCalibration(f"its {name} is {document.get(name)!r}")
    scores = document.get("scores")
    if not isinstance(scores, list) or not all(isinstance(score, (int, float)) for score in scores):
        raise BadCalibration("its scores are no list of numbers")
    return make(Key(**{name: document[name] for name in kinds}), scores)


SUBJECTS = (
    "an old fisherman mending a net", "a girl with a yellow umbrella", "two foxes playing", "a baker behind a counter",
    "a rusty tractor", "a stone bridge over a stream", "a bowl of noodle soup", "a cellist tuning her instrument",
    "a sleeping cat", "a lighthouse", "a market stall with oranges", "a boy flying a kite", "a wooden rocking chair",
    "a flock of starlings", "a cracked teapot", "a mountain hut", "a motorcycle mechanic", "a paper boat", "a heron",
    "a tailor's workshop", "a bus stop", "a row of beach huts", "a potter at the wheel", "an abandoned greenhouse",
    "a shepherd and her dog", "a chess player", "a pile of old books", "a ferris wheel", "a beekeeper",
    "an astronomer at a telescope",
)  # fmt: skip
PLACES = (
    "at dawn", "in heavy rain", "under a pale winter sky", "in a narrow street", "by the sea", "in soft evening light",
    "seen from above", "in a snowy field", "beside a canal", "in the fog",
)  # fmt: skip
STYLES = (
    "", ", watercolour", ", pencil sketch", ", film photograph", ", oil on canvas", ", flat illustration",
    ", woodcut print", ", wide angle",
)  # fmt: skip
ORDINARY = 120


def ordinary_prompts(count: int = ORDINARY) -> list[str]:
    """Prompts that hardly stand under pictures of a training set: every one is a combination of its own."""
    if count > len(SUBJECTS) * len(PLACES) * len(STYLES):
        raise ValueError(f"there are no {count} ordinary prompts")
    found = []
    for k in range(count):
        turn, subject = divmod(k, len(SUBJECTS))
        place = (subject + 3 * turn) % len(PLACES)
        style = (subject // len(PLACES) + 5 * turn + turn // len(STYLES)) % len(STYLES)
        found.append(f"{SUBJECTS[subject]} {PLACES[place]}{STYLES[style]}")
    return found
