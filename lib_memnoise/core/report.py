"""The state and the report of one generation. Hosts fill it in and write it out; it knows none of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from lib_memnoise.settings import INFOTEXT, Settings


@dataclass(frozen=True)
class TracePoint:
    """‖Δ(x_t, t)‖ of one image at one evaluation of its sampler."""

    t: float
    magnitude: float
    guided: bool
    """Whether guidance was on."""
    against: str
    """The prompt that it is measured against: "empty" or "negative"."""


@dataclass
class ImageReport:
    """What happened to one image in one pass. A measurement is None where it was not made."""

    before: float | None = None
    """‖Δ(x_T, T)‖ of the noise as drawn."""
    after: float | None = None
    """‖Δ(x̃_T, T)‖, measured only where the method evaluates it anyway."""
    steps: int | None = None
    """Optimiser steps taken (per-sample)."""
    norm: float | None = None
    """‖x̃_T‖/√d."""
    sampled: float | None = None
    """‖Δ‖ in the sampler's first step, of the noise that was sampled and the prompt as it was evaluated."""
    forward_rows: int = 0
    """Network rows evaluated. One row is one image under one prompt at one timestep."""
    backward_rows: int = 0
    """Network rows that gradients were propagated through."""
    looked_rows: int = 0
    """The forward rows that were evaluated only to measure ‖Δ‖ along the trajectory."""
    used: dict[str, object] = field(default_factory=dict)
    """The values that took effect, after preset and scaling, and the first timestep T."""
    notes: list[str] = field(default_factory=list)
    failed: str | None = None
    """Why the image was generated without mitigation."""
    threshold: float | None = None
    """The score above which an image is mitigated; None where all images are."""
    calibration: str | None = None
    """The calibration that the numbers come from."""
    blank: bool = False
    """Whether the pass's prompt is empty, so that there is nothing to adjust."""
    left_alone: bool = False
    """Whether the image is not mitigated: its score is not above the threshold, or its prompt is blank."""
    prompt: str | None = None
    """The text that was encoded instead of the image's prompt."""
    transition: float | None = None
    """The timestep of the image's own transition point, where guidance started at it."""
    trace: list[TracePoint] = field(default_factory=list)
    baseline: list[TracePoint] = field(default_factory=list)
    """The trace of the noise as drawn, sampled without adjustment; empty unless the settings want it."""
    hires: ImageReport | None = None
    """In a first pass's report, that of the second pass of hires fix; None where that pass is not adjusted."""

    def note(self, text: str) -> None:
        """Add a note, unless it is there already."""
        if text not in self.notes:
            self.notes.append(text)

    @property
    def passes(self) -> list[ImageReport]:
        """This report, and that of the second pass if there is one."""
        return [self] if self.hires is None else [self, self.hires]

    @property
    def every_note(self) -> list[str]:
        """The notes of both passes."""
        return self.notes + [f"hires pass: {note}" for note in ([] if self.hires is None else self.hires.notes)]


def note_all(reports: Iterable[ImageReport], text: str) -> None:
    """Add a note to each of the reports."""
    for report in reports:
        report.note(text)


REPORT_KEYS = (
    "used", "prompt", "magnitude", "magnitude after", "mitigated", "calibration", "steps taken", "norm",
    "transition at", "rows", "backward rows", "note", "failed",
)  # fmt: skip
HIRES_KEYS = (
    "hires used", "hires prompt", "hires magnitude", "hires magnitude after", "hires steps taken", "hires norm",
    "hires transition at", "hires failed",
)  # fmt: skip
"""The keys of hires fix's second pass, where it is adjusted as well. Rows and notes cover both passes."""


@dataclass
class Generation:
    """One generation: its settings, and a report for each image by (batch number, place in the batch)."""

    settings: Settings
    preset: str = "sd1"
    """The preset that "auto" stands for on the first pass's checkpoint; a hires pass may have another checkpoint."""
    pinned: Settings | None = None
    """The settings as they are written into the infotext."""
    fail_instead: bool = False
    """Whether a failed adjustment fails the request."""
    remarks: list[str] = field(default_factory=list)
    """Notes for all images."""
    trace_id: str | None = None
    """The name that the traces of its images are stored under."""
    images: dict[tuple[int, int], ImageReport] = field(default_factory=dict)
    looks_at_first: bool = False
    """Whether ‖Δ‖ of the first step is recorded for every image, even with guidance off and nothing traced."""
    left_out: float = 0.0
    """Seconds of adjusting that have been left out of the host's time since the job began, while it samples."""
    placed: object = None
    """The adjusted noise that was put where the host will look for it."""

    def __post_init__(self) -> None:
        self.fail_instead = self.fail_instead or self.settings.fail_instead

    def image(self, batch: int, place: int) -> ImageReport:
        """The report of the image at a place in a batch, made if there is none yet."""
        return self.images.setdefault((batch, place), ImageReport())

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of `report_infotext` that may have values."""
        return REPORT_KEYS + HIRES_KEYS if self.settings.hires else REPORT_KEYS

    def batch(self, batch: int) -> list[ImageReport]:
        """The reports of a batch, in the order of its images."""
        return [report for (number, _), report in sorted(self.images.items()) if number == batch]


def report_infotext(report: ImageReport) -> dict[str, str | int | None]:
    """A report as infotext: a value for each report key, None where there is nothing to write."""
    rows, backward = (sum(getattr(part, name) for part in report.passes) for name in ("forward_rows", "backward_rows"))
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
