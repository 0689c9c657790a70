"""The host's script hooks, in the order in which it calls them: settings come in, noise is adjusted, reports go out.

State belongs to the generation (`session`). Other extensions generate inside a generation (a detailer's img2img) with
the same scripts, arguments and infotext, and pass copies of `p` to hooks out of turn; those are ignored. The host
swallows exceptions in script hooks, so they are turned into a failing request or into metadata.
"""

from __future__ import annotations

import contextlib
import sys
import uuid
from dataclasses import dataclass, replace
from typing import Any

import torch
from modules import devices, errors, shared
from torch import Tensor

from lib_memnoise.core.report import Generation, ImageReport, note_all, report_infotext
from lib_memnoise.errors import Interrupted, NotCalibrated, Unsupported
from lib_memnoise.methods.batch import Outcome
from lib_memnoise.methods.descent import NoGradient
from lib_memnoise.methods.pipeline import Mitigated, is_measured_first, starts_of
from lib_memnoise.registry import METHODS
from lib_memnoise.sampling.delta_predictor import DeltaPredictor
from lib_memnoise.sampling.guider import GuidancePlan
from lib_memnoise.settings import INFOTEXT, ResolvedSettings, Settings, to_infotext
from lib_memnoise.torch_utils.oom import is_out_of_memory
from lib_memnoise.webui import adjusting, quirks, session
from lib_memnoise.webui.backends import detect
from lib_memnoise.webui.backends.base import WebuiBackend
from lib_memnoise.webui.baseline_trace import trace_baseline
from lib_memnoise.webui.checkpoint import checkpoint_preset, raise_if_unsupported
from lib_memnoise.webui.conditioning import ConditioningOverride
from lib_memnoise.webui.failures import Failed, fails, keep_failed_cells, refuse
from lib_memnoise.webui.host_conditions import EmptyPrompt
from lib_memnoise.webui.host_state import left_as_it_was
from lib_memnoise.webui.progress import count_time, show_progress
from lib_memnoise.webui.request import Refusal
from lib_memnoise.webui.sampler_start import is_only_step
from lib_memnoise.webui.sampling_pass import SamplingPass
from lib_memnoise.webui.services import calibrating, traces


def begin(p: Any, settings: Settings | Refusal, *, is_img2img: bool) -> None:
    """`before_process`: reset the state, and refuse bad settings before anything is sampled.

    A generation of the other tab's kind that gets this tab's arguments (from a script that goes on from the result) is
    ignored, since memnoise is enabled in each tab separately.
    """
    if is_inside_another() or is_img2img != hasattr(p, "init_images"):
        return
    for key in [key for key in p.extra_generation_params if key.split(" ")[0] == INFOTEXT]:
        del p.extra_generation_params[key]  # X/Y/Z cells share this dict
    session.clear(p)
    if isinstance(settings, Refusal):
        refuse(p, settings)
    elif settings.enabled:
        session.begin_generation(p, settings)


def is_inside_another() -> bool:
    """Whether the host is already inside a generation, so that this one is nested in it."""
    frame = sys._getframe()
    while frame := frame.f_back:  # type: ignore[assignment]
        if frame.f_code.co_name == "process_images_inner" and frame.f_globals["__name__"] == "modules.processing":
            return True
    return False


def describe(p: Any) -> None:
    """`process`: write the settings into the infotext. The checkpoint that some of them follow is loaded by now."""
    generation = session.generation_of(p)
    if generation is None:
        return
    if getattr(shared.opts, "memnoise_fail_instead", False):
        generation.fail_instead = True
    backend = detect()
    generation.preset = checkpoint_preset(backend)
    pin(p, generation, generation.settings.pinned(generation.preset))
    if generation.settings.trace != "off":
        generation.trace_id = uuid.uuid4().hex
        p.extra_generation_params[f"{INFOTEXT} trace id"] = generation.trace_id
    for key in generation.keys:
        key = f"{INFOTEXT} {key}"
        p.extra_generation_params[key] = _infotext_value(generation, key)
    if generation.settings.is_by_score or generation.settings.preset == "calibrated":
        calibrating.prepare(backend, p, generation)


def pin(p: Any, generation: Generation, pinned: Settings) -> None:
    """Write the settings into the infotext."""
    generation.pinned = pinned
    p.extra_generation_params.update(to_infotext(pinned))


def _infotext_value(generation: Generation, key: str) -> Any:
    def value(p: Any, index: int, use_main_prompt: bool = False, **_: Any) -> Any:
        # `index` counts within the batch; a grid has the infotext of the very first image.
        place = (0, 0) if use_main_prompt else (p.iteration, index)
        report = generation.images.get(place)
        return None if report is None else report_infotext(report)[key]

    return value


