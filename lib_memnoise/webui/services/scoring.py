"""Scores images without generating them: the host runs a generation as usual, but it ends before sampling.

The processing object is the host's own, so styles, LoRA, prompt editing, schedule and seeds are the same as in a
generation, and so is the score.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from modules import call_queue, extra_networks, processing, scripts, sd_samplers, shared
from torch import Tensor

from lib_memnoise.core import calibration
from lib_memnoise.core.calibration import Calibration
from lib_memnoise.core.delta import magnitude
from lib_memnoise.core.report import ImageReport
from lib_memnoise.errors import Interrupted, Unsupported
from lib_memnoise.sampling import cond_rows
from lib_memnoise.sampling.delta_predictor import DeltaPredictor
from lib_memnoise.sampling.memory_mode import MemoryMode, first_attempt, free_memory
from lib_memnoise.settings import Settings
from lib_memnoise.torch_utils.checkpointing import checkpointed
from lib_memnoise.webui import tokens
from lib_memnoise.webui.backends import detect
from lib_memnoise.webui.backends.base import WebuiBackend
from lib_memnoise.webui.checkpoint import load_checkpoint, raise_if_unsupported
from lib_memnoise.webui.failures import is_stopping
from lib_memnoise.webui.host_conditions import EmptyPrompt
from lib_memnoise.webui.host_state import left_as_it_was
from lib_memnoise.webui.sampling_pass import SamplingPass
from lib_memnoise.webui.services import calibrations
from lib_memnoise.webui.services.json_request import BadRequest, Request

BATCH = 4
"""Images that are scored together."""
RATE = 0.01
"""The default rate of false positives."""


class Stopped(RuntimeError):
    """The user interrupted."""


REFUSALS = (BadRequest, Stopped, Unsupported, calibration.BadCalibration)
"""The errors by which a request is refused or ended; each becomes a sentence for the user."""


def sentence_of(refusal: Exception) -> str:
    """One of `REFUSALS` as a sentence."""
    return str(refusal) if isinstance(refusal, (BadRequest, Stopped)) else f"memnoise: {refusal}."


@dataclass
class ScoredImage:
    """The score of one image."""

    prompt: str
    seed: int
    score: float
    rows: int
    timestep: float
    words: list[tuple[str, float]] = field(default_factory=list)
    """The prompt's words, each with its significance for the score; the largest is 1."""


class Mixed(Exception):
    """These prompts have other conditions in one batch than each has alone."""


class Probe(processing.StableDiffusionProcessingTxt2Img):
    """A generation that ends where sampling would begin. Its pictures are blank."""

    reference = "empty"
    wants_words = False
    scored: list[ScoredImage]

    def sample(self, conditioning: Any, unconditional_conditioning: Any, *args: Any, **kwargs: Any) -> Any:
        # The host pads shorter prompts by repeating their last token; forks drop parts (AND) that not all prompts have.
        if len({form(parts) for parts in conditioning.batch}) > 1:
            raise Mixed
        self.sampler = sd_samplers.create_sampler(self.sampler_name, self.sd_model)
        x = self.rng.next()
        reports = [ImageReport() for _ in x]
        empty, backend = EmptyPrompt(self), detect()
        current = SamplingPass(
            self, x, x, conditioning, unconditional_conditioning, backend, reports, empty, self.reference
        )
        with left_as_it_was(self):
            predictor = current.predictor()
            words = self.word_scores(x, predictor) if self.wants_words else [[] for _ in x]
            if not self.wants_words:
                predictor(x)
        for k, report in enumerate(reports):
            assert report.before is not None
            rows = report.forward_rows + report.backward_rows
            self.scored.append(
                ScoredImage(self.prompts[k], self.seeds[k], report.before, rows, predictor.step.t, words[k])
            )
        nothing = torch.zeros(3, 8, 8)
        return processing.DecodedSamples([nothing for _ in x])

    def word_scores(self, x: Tensor, predictor: DeltaPredictor) -> list[list[tuple[str, float]]]:
        """The significance ‖∂‖Δ‖/∂e_i‖ of every token i, merged into words (Wen et al. 2024)."""
        cond, owners = predictor.cond, [i for i, part in enumerate(predictor.parts) for _ in part]
        vectors = cond_rows.vectors(cond).detach().clone().requires_grad_()
        backend = predictor.backend
        with backend.gradients(), torch.enable_grad():
            mode = first_attempt(backend.unet, x, predictor.rows, free_memory(x.device))
            block = checkpointed(backend.unet) if mode > MemoryMode.PLAIN else contextlib.nullcontext()
            with block:
                delta = replace(predictor, cond=cond_rows.with_vectors(cond, vectors))(x)
                (gradient,) = torch.autograd.grad(magnitude(delta).sum(), vectors)
        size = torch.linalg.vector_norm(gradient.float(), dim=2)
        texts = [
            text for i in range(len(x)) for text in tokens.step_texts(tokens.schedules(self.prompts[i], self.steps))
        ]
        return tokens.merged(texts, size, owners, len(x))


