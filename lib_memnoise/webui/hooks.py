"""The generation's course through the host's hooks: settings in, adjusted noise, what happened out.

State belongs to the processing object: the `Generation` is `p.memnoise`, the `Gate` sits on the pass's own
denoiser. Other extensions generate inside a generation (a detailer's img2img), with the same scripts, arguments and
infotext, and hand copies of `p` to hooks out of turn: those are left alone. What the host swallows (exceptions in
script hooks) is turned into a failing request or into metadata.
"""

from __future__ import annotations

import contextlib
import sys
import uuid
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from modules import devices, errors, shared
from torch import Tensor

from lib_memnoise.core.calibration import Calibration
from lib_memnoise.core.guidance import ALWAYS, Start, make_start
from lib_memnoise.core.report import Generation, ImageReport, report_infotext
from lib_memnoise.methods.descent import NoGradient
from lib_memnoise.methods.pipeline import Initial, Outcome, Scored, choose, only_measures, run, run_some
from lib_memnoise.registry import METHODS
from lib_memnoise.sampling.cond_rows import Cond
from lib_memnoise.sampling.delta_predictor import Predictor, empty_prompt, make_predictor
from lib_memnoise.sampling.guider import GATE, Gate, remove
from lib_memnoise.settings import ABSOLUTE, INFOTEXT, Settings, preset_for, size_factor, to_infotext
from lib_memnoise.torch_utils.oom import is_out_of_memory
from lib_memnoise.webui import tokens
from lib_memnoise.webui.backends.backend import network
from lib_memnoise.webui.baseline_trace import trace_as_drawn
from lib_memnoise.webui.blank_prompts import blank_images
from lib_memnoise.webui.conditioning import Hearing
from lib_memnoise.webui.failures import (
    Failed,
    Interrupted,
    NotCalibrated,
    Unsupported,
    fails,
    keep_failed_cells,
    loses_errors,
)
from lib_memnoise.webui.gradients import run_leanly
from lib_memnoise.webui.progress import count_time, shown
from lib_memnoise.webui.request import Refusal
from lib_memnoise.webui.sampler_start import is_only_step
from lib_memnoise.webui.services import calibrations, traces
from lib_memnoise.webui.services.calibrations import parameterization

LOOKS = "memnoise_looks"
"""Attribute of a processing object: ‖Δ‖ of the first step is wanted of what it generates."""


def begin(p: Any, settings: Settings | Refusal, *, is_img2img: bool) -> None:
    """`before_process`: start from a clean slate, and refuse bad settings before anything is sampled.

    Runs of the other tab's kind that are given this tab's arguments (a script that goes on from the result) are left
    alone: memnoise is enabled in each tab by itself.
    """
    if is_inside_another() or is_img2img != hasattr(p, "init_images"):
        return
    for key in [key for key in p.extra_generation_params if key.split(" ")[0] == INFOTEXT]:
        del p.extra_generation_params[key]  # X/Y/Z cells share this dict
    p.memnoise = None
    if isinstance(settings, Refusal):
        refuse(p, settings)
    elif settings.enabled:
        p.memnoise, p.memnoise_owner = Generation(settings), weakref.ref(p)
        p.memnoise.looks_at_first = getattr(p, LOOKS, False)


def is_inside_another() -> bool:
    """Whether the host is in the middle of a generation, which can only be another one."""
    frame = sys._getframe()
    while frame := frame.f_back:  # type: ignore[assignment]
        if frame.f_code.co_name == "process_images_inner" and frame.f_globals["__name__"] == "modules.processing":
            return True
    return False


def generation_of(p: Any) -> Generation | None:
    """What `begin` began for this very object; a copy's `memnoise` is the original's."""
    generation: Generation | None = getattr(p, "memnoise", None)
    return generation if generation is not None and p.memnoise_owner() is p else None


def refuse(p: Any, refusal: Exception) -> None:
    """Make the request fail with this sentence: the host would swallow it if it were raised from here."""

    def init(*args: Any, **kwargs: Any) -> None:
        fails(p, refusal)
        if not loses_errors(p):
            raise refusal
        p.comment(f"{INFOTEXT}: {refusal}")
        p.n_iter, p.do_not_save_grid = 0, True

    p.init = init


