"""Adjusts the noise of one pass: resolves its settings, applies a calibration, runs the pipeline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lib_memnoise.core.calibration import Calibration
from lib_memnoise.core.delta import Delta
from lib_memnoise.core.report import Generation, ImageReport, note_all
from lib_memnoise.errors import NotCalibrated
from lib_memnoise.methods.batch import BatchContext, Outcome
from lib_memnoise.methods.pipeline import Mitigated, mitigate
from lib_memnoise.sampling.delta_predictor import DeltaPredictor
from lib_memnoise.settings import ABSOLUTE, ResolvedSettings, Settings, size_factor
from lib_memnoise.webui.blank_prompts import blank_images
from lib_memnoise.webui.gradients import run_in_memory
from lib_memnoise.webui.sampling_pass import SamplingPass
from lib_memnoise.webui.services import calibrations


def begin_second(first: ImageReport, settings: Settings) -> ImageReport:
    """The report of an image's hires pass, for which the decision of the first pass holds.

    A score belongs to a sampler's first timestep. The second pass begins at another one, where the same threshold means
    nothing, so its images are not scored.
    """
    first.hires = second = ImageReport(left_alone=first.left_alone and not first.blank)
    if settings.when == "flagged" and (first.threshold is None or first.blank):
        second.note("the image was not scored in a first pass, so it counts as memorised")
    return second


def settings_of_second(current: SamplingPass, generation: Generation) -> Settings:
    """The settings of a hires pass, whose preset follows the checkpoint that it is sampled with.

    Where the settings give any numbers, all numbers of the first pass hold, as in its infotext, so that the infotext
    makes the same picture.
    """
    settings = generation.pinned or generation.settings
    kinds = {ABSOLUTE.get(preset, preset) for preset in (current.preset, generation.preset)}
    if settings.preset != generation.settings.preset and len(kinds) > 1:
        note_all(
            current.reports, "some numbers were given, so all are the first pass's, whose checkpoint is of another kind"
        )
    return replace(settings, when="always")


def leave_blank_alone(current: SamplingPass) -> None:
    """Exclude images with an empty prompt from mitigation, and note it in their reports."""
    reports = current.reports
    for image in blank_images(current.p, current.c, current.empty, current.reference):
        reports[image].blank = reports[image].left_alone = True
        reports[image].note("the prompt is empty, and there is nothing to adjust")


def calibrated(current: SamplingPass, generation: Generation, settings: Settings, t: float) -> dict[str, Any] | None:
    """The numbers of the checkpoint's calibration; None where the settings use none or there is no calibration.

    Raises:
        NotCalibrated: there is no calibration, and the settings need one.
    """
    follows = settings.preset == "calibrated" or settings.takes_from_calibration(current.preset) != ("threshold",)
    if not settings.is_by_score and not follows:
        return None
    height, width = (8 * side for side in current.noise.shape[-2:])
    known, notes = calibrations.serving(current.backend, t, width, height)
    where = f"at {width}x{height} and first timestep {t:g}"
    if known is None and settings.preset == "calibrated":
        raise NotCalibrated(f"the preset calibrated needs a calibration of this checkpoint {where}")
    notes = [*generation.remarks, *notes]
    if settings.is_by_score:
        notes += doubts(known, settings, where)
    for report in current.reports:
        report.calibration = None if known is None else str(known)
        for text in notes:
            report.note(text)
    factor = size_factor(current.noise[0].numel(), current.backend.kind)
    return None if known is None else known.settings(factor, settings.false_positives)


def doubts(known: Calibration | None, settings: Settings, where: str) -> list[str]:
    """Sentences on why the calibration cannot tell, or tells less surely than wanted, which images are memorised."""
    if known is None:
        return [
            f"the checkpoint is not calibrated {where}: memorised or not cannot be told, so that every image counts as "
            "memorised"
        ]
    promise = known.promise(settings.false_positives)
    return [str(promise)] if not promise.is_kept else []


def mitigated(
    current: SamplingPass,
    predictor: DeltaPredictor,
    settings: ResolvedSettings,
    context: BatchContext,
    on_outcome: Callable[[Outcome], object],
) -> Mitigated:
    """The pipeline's result, with gradients computed as the host and its memory allow."""
    evaluated: dict[int, Any] = {}

    def with_gradient(x: Tensor, delta: Delta, context: BatchContext) -> Outcome:
        assert isinstance(delta, DeltaPredictor)
        return run_in_memory(x, delta, settings, context)

    def keep_evaluated(outcome: Outcome) -> None:
        if torch.equal(outcome.x, current.noise) and not outcome.prompts:
            # The pass must not change by a bit: only rows that were evaluated in the host's own calls may be spared.
            predictor.cache.of_image = evaluated
        on_outcome(outcome)

    return mitigate(
        current.noise,
        predictor,
        settings,
        context,
        reports=current.reports,
        guidance=current.cfg_scale,
        with_gradient=with_gradient,
        on_choice=lambda: evaluated.update(predictor.cache.of_image),
        on_outcome=keep_evaluated,
    )