def form(parts: Sequence[Any]) -> tuple[Any, ...]:
    """The form of an encoded prompt: the weights of its parts, and the length of the longest at the first step."""
    return *(part.weight for part in parts), max(cond_rows.vectors(part.schedules[0].cond).shape[-2] for part in parts)


def backend_to_score_with() -> WebuiBackend:
    """Load the chosen checkpoint, and detect its backend.

    Raises:
        BadRequest: there is no checkpoint. Unsupported: it has no score.
    """
    load_checkpoint()
    if getattr(shared.sd_model, "sd_checkpoint_info", None) is None:
        raise BadRequest("memnoise: no checkpoint is loaded.")
    backend = detect()
    raise_if_unsupported(backend, Settings())
    return backend


def score(request: Request) -> tuple[WebuiBackend, list[ScoredImage]]:
    """Score every prompt with every seed; the caller holds the host's queue.

    Raises:
        BadRequest: no checkpoint is loaded. Unsupported: it is one that has no score. Stopped: the user interrupted.
    """
    backend = backend_to_score_with()
    seeds = [list(request.seeds[start : start + BATCH]) for start in range(0, len(request.seeds), BATCH)]
    shared.state.job_count = len(request.prompts) * len(seeds)
    scored_images = [
        scored for prompt in request.prompts for part in seeds for scored in run_probe(request, [prompt], part)
    ]
    return backend, scored_images


def make_processing(kind: type[Any], request: Request, prompts: list[str], seeds: Sequence[int]) -> Any:
    """A processing object for one batch, of which nothing is saved; each image has a prompt and a fixed seed."""
    return kind(
        sd_model=shared.sd_model,
        prompt=prompts,
        negative_prompt=request.negative_prompt,
        styles=list(request.styles),
        seed=list(seeds),
        subseed=list(seeds),
        sampler_name=request.sampler_name,
        scheduler=request.scheduler,
        batch_size=len(prompts),
        n_iter=1,
        steps=request.steps,
        cfg_scale=request.cfg_scale,
        width=request.width,
        height=request.height,
        do_not_save_samples=True,
        do_not_save_grid=True,
    )


def run_probe(request: Request, prompts: Sequence[str], seeds: Sequence[int]) -> list[ScoredImage]:
    """Score one batch: a prompt with several seeds, or several prompts with one seed each.

    Raises:
        Stopped: the user interrupted. Mixed: the prompts must be scored one by one.
    """
    count = max(len(prompts), len(seeds))
    seeds = [processing.get_fixed_seed(seed) for seed in seeds]
    p = make_processing(Probe, request, list(prompts) * (count if len(prompts) == 1 else 1), seeds)
    p.scripts, p.script_args = scripts.ScriptRunner(), []  # an empty runner, since reForge needs one
    p.scored, p.wants_words = [], request.words
    # The host's caches of conditions outlive a request, but these conditions will not be needed again.
    p.cached_c, p.cached_uc = [None] * len(p.cached_c), [None] * len(p.cached_uc)
    if is_stopping():
        raise Stopped("memnoise: interrupted.")
    with no_prompt_history():
        try:
            processing.process_images(p)
        except Interrupted:
            raise Stopped("memnoise: interrupted.") from None
        finally:
            p.close()
    if len(p.scored) < count:
        raise Stopped("memnoise: interrupted.")
    return p.scored


@contextlib.contextmanager
def no_prompt_history() -> Iterator[None]:
    """A context in which the host does not remember prompts for its paste button."""
    before = getattr(shared.cmd_opts, "no_prompt_history", False)
    shared.cmd_opts.no_prompt_history = True
    try:
        yield
    finally:
        shared.cmd_opts.no_prompt_history = before


@contextlib.contextmanager
def queued(job: str) -> Iterator[None]:
    """A context in the host's queue, with the host's progress and interrupt. The queue is not reentrant."""
    with call_queue.queue_lock:
        shared.state.begin(job=job)
        try:
            yield
        finally:
            shared.state.end()