def describe(p: Any) -> None:
    """`process`: the checkpoint is loaded by now, so settings that follow it can be resolved and written down."""
    generation = generation_of(p)
    if generation is None:
        return
    if getattr(shared.opts, "memnoise_fail_instead", False):
        generation.fail_instead = True
    generation.preset = checkpoint_preset()
    pin(p, generation, generation.settings.pinned(generation.preset))
    if generation.settings.trace != "off":
        generation.trace_id = uuid.uuid4().hex
        p.extra_generation_params[f"{INFOTEXT} trace id"] = generation.trace_id
    for key in generation.keys:
        key = f"{INFOTEXT} {key}"
        p.extra_generation_params[key] = _infotext_value(generation, key)
    if generation.settings.is_by_score or generation.settings.preset == "calibrated":
        from lib_memnoise.webui.services import calibrating

        calibrating.prepare(p, generation)


def pin(p: Any, generation: Generation, pinned: Settings) -> None:
    """Write the settings into the infotext."""
    generation.pinned = pinned
    p.extra_generation_params.update(to_infotext(pinned))


def _infotext_value(generation: Generation, key: str) -> Any:
    def value(p: Any, index: int, use_main_prompt: bool = False, **_: Any) -> Any:
        # `index` counts within the batch; a grid stands for the first image of all.
        place = (0, 0) if use_main_prompt else (p.iteration, index)
        report = generation.images.get(place)
        return None if report is None else report_infotext(report)[key]

    return value


def checkpoint_preset() -> str:
    model = shared.sd_model
    family = "sd1" if getattr(model, "is_sd1", False) else "sd2" if getattr(model, "is_sd2", False) else "other"
    info = getattr(model, "sd_checkpoint_info", None)
    return preset_for(parameterization=parameterization(), family=family, sha256=getattr(info, "sha256", None))


def adjust_noise(p: Any, *, x: Tensor, noise: Tensor, c: Any, uc: Any) -> None:
    """`process_before_every_sampling`: adjust the noise in place and hold guidance back for this pass."""
    generation = generation_of(p)
    if generation is None or is_asked_twice(p, generation):
        return
    remove(p.sampler.model_wrap_cfg)
    second_pass = getattr(p, "is_hr_pass", False)
    if second_pass and not generation.settings.hires:
        return
    firsts = [generation.image(p.iteration, place) for place in range(noise.shape[0])]
    reports = [begin_second(first, generation.settings) for first in firsts] if second_pass else firsts
    empty = EmptyPrompt(p)
    try:
        raise_if_unsupported(generation.settings)
        settings = generation.settings
        if second_pass:
            settings = settings_of_second(generation, reports)
        with left_as_it_was(p):
            leave_blank_alone(reports, blank_images(p, c, empty, settings.reference))
            shared.state.textinfo = "Memnoise: adjusting the noise"
            predictor = make_predictor(
                p,
                x,
                c,
                uc,
                reference=settings.reference,
                reports=reports,
                empty=empty,
                as_host=is_measured_first(settings),
            )
            numbers = calibrated(generation, settings, noise, predictor.step.t, reports)
            pinned = settings.pinned(checkpoint_preset(), numbers)
            settings = settings.resolved(checkpoint_preset(), numbers)
            if is_only_step(p):  # held back there, the prompt would have no say at all
                settings = replace(settings, tau_of=0.0)
            with shown(generation) as tell:
                initial = replace(initial_of(p, predictor), tell=tell)
                outcome = adjusted(noise, predictor, settings, reports, initial)
            hearing = Hearing(p, c, outcome.prompts, reports) if outcome.prompts else None
            if settings.trace == "compare" and not second_pass and not torch.equal(outcome.x, noise):
                compare(p, x, noise, c, uc, predictor, settings, empty, reports)
    except Interrupted:
        for report in reports:
            report.note("interrupted before the noise was adjusted")
    except Exception as error:
        fail(p, generation, reports, error)
    else:
        if not second_pass:
            pin(p, generation, pinned)  # by now it is known what a calibration has to say
        place(p, generation, noise, outcome.x)
        t = predictor.step.t
        fill_reports(reports, outcome)
        starts = starts_of(p, reports, settings, t)
        for report, start in zip(reports, starts):
            if not report.left_alone:
                report.used = {**outcome.used, "T": t}
            if start.tau < ALWAYS and not start.is_off(t):
                name = "latest" if start.at_transition else "tau"
                report.note(f"guidance is never off: the first timestep {t:g} is not above {name} {start.tau:g}")
            if not is_guided(p, settings) and not report.left_alone:
                report.note(f"the CFG scale {cfg_scale(p):g} is no guidance, so there is none to hold back")
        network().gate(
            p,
            p.sampler.model_wrap_cfg,
            reports=reports,
            starts=starts,
            tracing=settings.trace != "off",
            exact=settings.exact_batches and any(report.left_alone for report in reports),
            reference=settings.reference,
            empty=empty,
            hearing=hearing,
            expected_t=t,
            answers=predictor.answers,
            fail_instead=generation.fail_instead,
            looks_at_first=generation.looks_at_first and not second_pass,
        )
        if generation.fail_instead and outcome.failed:
            fail_sampling(p, RuntimeError(next(iter(outcome.failed.values()))))