@dataclass(frozen=True)
class Adjusted:
    """The adjusted noise of a pass, with everything that its guider needs."""

    mitigated: Mitigated
    settings: ResolvedSettings
    pinned: Settings
    """The settings as they are written into the infotext."""
    predictor: DeltaPredictor
    override: ConditioningOverride | None


def adjust_noise(p: Any, *, x: Tensor, noise: Tensor, c: Any, uc: Any) -> None:
    """`process_before_every_sampling`: adjust the noise of this pass, and attach a guider that holds guidance back.

    Args:
        x: the clean latent where sampling starts from a picture, otherwise the noise, `(B, C, H, W)`.
        noise: the noise as drawn, `(B, C, H, W)`.
        c, uc: the host's conditions of the prompts and the negative prompts.
    """
    generation = session.generation_of(p)
    if generation is None:
        return
    backend = detect()
    if is_asked_twice(p, generation, backend):
        return
    session.remove_guider(p.sampler.model_wrap_cfg)
    settings, second_pass = generation.settings, getattr(p, "is_hr_pass", False)
    if second_pass and not settings.hires:
        return
    firsts = [generation.image(p.iteration, place) for place in range(noise.shape[0])]
    reports = [adjusting.begin_second(first, settings) for first in firsts] if second_pass else firsts
    current = SamplingPass(p, x, noise, c, uc, backend, reports, EmptyPrompt(p), settings.reference)
    try:
        adjusted = adjust(current, generation)
    except Interrupted:
        note_all(reports, "interrupted before the noise was adjusted")
    except Exception as error:
        fail(p, generation, reports, error)
    else:
        hand_over(current, generation, adjusted)


def adjust(current: SamplingPass, generation: Generation) -> Adjusted:
    """Everything that evaluates the network before the sampler does."""
    p, settings = current.p, generation.settings
    raise_if_unsupported(current.backend, settings)
    if current.is_hires:
        settings = adjusting.settings_of_second(current, generation)
    with left_as_it_was(p):
        adjusting.leave_blank_alone(current)
        shared.state.textinfo = "Memnoise: adjusting the noise"
        predictor = current.predictor(as_host=is_measured_first(settings))
        numbers = adjusting.calibrated(current, generation, settings, predictor.step.t)
        pinned = settings.pinned(current.preset, numbers)
        resolved = settings.resolved(current.preset, numbers)
        if is_only_step(p):  # holding guidance back there would ignore the prompt altogether
            resolved = replace(resolved, tau_of=0.0)
        override: ConditioningOverride | None = None

        def on_outcome(outcome: Outcome) -> None:
            nonlocal override
            progress.close()  # the work that follows reports its own progress
            if outcome.prompts:
                override = ConditioningOverride(current, outcome.prompts)
            if resolved.trace == "compare" and not current.is_hires and not torch.equal(outcome.x, current.noise):
                trace_noise_as_drawn(current, predictor, resolved)

        with contextlib.ExitStack() as progress:
            context = replace(current.context(predictor), on_progress=progress.enter_context(show_progress(generation)))
            mitigated = adjusting.mitigated(current, predictor, resolved, context, on_outcome)
    return Adjusted(mitigated, resolved, pinned, predictor, override)


def hand_over(current: SamplingPass, generation: Generation, adjusted: Adjusted) -> None:
    """Give the sampler its noise and a guider, and write the final settings into the infotext."""
    p, settings, predictor = current.p, adjusted.settings, adjusted.predictor
    if not current.is_hires:
        pin(p, generation, adjusted.pinned)  # now with the calibration's numbers
    place(p, generation, current.noise, adjusted.mitigated.outcome.x)
    t, denoiser = predictor.step.t, p.sampler.model_wrap_cfg
    plan = GuidancePlan(
        reports=current.reports,
        starts=adjusted.mitigated.starts,
        tracing=settings.trace != "off",
        exact=settings.exact_batches and any(report.left_alone for report in current.reports),
        follows_negative=current.follows_negative,
        negative_is_empty=current.negative_is_empty,
        empty=current.empty,
        override=adjusted.override,
        expected_t=t,
        cache=predictor.cache,
        fail=lambda error: fails(p, error),
        fail_instead=generation.fail_instead,
        looks_at_first=generation.looks_at_first and not current.is_hires,
    )
    session.put_guider(denoiser, current.backend.guider(p, denoiser, plan))
    if generation.fail_instead and adjusted.mitigated.outcome.failed:
        fail_sampling(p, RuntimeError(next(iter(adjusted.mitigated.outcome.failed.values()))))