def calibrate(request: Request, source: str = "built-in") -> tuple[Calibration, list[ScoredImage]]:
    """Score ordinary prompts and save the calibration; nothing is saved if the user interrupts.

    Extra networks in the prompts are left out, since a calibration belongs to the checkpoint alone.

    Args:
        source: the prompts' source, one of `calibration.SOURCES`.

    Returns:
        The calibration, and the scored images that it was made of.

    Raises:
        BadRequest, Unsupported, Stopped: see `score`.
        calibration.BadCalibration: some scores are not positive numbers.
    """
    backend = backend_to_score_with()
    prompts = calibration.distinct((extra_networks.parse_prompt(text)[0] for text in request.prompts), calibration.MOST)
    if len(prompts) < calibration.FEWEST:
        raise BadRequest(
            f"memnoise: to calibrate it takes {calibration.FEWEST} different prompts; these are {len(prompts)}."
        )
    scored_images: list[ScoredImage] = []
    shared.state.job_count = math.ceil(len(prompts) / BATCH)
    for start in range(0, len(prompts), BATCH):
        shared.state.textinfo = f"Memnoise: calibrating the checkpoint, {start} of {len(prompts)} prompts"
        part = list(prompts[start : start + BATCH])
        seeds = list(range(start, start + len(part)))
        try:
            scored_images += run_probe(request, part, seeds)
        except Mixed:
            scored_images += [
                scored for prompt, seed in zip(part, seeds) for scored in run_probe(request, [prompt], [seed])
            ]
    result = calibration.make_calibration(
        calibrations.key(backend, scored_images[0].timestep, request.width, request.height),
        [scored.score for scored in scored_images],
        source,
    )
    calibrations.store().save(result)
    return result, scored_images


def summary(known: Calibration, rate: float = RATE) -> dict[str, Any]:
    """A calibration without its scores, as JSON."""
    document = known.document()
    scores, promise = document.pop("scores"), known.promise(rate)
    return {
        **document,
        "text": str(known),
        "count": len(scores),
        "lowest": scores[0],
        "median": known.median,
        "highest": scores[-1],
        "threshold": known.threshold(rate),
        "false_positives": rate,
        "false_positives_95": [promise.low, promise.high],
        "promise": str(promise),
    }


NOT_CALIBRATED = 'not calibrated, so that nothing can be told; "Calibrate checkpoint" finds what is high here'


NOT_A_NUMBER = "the network's output is not a number, so that nothing can be told"


def verdict(score: float, rate: float, known: Calibration | None) -> str:
    """The meaning of a score, in words."""
    if not math.isfinite(score):
        return NOT_A_NUMBER
    if known is None:
        return NOT_CALIBRATED
    if not score <= known.threshold(rate):
        return "likely memorised: guidance pulls towards a training picture"
    return "ordinary" if known.percentile(score) <= 90 else "ordinary, among the higher scores"


def score_as_json(request: Request, rate: float = RATE) -> dict[str, Any]:
    """`score` as JSON, with percentiles and verdicts if there is a calibration."""
    backend, scored_images = score(request)
    known, notes = calibrations.serving(backend, scored_images[0].timestep, request.width, request.height)
    threshold = known.threshold(rate) if known else None
    images = [
        {
            "prompt": scored.prompt,
            "seed": scored.seed,
            "score": scored.score,
            "percentile": known.percentile(scored.score) if known and math.isfinite(scored.score) else None,
            "flagged": None if threshold is None or not math.isfinite(scored.score) else scored.score > threshold,
            "verdict": verdict(scored.score, rate, known),
            "rows": scored.rows,
            **({"words": [list(pair) for pair in scored.words]} if request.words else {}),
        }
        for scored in scored_images
    ]
    if known is None:
        notes.append(
            f"this checkpoint is not calibrated at {request.width}x{request.height} and first timestep "
            f'{scored_images[0].timestep:g}; "Calibrate checkpoint" on the page, POST /memnoise/v1/calibrate or '
            f"python -m lib_memnoise calibrate does it once, for {2 * calibration.ORDINARY} network rows"
        )
    return {
        "images": images,
        "threshold": threshold,
        "calibrated": known is not None,
        "calibration": None if known is None else summary(known, rate),
        "timestep": scored_images[0].timestep,
        "notes": notes,
    }