def begin_second(first: ImageReport, settings: Settings) -> ImageReport:
    """The report of an image's hires pass, which follows what was decided of the image in the first.

    A score is taken at the first timestep of a sampler: at another one it means nothing beside the same threshold.
    """
    first.hires = second = ImageReport(left_alone=first.left_alone and not first.blank)
    if settings.when == "flagged" and (first.threshold is None or first.blank):
        second.note("the image was not scored in a first pass, so it counts as memorised")
    return second


def settings_of_second(generation: Generation, reports: list[ImageReport]) -> Settings:
    """The settings of a hires pass, whose preset is that of the checkpoint it is sampled with.

    Where numbers are given, all of the first pass's hold, as its infotext has them: so it makes the same picture.
    """
    settings = generation.pinned or generation.settings
    kinds = {ABSOLUTE.get(preset, preset) for preset in (checkpoint_preset(), generation.preset)}
    if settings.preset != generation.settings.preset and len(kinds) > 1:
        for report in reports:
            report.note("some numbers were given, so all are the first pass's, whose checkpoint is of another kind")
    return replace(settings, when="always")


def leave_blank_alone(reports: list[ImageReport], blank: list[int]) -> None:
    for image in blank:
        reports[image].blank = reports[image].left_alone = True
        reports[image].note("the prompt is empty, and there is nothing to adjust")


def cfg_scale(p: Any) -> float:
    """The pass's; the forks have one of its own for the hires pass."""
    return float(p.hr_cfg if getattr(p, "is_hr_pass", False) and hasattr(p, "hr_cfg") else p.cfg_scale)


def is_guided(p: Any, settings: Settings) -> bool:
    """Whether there is guidance to hold back, or to turn around."""
    return cfg_scale(p) > 1 or (settings.start != "first" and bool(settings.opposite))


def starts_of(p: Any, reports: list[ImageReport], settings: Settings, t: float) -> list[Start]:
    """When guidance starts, for every image of a batch in a pass that begins at t; each pass needs its own."""
    guided = is_guided(p, settings)
    return [make_start(settings, t) if guided and not report.left_alone else Start() for report in reports]


def is_asked_twice(p: Any, generation: Generation) -> bool:
    """Whether this is a call beside the one that counts: Forge calls the hook of a hires pass twice.

    First with the first pass's network, which carries its gate, and then with the one that will be sampled with.
    """
    if generation.placed is not None and getattr(p, "modified_noise", None) is generation.placed:
        return True
    return getattr(p, "is_hr_pass", False) and network().is_used()


def place(p: Any, generation: Generation, noise: Tensor, adjusted: Tensor) -> None:
    """Have the adjusted noise sampled: hosts that have a place for it take it from there, others where it was."""
    if hasattr(p, "modified_noise"):
        p.modified_noise = adjusted.to(noise)
        generation.placed = p.modified_noise
    else:
        noise.copy_(adjusted)


