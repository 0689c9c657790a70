"""What an evaluation generates: prompts × methods × strengths × seeds, all from the same noises."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from lib_memnoise.lab.evaluation.prompts import Prompt, read, training_pictures
from lib_memnoise.lab.miniature import OneSentence
from lib_memnoise.settings import SettingError, from_mapping, from_text, used_settings

PLANS = Path(__file__).parent / "plans"
"""The plans that come with the project, as plans are written."""
FIGURES = {
    "adjustment": "with and without adjustment of the noise (Figure 4)",
    "methods": "every method at its strengths (Figures 5, 6, 8 and 11, Table 3)",
    "windows": "guidance from one timestep on (Figure 1)",
    "strengths": "‖Δ‖ without guidance, at several strengths (Figures 2, 3 and 9)",
    "per_sample": "‖Δ‖ without guidance, per-sample (Figure 10)",
    "weight_decay": "per-sample's weight decay (Tables 1 and 2)",
}
METRICS = ("sscd", "clip", "lpips", "imagereward", "similarity", "alignment", "diversity")
"""The metrics that a plan may name; `metrics.METRICS` has how they are measured."""
MEASURED = ("adjustment", "methods", "weight_decay")
"""Figures whose images are measured by the metrics."""
SEEDS = 2**32
_COUNT = {"type": "integer", "minimum": 1}
_SETTINGS = {"type": ["object", "null"]}
SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "additionalProperties": False,
    "required": ["prompts", "curves"],
    "properties": {
        "about": {"type": "string"},
        "prompts": {"type": "string", "minLength": 1},
        "ground_truth": {"type": "string"},
        "first": {**_COUNT, "description": "only so many prompts"},
        "images": {**_COUNT, "maximum": 1000},
        "batch": {**_COUNT, "maximum": 64},
        "seed": {"type": "integer", "minimum": 0, "maximum": SEEDS - 1},
        "sampler": {"type": "string", "minLength": 1},
        "scheduler": {"type": "string"},
        "steps": {**_COUNT, "maximum": 1000},
        "cfg": {"type": "number", "minimum": 1, "maximum": 30},
        "width": {"type": "integer", "minimum": 64, "maximum": 2048, "multipleOf": 8},
        "height": {"type": "integer", "minimum": 64, "maximum": 2048, "multipleOf": 8},
        "negative_prompt": {"type": "string"},
        "options": {"type": "object", "description": "the WebUI's settings, as override_settings takes them"},
        "metrics": {"type": "array", "items": {"type": "string"}},
        "curves": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "additionalProperties": False,
                "required": ["name"],
                "properties": {
                    "name": {"type": "string", "minLength": 1},
                    "settings": _SETTINGS,
                    "sweep": {
                        "type": "object",
                        "minProperties": 1,
                        "maxProperties": 1,
                        "additionalProperties": {"type": "array", "minItems": 1},
                    },
                    "figures": {"type": "array", "items": {"enum": list(FIGURES)}},
                    "prompts": _COUNT,
                    "images": _COUNT,
                },
            },
        },
    },
}  # fmt: skip


class BadPlan(OneSentence):
    """A plan that cannot be used: where and why."""


@dataclass(frozen=True)
class Point:
    """One method at one strength. Points of the same settings are one, in whatever curves they are."""

    settings: Mapping[str, Any] | None
    """As the API takes them; None: no mitigation."""
    prompts: int
    """It is generated of the first so many."""
    images: int

    @property
    def key(self) -> str:
        """Its name in the run's folder: the method, and what it is told from others by."""
        if self.settings is None:
            return "none"
        text = json.dumps(used_settings(from_mapping({"enabled": True, **self.settings})), sort_keys=True)
        method = self.settings.get("method", "batch_wise")
        return f"{method}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class Curve:
    """A method at its strengths."""

    name: str
    figures: tuple[str, ...]
    sweep: str | None
    """The setting that is swept."""
    strengths: tuple[Any, ...]
    points: tuple[str, ...]
    """The key of the point of each strength."""
    method: str
    """"none": no mitigation."""


@dataclass(frozen=True)
class Unit:
    """What is asked for at once: images of one prompt at one point, with consecutive seeds."""

    point: str
    prompt: int
    first: int
    """The first image's number."""
    count: int


