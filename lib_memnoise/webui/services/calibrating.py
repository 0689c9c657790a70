"""Makes calibrations: on request, and before a generation that needs one."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from modules import devices, errors, sd_samplers, shared

from lib_memnoise.core import calibration
from lib_memnoise.core.calibration import ordinary_prompts
from lib_memnoise.core.calibration_store import serves
from lib_memnoise.core.report import Generation
from lib_memnoise.errors import Unsupported, echo, meant
from lib_memnoise.settings import Settings
from lib_memnoise.torch_utils.oom import is_out_of_memory
from lib_memnoise.webui.backends.base import WebuiBackend
from lib_memnoise.webui.checkpoint import raise_if_unsupported
from lib_memnoise.webui.failures import refuse
from lib_memnoise.webui.host_state import left_as_it_was
from lib_memnoise.webui.nested import host_set_aside
from lib_memnoise.webui.request import Refusal
from lib_memnoise.webui.services import calibrations, json_request, recent_prompts, scoring
from lib_memnoise.webui.services.json_request import BadRequest, Request
from lib_memnoise.webui.services.scoring import Probe, ScoredImage, Stopped

MOST_RECENT = 240
"""The most prompts of recent pictures that are scored."""
SHOWN = 3
"""How many of the highest-scoring prompts are shown."""


# On request


def parse(body: Any) -> tuple[Request, str, list[str]]:
    """Validate a request for a calibration from JSON.

    `prompts` are the user's own. With `source` "recent", prompts of recent pictures are used; otherwise built-in ones.
    All other names are as in `json_request.parse`.

    Returns:
        What is to be scored, the prompts' source, and notes about it.

    Raises:
        BadRequest: see `json_request.parse`; or the source is unknown, or contradicts the prompts.
    """
    if not isinstance(body, Mapping):
        raise BadRequest(f"memnoise: the body = {echo(body)} is not valid; it must be a JSON object.")
    given = {name: value for name, value in body.items() if name != "source"}
    has_prompts = "prompts" in given or "prompt" in given
    source = body.get("source", "own" if has_prompts else "built-in")
    if not isinstance(source, str) or source not in calibration.SOURCES:
        hint = meant(source, {name: name for name in calibration.SOURCES})
        raise BadRequest(
            f"memnoise: source = {echo(source)} is not valid{hint}; it must be one of {', '.join(calibration.SOURCES)}."
        )
    if has_prompts != (source == "own"):
        rule = "needs prompts" if source == "own" else "takes no prompts beside its own"
        raise BadRequest(f"memnoise: source = {source} {rule}.")
    notes: list[str] = []
    if source == "recent":
        recent = recent_prompts.prompts(MOST_RECENT)
        notes = recent.notes()
        if len(recent.prompts) < calibration.FEWEST:
            raise BadRequest(
                f"memnoise: to calibrate it takes {calibration.FEWEST} different prompts; " + "; ".join(notes) + "."
            )
        given["prompts"] = recent.prompts
    elif source == "built-in":
        given["prompts"] = ordinary_prompts()
    return (
        json_request.parse(
            given,
            kind="calibration",
            without=(*json_request.OWN, "seed", "seeds", "words"),
            others={"source": "Source"},
        ),
        source,
        notes,
    )


def calibrate_as_json(wanted: Request, source: str, notes: list[str]) -> dict[str, Any]:
    """Calibrate, and return the result as JSON. The caller holds the host's queue."""
    result, scored = scoring.calibrate(wanted, source)
    top = sorted(scored, key=lambda image: -image.score)[:SHOWN]
    if source != "built-in":
        notes = [*notes, "if one of these is memorised, the threshold is too high: " + ", ".join(map(described, top))]
    return {**scoring.summary(result), "notes": notes}


def described(image: ScoredImage) -> str:
    """A score with its prompt, shortened."""
    prompt = " ".join(image.prompt.split())
    return f"{image.score:.4g} “{prompt if len(prompt) <= 80 else prompt[:77] + '...'}”"


# Before a generation


def first_timestep(backend: WebuiBackend, p: Any) -> float:
    """T, the first timestep of a generation's first pass, 0…999, before anything is sampled."""
    with left_as_it_was(p):
        sampler = sd_samplers.create_sampler(p.sampler_name, shared.sd_model)
        return backend.first_step(p, sampler, torch.zeros(1, 4, 1, 1, device=devices.device)).t


