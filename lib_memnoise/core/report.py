"""State and report of one generation. Knows no host: hosts fill it in, and write it out."""

from __future__ import annotations

from dataclasses import dataclass, field

from lib_memnoise.settings import INFOTEXT, Settings


@dataclass(frozen=True)
class TracePoint:
    """‖Δ(x_t, t)‖ of one image at one evaluation of its sampler."""

    t: float
    magnitude: float
    guided: bool
    """Guidance was on."""
    against: str
    """"empty" or "negative": the prompt it is measured against."""


@dataclass
class ImageReport:
    """What happened to one image in one pass. None: not measured."""

    before: float | None = None
    """‖Δ(x_T, T)‖ of the noise as drawn."""
    after: float | None = None
    """‖Δ(x̃_T, T)‖, only where the method evaluates it anyway."""
    steps: int | None = None
    """Optimiser steps taken (per-sample)."""
    norm: float | None = None
    """‖x̃_T‖/√d."""
    sampled: float | None = None
    """‖Δ‖ in the first step of what was sampled, against the prompt as evaluated; only where it was looked at."""
    forward_rows: int = 0
    """Network rows evaluated: one row is one image under one prompt at one timestep."""
    backward_rows: int = 0
    looked_rows: int = 0
    """Of the forward rows, those evaluated only for the sake of ‖Δ‖ along the trajectory."""
    used: dict[str, object] = field(default_factory=dict)
    """The values that took effect, after preset and scaling, and the first timestep T."""
    notes: list[str] = field(default_factory=list)
    failed: str | None = None
    """Why the image was generated without mitigation."""
    threshold: float | None = None
    """The score above which an image is mitigated, where only such images are."""
    calibration: str | None = None
    """The calibration that numbers come from."""
    blank: bool = False
    """The pass's prompt is empty, so that there is nothing to adjust."""
    left_alone: bool = False
    """Not mitigated, because its score is not above the threshold."""
    prompt: str | None = None
    """What was encoded instead of its prompt."""
    transition: float | None = None
    """Where guidance started at the image's own transition point: its timestep."""
    trace: list[TracePoint] = field(default_factory=list)
    baseline: list[TracePoint] = field(default_factory=list)
    """The trace of the noise as drawn, sampled without adjustment; empty unless the settings want it."""
    hires: ImageReport | None = None
    """What happened in the second pass of hires fix, of a first pass's report; None: that is not adjusted."""

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    @property
    def passes(self) -> list[ImageReport]:
        return [self] if self.hires is None else [self, self.hires]

    @property
    def every_note(self) -> list[str]:
        """Of both passes."""
        return self.notes + [f"hires pass: {note}" for note in ([] if self.hires is None else self.hires.notes)]


REPORT_KEYS = (
    "used", "prompt", "magnitude", "magnitude after", "mitigated", "calibration", "steps taken", "norm",
    "transition at", "rows", "backward rows", "note", "failed",
)  # fmt: skip
HIRES_KEYS = (
    "hires used", "hires prompt", "hires magnitude", "hires magnitude after", "hires steps taken", "hires norm",
    "hires transition at", "hires failed",
)  # fmt: skip
"""Of the second pass of hires fix, where it is adjusted as well. Rows and notes are those of both passes."""


@dataclass
class Generation:
    """One generation: its settings, and a report for each image by (batch number, place in the batch)."""

    settings: Settings
    preset: str = "sd1"
    """What "auto" stands for on the checkpoint that was loaded first; a hires pass may have another."""
    pinned: Settings | None = None
    """The settings as the infotext has them."""
    fail_instead: bool = False
    remarks: list[str] = field(default_factory=list)
    """Notes for all images."""
    trace_id: str | None = None
    """The name that the traces of its images are stored under."""
    images: dict[tuple[int, int], ImageReport] = field(default_factory=dict)
    looks_at_first: bool = False
    """‖Δ‖ of the first step is wanted of every image, also where guidance is off and nothing is traced."""
    left_out: float = 0.0
    """Seconds of adjusting that the host's time since the job began is without, while it samples."""
    placed: object = None
    """The adjusted noise, where the host has it from us and has not taken it yet."""

    def __post_init__(self) -> None:
        self.fail_instead = self.fail_instead or self.settings.fail_instead

    def image(self, batch: int, place: int) -> ImageReport:
        return self.images.setdefault((batch, place), ImageReport())

    @property
    def keys(self) -> tuple[str, ...]:
        """Those of `report_infotext` that may have values."""
        return REPORT_KEYS + HIRES_KEYS if self.settings.hires else REPORT_KEYS

    def batch(self, batch: int) -> list[ImageReport]:
        return [report for (number, _), report in sorted(self.images.items()) if number == batch]


def report_infotext(report: ImageReport) -> dict[str, str | int | None]:
    """What happened to an image, in infotext form: a value for each report key, None where there is none."""
    rows, backward = (sum(getattr(own, name) for own in report.passes) for name in ("forward_rows", "backward_rows"))
    values = {
        **_of_pass(report),
        "mitigated": None if report.threshold is None else str(not report.left_alone),
        "calibration": report.calibration,
        "rows": rows or None,
        "backward rows": backward or None,
        "note": "; ".join(report.every_note) or None,
    }
    second = _of_pass(report.hires or ImageReport())
    values |= {f"hires {key}": value for key, value in second.items()}
    return {f"{INFOTEXT} {key}": values[key] for key in REPORT_KEYS + HIRES_KEYS}


def _of_pass(report: ImageReport) -> dict[str, str | int | None]:
    used = (f"{k}={v:.6g}" if isinstance(v, float) else f"{k}={v}" for k, v in report.used.items())
    return {
        "used": " ".join(used) or None,
        "prompt": report.prompt,
        "magnitude": _number(report.before),
        "magnitude after": _number(report.after),
        "steps taken": report.steps,
        "norm": _number(report.norm, 6),
        "transition at": _number(report.transition),
        "failed": report.failed,
    }


def _number(value: float | None, digits: int = 4) -> str | None:
    return None if value is None else f"{value:.{digits}g}"