@dataclass(frozen=True)
class Request:
    """All that a generator needs to know of a unit's images."""

    caption: str
    settings: Mapping[str, Any] | None
    """memnoise's, as the API takes them; None: off."""
    seed: int
    """Of the first image; the others follow it."""
    count: int
    sampler: str
    scheduler: str
    steps: int
    cfg: float
    width: int
    height: int
    negative_prompt: str
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Plan:
    """A validated plan. `document` is what it was made from, with everything in it that was left to defaults."""

    document: Mapping[str, Any]
    prompts: tuple[Prompt, ...]
    points: Mapping[str, Point]
    curves: tuple[Curve, ...] = field(default=())
    references: tuple[str, ...] = field(default=())
    """All training pictures, also those of no prompt of the plan: a copy of any is a copy."""

    def __getattr__(self, name: str) -> Any:
        """`images`, `batch`, `seed`, `sampler`, `steps`, …: see DEFAULTS."""
        if name == "document" or name not in self.document:
            raise AttributeError(name)
        return self.document[name]

    @property
    def total(self) -> int:
        """Images in all."""
        return sum(point.prompts * point.images for point in self.points.values())

    def measured(self) -> set[str]:
        """The points whose images the metrics measure."""
        return {key for curve in self.curves if set(curve.figures) & set(MEASURED) for key in curve.points}

    def seed_of(self, prompt: int, image: int) -> int:
        """The same for every point, so that methods are compared on the same noises."""
        return int((self.seed + 100_000 * prompt + image) % SEEDS)

    def request(self, unit: Unit) -> Request:
        return Request(
            self.prompts[unit.prompt].caption,
            self.points[unit.point].settings,
            self.seed_of(unit.prompt, unit.first),
            unit.count,
            **{name: self.document[name] for name in _SAMPLING},
        )

    def wanted(self) -> Iterator[tuple[str, int, int]]:
        """Point, prompt and number of images, prompt by prompt: what is there of an unfinished run is comparable."""
        for prompt in range(len(self.prompts)):
            for key, point in self.points.items():
                if prompt < point.prompts:
                    yield key, prompt, point.images

    def defining(self) -> dict[str, Any]:
        """What makes an image what it is: a run holds the images of one such thing only."""
        free = ("about", "metrics", "batch", "curves", "prompts", "ground_truth", "first")
        same = {name: value for name, value in self.document.items() if name not in free}
        captions = json.dumps([[prompt.caption, prompt.kind] for prompt in self.prompts])
        return {
            **same,
            "prompts": f"{len(self.prompts)} ({hashlib.sha256(captions.encode()).hexdigest()[:12]})",
            "methods": sorted(f"{key} {point.prompts}x{point.images}" for key, point in self.points.items()),
        }


_SAMPLING = ("sampler", "scheduler", "steps", "cfg", "width", "height", "negative_prompt", "options")
DEFAULTS: dict[str, Any] = {
    "about": "",
    "images": 10,
    "batch": 1,
    "seed": 1,
    "sampler": "DDIM",
    "scheduler": "",
    "steps": 50,
    "cfg": 7,
    "width": 512,
    "height": 512,
    "negative_prompt": "",
    "options": {},
    "metrics": ["sscd", "clip", "lpips", "imagereward"],
}


def presets() -> list[str]:
    """Names of the plans that come with the project."""
    return sorted(path.stem for path in PLANS.glob("*.yaml"))