def compare(
    p: Any,
    x: Tensor,
    noise: Tensor,
    c: Any,
    uc: Any,
    predictor: Predictor,
    settings: Settings,
    empty: EmptyPrompt,
    reports: list[ImageReport],
) -> None:
    """Trace the noise as drawn. If that fails the pictures come all the same, and say so."""
    try:
        trace_as_drawn(
            p, x, noise, c, uc, predictor=predictor, starts=starts_of(p, reports, settings, predictor.step.t),
            reference=settings.reference, empty=empty, reports=reports,
        )  # fmt: skip
    except Interrupted:
        raise
    except Exception as error:
        errors.report("memnoise: the noise as drawn could not be traced", exc_info=True)
        for report in reports:
            report.note(f"the noise as drawn could not be traced: {error}")


def calibrated(
    generation: Generation, settings: Settings, noise: Tensor, t: float, reports: list[ImageReport]
) -> dict[str, Any] | None:
    """The numbers of the checkpoint's calibration, where these settings take any and there is one.

    Raises:
        NotCalibrated: there is none, and they cannot do without.
    """
    follows = settings.preset == "calibrated" or settings.takes_from_calibration(checkpoint_preset()) != ("threshold",)
    if not settings.is_by_score and not follows:
        return None
    height, width = (8 * side for side in noise.shape[-2:])
    known, notes = calibrations.serving(t, width, height)
    where = f"at {width}x{height} and first timestep {t:g}"
    if known is None and settings.preset == "calibrated":
        raise NotCalibrated(f"the preset calibrated needs a calibration of this checkpoint {where}")
    notes = [*generation.remarks, *notes]
    if settings.is_by_score:
        notes += doubts(known, settings, where)
    for report in reports:
        report.calibration = None if known is None else str(known)
        for text in notes:
            report.note(text)
    factor = size_factor(noise[0].numel(), parameterization())
    return None if known is None else known.settings(factor, settings.false_positives)


def doubts(known: Calibration | None, settings: Settings, where: str) -> list[str]:
    """What keeps a calibration from telling which images are memorised."""
    if known is None:
        return [
            f"the checkpoint is not calibrated {where}: memorised or not cannot be told, so that every image counts as "
            "memorised"
        ]
    promise = known.promise(settings.false_positives)
    return [str(promise)] if not promise.is_kept else []


def is_measured_first(settings: Settings) -> bool:
    """Whether Δ(x_T, T) is evaluated for itself, before anything is adjusted."""
    return settings.when == "flagged" or only_measures(settings)


def initial_of(p: Any, predictor: Predictor) -> Initial:
    """What a method may know of the batch besides its noise."""
    return Initial(
        parameterization(),
        first=predictor.step.t,
        alpha_bar=network().alpha_bar(predictor.step.t),
        seeds=list(p.seeds),
        texts=list(p.hr_prompts if getattr(p, "is_hr_pass", False) else p.prompts),
        vocabulary=tokens.Vocabulary,
        tokens=lambda text: tokens.token_count(text, p.steps),
    )


def adjusted(
    noise: Tensor, predictor: Predictor, settings: Settings, reports: list[ImageReport], initial: Initial
) -> Outcome:
    """Score the images if that is asked for, and adjust those that are to be mitigated."""
    images = [i for i, report in enumerate(reports) if not report.left_alone]

    def way(x: Tensor, delta: Any, initial: Initial) -> Outcome:
        if not METHODS[settings.method].needs_gradient or only_measures(settings):
            return run(x, delta, settings, initial)
        # With a gradient, what is known of the score is of no use.
        asked = delta.inner if isinstance(delta, Scored) else delta
        assert isinstance(asked, Predictor)
        return run_leanly(x, asked, settings, initial)

    delta: Any = predictor
    if is_measured_first(settings) and images:
        choice = choose(noise, predictor, settings, initial)
        images = [i for i in images if i in choice.images]
        delta = Scored(predictor, choice.known)
        for i, report in enumerate(reports):
            report.threshold, report.left_alone = choice.threshold, i not in images
    elif settings.when == "flagged":
        for report in reports:
            report.threshold = None if settings.threshold is None else settings.threshold * initial.factor(noise)
    asked = dict(predictor.answers.of_image)
    outcome = (
        way(noise, delta, initial) if len(images) == len(reports) else run_some(images, noise, delta, initial, way)
    )
    if torch.equal(outcome.x, noise) and not outcome.prompts:
        # Nothing is to change, to the bit: rows are only spared where they were evaluated as the host would.
        predictor.answers.of_image = asked
    return outcome