def is_asked_twice(p: Any, generation: Generation, backend: WebuiBackend) -> bool:
    """Whether this call is to be ignored because Forge calls the hook of a hires pass twice.

    The first call has the first pass's network, which still carries its guider; the second has the network that will be
    sampled with.
    """
    if generation.placed is not None and getattr(p, "modified_noise", None) is generation.placed:
        return True
    return getattr(p, "is_hr_pass", False) and backend.is_used()


def place(p: Any, generation: Generation, noise: Tensor, adjusted: Tensor) -> None:
    """Put the adjusted noise where the host will sample it from: an attribute of p, or the noise tensor itself."""
    if quirks.has("noise is an attribute", p):
        p.modified_noise = adjusted.to(noise)
        generation.placed = p.modified_noise
    else:
        noise.copy_(adjusted)


def trace_noise_as_drawn(current: SamplingPass, predictor: DeltaPredictor, settings: ResolvedSettings) -> None:
    """Trace the noise as drawn. If that fails, the pictures are made all the same, and their notes say so."""
    try:
        trace_baseline(current, predictor, starts_of(current.reports, settings, predictor.step.t, current.cfg_scale))
    except Interrupted:
        raise
    except Exception as error:
        errors.report("memnoise: the noise as drawn could not be traced", exc_info=True)
        note_all(current.reports, f"the noise as drawn could not be traced: {error}")


def fail(p: Any, generation: Generation, reports: list[ImageReport], error: Exception) -> None:
    """Go on without mitigation and say why in the reports, or fail the request if it asked for that."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if is_out_of_memory(error):
        reason = "out of memory while adjusting the noise"
    if not isinstance(error, (Unsupported, NoGradient)):
        errors.report("memnoise: the noise could not be adjusted", exc_info=True)
    for report in reports:
        if not report.left_alone:
            report.failed = reason
    devices.torch_gc()
    if generation.fail_instead or isinstance(error, NotCalibrated):
        fail_sampling(p, Failed(reason))


def fail_sampling(p: Any, error: Exception) -> None:
    """Make the request fail when the host starts to sample; it would swallow an exception that is raised here."""

    def sample(*args: Any, **kwargs: Any) -> None:
        fails(p, error)
        raise error

    p.sampler.sample = p.sampler.sample_img2img = sample


def on_cfg_denoiser(params: Any) -> None:
    """Announce a step to the guider of its denoiser. Registered once, for all generations."""
    guider = session.guider_of(getattr(params, "denoiser", None))
    if guider is not None:
        guider.begin_step(params)


def comment(p: Any, batch_number: int) -> None:
    """`postprocess_batch`: show on the page what happened to each image, and store the traces."""
    generation = session.generation_of(p)
    if generation is None:
        return
    count_time(generation)
    if generation.trace_id is not None:
        traces.STORE.put(generation.trace_id, traces.document(generation))
    for place, report in enumerate(generation.batch(batch_number)):
        image = batch_number * p.batch_size + place + 1
        for number, pass_report in enumerate(report.passes):
            what = f"Memnoise, image {image}" + (", hires pass" if number else "")
            for text in ([f"not mitigated: {pass_report.failed}"] if pass_report.failed else []) + pass_report.notes:
                p.comment(f"{what}: {text}.")
            if getattr(shared.opts, "memnoise_page_note", True) and not pass_report.failed:
                p.comment(f"{what}: {summary(generation.settings, pass_report)}.")


def summary(settings: Settings, report: ImageReport) -> str:
    """A report in one line, for the page."""
    parts = ["left alone" if report.left_alone else METHODS[settings.method].label.lower()]
    if report.before is not None:
        after = "" if report.after is None else f" → {report.after:.4g}"
        parts.append(f"magnitude {report.before:.4g}{after}")
    if report.steps is not None:
        parts.append(f"{report.steps} steps")
    parts.append(f"{report.forward_rows} network rows")
    if report.backward_rows:
        parts.append(f"{report.backward_rows} backward")
    return ", ".join(parts)


def finish(p: Any, processed: Any) -> None:
    """`postprocess`: replace the infotext's functions by lists of plain values for the API's info, and save traces."""
    keep_failed_cells(p)
    generation = session.generation_of(p)
    if generation is None:
        return
    places = [divmod(index, p.batch_size) for index in range(len(p.all_seeds or []))]
    reports = [report_infotext(generation.images.get(place, ImageReport())) for place in places]
    for key in generation.keys:
        key = f"{INFOTEXT} {key}"
        values = [report[key] for report in reports]
        p.extra_generation_params[key] = values if any(value is not None for value in values) else None
    if generation.trace_id is not None and getattr(shared.opts, "memnoise_save_traces", False):
        try:
            traces.save(generation, processed.images[processed.index_of_first_image :], p.batch_size)
        except OSError as error:
            errors.report("memnoise: traces could not be saved", exc_info=True)
            processed.comments += f"Memnoise: traces could not be saved: {error}.\n"
