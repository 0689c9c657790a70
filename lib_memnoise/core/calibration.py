"""Calibration: a checkpoint's scores of ordinary prompts, and what they say about other scores.

A score is ‖Δ(x_T, T)‖. No threshold is published, and scores differ between checkpoints, sizes and timesteps; so a
score is compared with those of ordinary prompts on the same checkpoint (Wen et al. 2024 report theirs at a fixed rate
of false positives).
"""

from __future__ import annotations

import bisect
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

FORMAT = 1
FEWEST = 20
"""The fewest scores that make a calibration."""
MOST = 256
"""The most prompts of a calibration."""
STRENGTH = 0.63
"""γ̃ times the ‖Δ‖ that counts as ordinary: 0.7 · 0.9 with SD 1.4's published values. SD 2.0's give 0.48, or 0.63 if all
of them are converted by 14.65. This is inferred; nothing is published for other checkpoints."""

TOLERANCE = 50
"""How many timesteps a calibration's first timestep may differ from an image's, after conversion of its scores. On the
miniature's ordinary prompts this causes no more false positives than having only 120 prompts does (at most 3 % where
1 % was wanted; `python -m lib_memnoise score --timesteps`)."""
LOWEST = 870
"""The lowest timestep for which `TOLERANCE` holds."""
SOURCES = {
    "built-in": "built-in prompts",
    "own": "prompts of the user's own",
    "recent": "prompts of recent pictures",
}
"""The sources of a calibration's prompts, and what people see for each."""


class BadCalibration(ValueError):
    """A document is not a valid calibration; the message says why."""


@dataclass(frozen=True)
class Key:
    """The conditions under which a calibration holds."""

    checkpoint: str
    """The checkpoint's hash, or its name where it has none."""
    width: int
    height: int
    parameterization: str
    timestep: int
    """T, the first timestep that the sampler evaluates."""

    @property
    def name(self) -> str:
        """The name of the calibration's file, without an ending: only letters, digits, dots and dashes."""
        checkpoint = re.sub(r"[^A-Za-z0-9.]+", "-", self.checkpoint)[:80].strip("-.") or "checkpoint"
        return f"{checkpoint}-{self.width}x{self.height}-{self.parameterization}-{self.timestep}"


def unit(parameterization: str, alpha_bar: float) -> float:
    """‖Δ‖ of native outputs, "eps" or "v", where the clean latents x̂0 that they predict differ by 1.

    From x = √ᾱ·x0 + √(1 − ᾱ)·ε with x fixed follows Δε = −√(ᾱ/(1 − ᾱ))·Δx̂0; and with v = √ᾱ·ε − √(1 − ᾱ)·x0 follows
    Δv = −Δx̂0/√(1 − ᾱ).
    """
    return math.sqrt((1.0 if parameterization == "v" else alpha_bar) / (1 - alpha_bar))


def beta_quantile(k: int, n: int, probability: float) -> float:
    """The quantile of the Beta distribution with parameters k and n + 1 − k, 1 ≤ k ≤ n, to a relative error of 1e-12.

    The distribution function at x is the probability of at least k successes in n trials with probability x.
    """

    ways = [math.log(math.comb(n, j)) for j in range(k)]

    def at_least(x: float) -> float:
        hit, miss = math.log(x), math.log1p(-x)
        return 1 - sum(math.exp(way + j * hit + (n - j) * miss) for j, way in enumerate(ways))

    low, high = 0.0, 1.0
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if at_least(middle) < probability else (low, middle)
    return (low + high) / 2


def percent(share: float) -> str:
    """A share in percent to two digits, such as "0.83 %"."""
    return (f"{100 * share:#.2g}" if share < 0.0995 else f"{100 * share:.0f}") + " %"


@dataclass(frozen=True)
class Promise:
    """The share of ordinary prompts above a threshold that is the k-th largest of n prompts' scores.

    The share depends on which n prompts happened to be scored: for prompts of the same kind it has a Beta distribution
    with parameters k and n + 1 − k.
    """

    rate: float
    """The share that was wanted."""
    expected: float
    """The distribution's mean, k / (n + 1)."""
    low: float
    high: float
    """The bounds of the middle 95 % of the distribution."""
    count: int
    """The number n of prompts."""

    @property
    def is_kept(self) -> bool:
        """Whether there are enough prompts for the rate that was wanted."""
        return self.expected <= self.rate * (1 + 1e-9)

    def __str__(self) -> str:
        sentence = (
            f"{self.rate * 100:.3g} % false positives asked; with {self.count} prompts 95 %: {percent(self.low)} to "
            f"{percent(self.high)}"
        )
        if not self.is_kept:
            needed = math.ceil(1 / self.rate - 1e-9) - 1
            sentence += f"; so few prompts cannot promise less than {percent(self.expected)}, it takes {needed}"
        return sentence