def prepare(backend: WebuiBackend, p: Any, generation: Generation) -> None:
    """Calibrate before a generation samples, if it needs a calibration and there is none.

    Where no calibration is possible, all images are mitigated (`adjusting.calibrated`), and a request for the preset
    "calibrated" is refused. If calibrating fails or is interrupted, so is the request.
    """
    is_preset = generation.settings.preset == "calibrated"
    if generation.settings.reference == "negative" and any(p.all_negative_prompts):
        generation.remarks.append("scores are against the negative prompt, the calibration's against the empty one")
    try:
        raise_if_unsupported(backend, generation.settings)
        calibrate_for(backend, p, generation)
        if is_preset:
            raise_if_second_pass_lacks_one(backend, p, generation.settings)
    except Unsupported as error:
        if is_preset:
            refuse(p, Refusal(f"memnoise: the preset calibrated cannot be used here: {error}."))
        # Otherwise the metadata say so.
    except Stopped:
        if shared.state.interrupted or shared.state.stopping_generation:
            return  # the host makes no image
        generation.remarks.append("the calibration of the checkpoint was skipped")
        if is_preset:
            refuse(p, Refusal("memnoise: the calibration that the preset calibrated is made of was skipped."))
    except Exception as error:
        refuse(p, RuntimeError(failure(error)))


def calibrate_for(backend: WebuiBackend, p: Any, generation: Generation) -> None:
    """Calibrate the checkpoint for a generation's first pass, unless it is calibrated.

    Raises:
        Unsupported: sampling from noise alone begins at another timestep than this pass.
        Stopped: the user interrupted or skipped.
    """
    if getattr(p, "firstpass_image", None) is not None and getattr(p, "enable_hr", False):
        return  # a hires pass of a given picture alone
    t = first_timestep(backend, p)
    known, problems = calibrations.serving(backend, t, p.width, p.height)
    generation.remarks += problems
    if known is not None:
        return
    wanted = Request(
        tuple(ordinary_prompts()),
        width=p.width,
        height=p.height,
        sampler_name=p.sampler_name,
        scheduler=getattr(p, "scheduler", None) or "Automatic",
        steps=p.steps,
    )
    begins = first_timestep(backend, scoring.make_processing(Probe, wanted, [wanted.prompts[0]], [0]))
    if not serves(round(begins), round(t)):
        raise Unsupported(
            f"the checkpoint is not calibrated at {p.width}x{p.height} and first timestep {t:g}, and that cannot be "
            f"done: noise alone is sampled from timestep {begins:g} on"
        )
    with host_set_aside(p):
        shared.state.job = "memnoise-calibration"
        scoring.calibrate(wanted)


def raise_if_second_pass_lacks_one(backend: WebuiBackend, p: Any, settings: Settings) -> None:
    """Raise `Unsupported` if a hires pass needs a calibration and has none: only the first pass's is made here."""
    if not settings.hires or not getattr(p, "enable_hr", False) or getattr(p, "hr_checkpoint_info", None) is not None:
        return
    second = copy.copy(p)
    second.extra_generation_params = dict(p.extra_generation_params)
    second.calculate_target_resolution()
    second.is_hr_pass = True
    second.sampler_name = getattr(p, "hr_sampler_name", None) or p.sampler_name
    second.scheduler = getattr(p, "hr_scheduler", None) or getattr(p, "scheduler", None)
    t, width, height = first_timestep(backend, second), second.hr_upscale_to_x, second.hr_upscale_to_y
    known, _ = calibrations.serving(backend, t, width, height)
    if known is None:
        raise Unsupported(
            f"the checkpoint is not calibrated for the hires pass at {width}x{height} and first timestep {t:g}"
        )


def failure(error: Exception) -> str:
    """The reason why calibrating failed, in a sentence."""
    if isinstance(error, scoring.REFUSALS):
        return scoring.sentence_of(error)
    errors.report("memnoise: the checkpoint could not be calibrated", exc_info=True)
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if is_out_of_memory(error):
        devices.torch_gc()
        reason = "out of memory"
    return f"memnoise: the checkpoint could not be calibrated: {reason}."
