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
    """What happened to one image. None: not measured."""

    before: float | None = None
    """‖Δ(x_T, T)‖ of the noise as drawn."""
    after: float | None = None
    """‖Δ(x̃_T, T)‖, only where the method evaluates it anyway."""
    steps: int | None = None
    """Optimiser steps taken (per-sample)."""
    norm: float | None = None
    """‖x̃_T‖/√d."""
    forward_rows: int = 0
    """Network rows evaluated: one row is one image under one prompt at one timestep."""
    backward_rows: int = 0
    used: dict[str, object] = field(default_factory=dict)
    """The values that took effect, after preset and scaling, and the first timestep T."""
    notes: list[str] = field(default_factory=list)
    failed: str | None = None
    """Why the image was generated without mitigation."""
    threshold: float | None = None
    """The score above which an image is mitigated, where only such images are."""
    calibration: str | None = None
    """The calibration that numbers come from."""
    left_alone: bool = False
    """Not mitigated, because its score is not above the threshold."""
    prompt: str | None = None
    """What was encoded instead of its prompt."""
    transition: float | None = None
    """Where guidance started at the image's own transition point: its timestep."""
    trace: list[TracePoint] = field(default_factory=list)
    drawn: list[TracePoint] = field(default_factory=list)
    """The trace of the same noise as drawn, if it was asked for."""

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


REPORT_KEYS = (
    "used", "prompt", "magnitude", "magnitude after", "mitigated", "calibration", "steps taken", "norm",
    "transition at", "rows", "backward rows", "note", "failed",
)  # fmt: skip


@dataclass
class Generation:
    """One generation: its settings, and a report for each image by (batch number, place in the batch)."""

    settings: Settings
    preset: str = "sd1"
    """What "auto" stands for on the loaded checkpoint."""
    fail_instead: bool = False
    remarks: list[str] = field(default_factory=list)
    """Notes for all images."""
    trace_id: str | None = None
    """By which the traces of its images are found."""
    images: dict[tuple[int, int], ImageReport] = field(default_factory=dict)
    placed: object = None
    """The adjusted noise, where the host has it from us and has not taken it yet."""

    def __post_init__(self) -> None:
        self.fail_instead = self.fail_instead or self.settings.fail_instead

    def image(self, batch: int, place: int) -> ImageReport:
        return self.images.setdefault((batch, place), ImageReport())

    def batch(self, batch: int) -> list[ImageReport]:
        return [report for (number, _), report in sorted(self.images.items()) if number == batch]


def report_infotext(report: ImageReport) -> dict[str, str | int | None]:
    """What happened to an image, in infotext form: a value for each of REPORT_KEYS, None where there is none."""
    used = (f"{k}={v:.6g}" if isinstance(v, float) else f"{k}={v}" for k, v in report.used.items())
    values: tuple[str | int | None, ...] = (
        " ".join(used) or None,
        report.prompt,
        _number(report.before),
        _number(report.after),
        None if report.threshold is None else str(not report.left_alone),
        report.calibration,
        report.steps,
        _number(report.norm, 6),
        _number(report.transition),
        report.forward_rows or None,
        report.backward_rows or None,
        "; ".join(report.notes) or None,
        report.failed,
    )
    return {f"{INFOTEXT} {key}": value for key, value in zip(REPORT_KEYS, values)}


def _number(value: float | None, digits: int = 4) -> str | None:
    return None if value is None else f"{value:.{digits}g}"