@dataclass(frozen=True)
class Calibration:
    """A checkpoint's scores of ordinary prompts."""

    key: Key
    scores: tuple[float, ...]
    """In ascending order."""
    source: str | None = None
    """One of `SOURCES`; None in older files, which do not say."""

    def __str__(self) -> str:
        return f"{len(self.scores)} {SOURCES.get(self.source or '', 'prompts')} at timestep {self.key.timestep}"

    def threshold(self, rate: float) -> float:
        """The score above which at most this share of ordinary prompts is expected, new prompts included.

        Of n scores it is the ⌈(n + 1)(1 − rate)⌉-th smallest, or the largest one where there are too few for so small a
        rate.
        """
        return self.scores[-self.rank(rate)]

    def rank(self, rate: float) -> int:
        """The threshold's rank among the scores; the largest score has rank 1."""
        rank = math.ceil((len(self.scores) + 1) * (1 - rate) - 1e-9)
        return len(self.scores) + 1 - min(max(rank, 1), len(self.scores))

    def promise(self, rate: float) -> Promise:
        """The share of ordinary prompts that is really above the threshold for this rate."""
        n, k = len(self.scores), self.rank(rate)
        low, high = (beta_quantile(k, n, probability) for probability in (0.025, 0.975))
        return Promise(rate, k / (n + 1), low, high, n)

    def at(self, factor: float) -> Calibration:
        """The calibration with its scores multiplied by a factor, to convert them to another timestep (`unit`)."""
        return replace(self, scores=tuple(score * factor for score in self.scores))

    def percentile(self, score: float) -> float:
        """The share of ordinary scores at or below this one, in percent."""
        return 100 * bisect.bisect_right(self.scores, score) / len(self.scores)

    @property
    def median(self) -> float:
        """The median of the scores."""
        middle = len(self.scores) // 2
        if len(self.scores) % 2:
            return self.scores[middle]
        return (self.scores[middle - 1] + self.scores[middle]) / 2

    def settings(self, factor: float, rate: float) -> dict[str, Any]:
        """Numbers derived from the scores, in place of a preset's.

        The target is the median of ordinary scores, and γ̃ moves the noise as far as it does with SD 1.4.

        Args:
            factor: `lib_memnoise.settings.size_factor` of the latent. Settings that scale with size are divided by it.
            rate: the rate of false positives for the threshold.
        """
        return {
            "gamma": round(min(STRENGTH * factor / self.median, 10.0), 4),
            "target": round(self.median / factor, 4),
            "target_kind": "absolute",
            "threshold": self.threshold(rate) / factor,
        }

    def document(self) -> dict[str, Any]:
        """The calibration as JSON."""
        return {"format": FORMAT, **asdict(self.key), "source": self.source, "scores": list(self.scores)}


def make_calibration(key: Key, scores: Iterable[float], source: str | None = None) -> Calibration:
    """A calibration made of scores in any order.

    Raises:
        BadCalibration: there are too few scores, or some are not positive numbers.
    """
    ordered = tuple(sorted(float(score) for score in scores))
    if len(ordered) < FEWEST:
        raise BadCalibration(f"a calibration needs at least {FEWEST} scores, not {len(ordered)}")
    if not all(math.isfinite(score) and score > 0 for score in ordered):
        raise BadCalibration("a score is not a positive number")
    return Calibration(key, ordered, source)


def from_document(document: Any) -> Calibration:
    """The calibration in a document that `Calibration.document` made.

    Raises:
        BadCalibration: the document is not a valid calibration.
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
    source = document.get("source")
    if source is not None and (not isinstance(source, str) or source not in SOURCES):
        raise BadCalibration(f"its source is {source!r}")
    return make_calibration(Key(**{name: document[name] for name in kinds}), scores, source)


def distinct(prompts: Iterable[str], most: int) -> list[str]:
    """The distinct prompts that are not blank, in their order; of more than `most`, as many at even distances."""
    unique = list(dict.fromkeys(text for text in (prompt.strip() for prompt in prompts) if text))
    return unique if len(unique) <= most else [unique[k * len(unique) // most] for k in range(most)]


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
    """Distinct prompts that are unlikely to be captions in a training set.

    Raises:
        ValueError: there are not so many combinations.
    """
    if count > len(SUBJECTS) * len(PLACES) * len(STYLES):
        raise ValueError(f"there are no {count} ordinary prompts")
    prompts = []
    for k in range(count):
        turn, subject = divmod(k, len(SUBJECTS))
        place = (subject + 3 * turn) % len(PLACES)
        style = (subject // len(PLACES) + 5 * turn + turn // len(STYLES)) % len(STYLES)
        prompts.append(f"{SUBJECTS[subject]} {PLACES[place]}{STYLES[style]}")
    return prompts