def fill_reports(reports: list[ImageReport], outcome: Outcome) -> None:
    for name in ("before", "after", "steps", "norm"):
        values = getattr(outcome, name)
        if values is not None:
            for report, value in zip(reports, values.tolist()):
                if not report.left_alone:
                    setattr(report, name, value)
    for image, notes in outcome.notes.items():
        for note in notes:
            reports[image].note(note)
    for image, reason in outcome.failed.items():
        reports[image].failed = reason
    for image, prompt in outcome.prompts.items():
        reports[image].prompt = prompt.text


def fail(p: Any, generation: Generation, reports: list[ImageReport], error: Exception) -> None:
    """The image comes without mitigation and says why, or the request fails if that was asked for."""
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
    """Fail the request when the host starts to sample; it would swallow the exception if it were raised here."""

    def sample(*args: Any, **kwargs: Any) -> None:
        fails(p, error)
        raise error

    p.sampler.sample = p.sampler.sample_img2img = sample


def raise_if_unsupported(settings: Settings) -> None:
    if network().kind == "flow":
        raise Unsupported("flow models such as SD3 have no noise prediction that memnoise could adjust")
    if METHODS[settings.method].needs_gradient and getattr(shared.cmd_opts, "lowvram", False):
        raise Unsupported(
            f"{METHODS[settings.method].label} needs gradients, which --lowvram does not allow; use --medvram "
            "or batch-wise"
        )


class EmptyPrompt:
    """The empty prompt's condition, encoded at most once for each checkpoint a pass uses."""

    def __init__(self, p: Any) -> None:
        self.p = p
        self._checkpoint: Any = None
        self._cond: Cond = None

    def __call__(self) -> Cond:
        # A refiner of the same architecture is loaded into the same model object.
        checkpoint = (shared.sd_model, shared.sd_model.sd_checkpoint_info)
        if self._checkpoint != checkpoint:
            self._cond, self._checkpoint = empty_prompt(self.p), checkpoint
        return self._cond


@contextlib.contextmanager
def left_as_it_was(p: Any) -> Iterator[None]:
    """Random state and infotext that evaluating the network touches are for the host to change, not for us.

    An inpainting checkpoint draws from the global generator when its blank image is encoded, and asking a
    sampler for its schedule writes infotext keys.
    """
    params, said = dict(p.extra_generation_params), shared.state.textinfo
    device = devices.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            p.extra_generation_params.clear()
            p.extra_generation_params.update(params)
            shared.state.textinfo = said


def on_cfg_denoiser(params: Any) -> None:
    """Registered once; looks only at the denoiser it is called for."""
    gate: Gate | None = getattr(getattr(params, "denoiser", None), GATE, None)
    if gate is not None:
        gate.begin_step(params)


def comment(p: Any, batch_number: int) -> None:
    """`postprocess_batch`: tell the page what happened."""
    generation = generation_of(p)
    if generation is None:
        return
    count_time(generation)
    if generation.trace_id is not None:
        traces.STORE.put(generation.trace_id, traces.document(generation))
    for place, report in enumerate(generation.batch(batch_number)):
        image = batch_number * p.batch_size + place + 1
        for number, own in enumerate(report.passes):
            what = f"Memnoise, image {image}" + (", hires pass" if number else "")
            for text in ([f"not mitigated: {own.failed}"] if own.failed else []) + own.notes:
                p.comment(f"{what}: {text}.")
            if getattr(shared.opts, "memnoise_page_note", True) and not own.failed:
                p.comment(f"{what}: {summary(generation.settings, own)}.")


def summary(settings: Settings, report: ImageReport) -> str:
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
    """`postprocess`: the API's info takes lists of plain values where infotext had functions."""
    keep_failed_cells(p)
    generation = generation_of(p)
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