def document(name: str | None) -> tuple[dict[str, Any], str]:
    """A plan's document, and what to call it: of a preset or a file; empty without either."""
    if name is None:
        return {}, "the plan"
    path = PLANS / f"{name}.yaml" if name in presets() else Path(name)
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadPlan(f"there is no plan {name!r}; it must be a file, or one of {', '.join(presets())}.") from None
    except UnicodeDecodeError:
        raise BadPlan(f"{path} is not valid; it must be UTF-8 text.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        raise BadPlan(f"{path}{where}: it is no YAML ({getattr(error, 'problem', error)}).") from None
    if not isinstance(found, dict):
        raise BadPlan(f"{path} is not valid; it must have prompts and curves.")
    # Files are named from the plan's own folder, whichever that is.
    for key in ("prompts", "ground_truth"):
        if isinstance(found.get(key), str) and (path.parent / found[key]).exists():
            found[key] = str((path.parent / found[key]).resolve())
    return found, str(path)


def curve_of(text: str) -> dict[str, Any]:
    """A curve from the command line: `METHOD`, or `METHOD:SETTING=VALUE:SETTING=VALUE,VALUE,…`; `none`: no mitigation.

    Raises:
        BadPlan: it has another form.
    """
    method, *rest = text.split(":")
    if method == "none" and not rest:
        return {"name": "none", "settings": None}
    settings: dict[str, Any] = {"method": method}
    sweep: dict[str, list[Any]] = {}
    for part in rest:
        name, equals, values = part.partition("=")
        if not equals:
            raise BadPlan(f"--method {text}: {part!r} is not valid; it must be SETTING=VALUE or SETTING=VALUE,VALUE.")
        try:
            found = [from_text(name, value) for value in values.split(",")]
        except SettingError as error:
            raise BadPlan(f"--method {text}: {_unprefixed(error)}") from None
        if len(found) == 1:
            settings[name] = found[0]
        elif sweep:
            raise BadPlan(f"--method {text}: {next(iter(sweep))} and {name} have several values; one setting may.")
        else:
            sweep[name] = found
    return {"name": text, "settings": settings, **({"sweep": sweep} if sweep else {})}


def _unprefixed(error: SettingError) -> str:
    return str(error).removeprefix("memnoise: ")


def make(
    given: Mapping[str, Any],
    name: str = "the plan",
    prompts: Sequence[Prompt] | None = None,
    references: Sequence[str] | None = None,
) -> Plan:
    """A plan from its document; `prompts` and `references` instead of those that the document names.

    Raises:
        BadPlan, BadPrompts: it cannot be used; where and why.
    """
    problem = next(iter(jsonschema.Draft202012Validator(SCHEMA).iter_errors(dict(given))), None)
    if problem is not None:
        where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in problem.path).lstrip(".")
        raise BadPlan(f"{name}{', ' if where else ''}{where}: {problem.message}.")
    full = {**DEFAULTS, **given}
    ground_truth = Path(full["ground_truth"]) if full.get("ground_truth") else None
    every = read(full["prompts"], ground_truth) if prompts is None else prompts
    if prompts is None:
        prompts = every[: full.get("first")]
    if references is None:
        references = training_pictures(every, full["prompts"], ground_truth)
    seen: set[str] = set()
    # `add` returns None: the first caption that is there already.
    twice = next((p.caption for p in prompts if p.caption in seen or seen.add(p.caption)), None)  # type: ignore[func-returns-value]
    if twice is not None:
        raise BadPlan(f"{name}, prompts: {twice!r} is there twice.")
    points: dict[str, Point] = {}
    curves = []
    names: set[str] = set()
    for entry in full["curves"]:
        if entry["name"] in names:
            raise BadPlan(f"{name}, curves: there are two of the name {entry['name']!r}.")
        names.add(entry["name"])
        curves.append(_curve(entry, len(prompts), full["images"], points, name))
    for metric in full["metrics"]:
        if metric not in METRICS:
            raise BadPlan(f"{name}, metrics: {metric!r} is not known; known are {', '.join(METRICS)}.")
    return Plan(full, tuple(prompts), points, tuple(curves), tuple(references))


def _curve(entry: Mapping[str, Any], prompts: int, images: int, points: dict[str, Point], name: str) -> Curve:
    """A curve, whose points are added to the others."""
    settings, sweep = entry.get("settings"), entry.get("sweep")
    setting, strengths = next(iter(sweep.items())) if sweep else (None, [None])
    if settings is None and sweep:
        raise BadPlan(f"{name}, curve {entry['name']!r}: without settings there is nothing to sweep.")
    keys = []
    for strength in strengths:
        point = Point(
            None if settings is None else {**settings, **({} if setting is None else {setting: strength})},
            min(entry.get("prompts", prompts), prompts),
            entry.get("images", images),
        )
        try:
            key = point.key
        except SettingError as error:
            raise BadPlan(f"{name}, curve {entry['name']!r}: {_unprefixed(error)}") from None
        known = points.get(key)
        if known is not None:
            point = replace(known, prompts=max(known.prompts, point.prompts), images=max(known.images, point.images))
        points[key] = point
        keys.append(key)
    method = "none" if settings is None else settings.get("method", "batch_wise")
    return Curve(
        entry["name"], tuple(entry.get("figures", ["methods"])), setting, tuple(strengths), tuple(keys), method
    )


def chunks(missing: Sequence[int], most: int) -> Iterator[tuple[int, int]]:
    """First and count of runs of consecutive numbers, none longer than `most`."""
    start = 0
    while start < len(missing):
        end = start + 1
        while end < len(missing) and end - start < most and missing[end] == missing[end - 1] + 1:
            end += 1
        yield missing[start], end - start
        start = end
