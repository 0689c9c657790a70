"""Δ from the network that the WebUI is about to sample with, at the sampler's own first timestep."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from modules import devices, prompt_parser, shared
from torch import Tensor

from lib_memnoise.core.delta import magnitude, per_image
from lib_memnoise.core.report import ImageReport
from lib_memnoise.sampling.cond_rows import Cond, select_rows
from lib_memnoise.sampling.output_cache import Answer, Answers
from lib_memnoise.webui import tokens
from lib_memnoise.webui.backends.backend import network, token_length
from lib_memnoise.webui.failures import Unsupported, raise_if_interrupted
from lib_memnoise.webui.sampler_start import FirstStep


def empty_prompt(p: Any) -> Cond:
    """One row: the empty prompt, encoded as the host encodes an empty negative prompt (zeroed on SDXL)."""
    texts = prompt_parser.SdConditioning([""], width=p.width, height=p.height, is_negative_prompt=True)
    with devices.autocast():
        schedules = prompt_parser.get_learned_conditioning(shared.sd_model, texts, p.steps)
    return prompt_parser.reconstruct_cond_batch(schedules, 0)


def follows_negative(p: Any, reference: str) -> bool:
    """Whether the host's own unconditional rows are the wanted ones: asked for, or all prompts are empty."""
    prompts = p.hr_negative_prompts if getattr(p, "is_hr_pass", False) else p.negative_prompts
    return reference == "negative" or all(prompt == "" for prompt in prompts or [""])


@dataclass(frozen=True)
class Predictor:
    """Δ(x, T) of a batch of unit-variance latents; `select` gives that of some of its images.

    With AND, where a prompt has parts k of weight w_k, Δ = Σ w_k (out(x, T, y_k) − out(x, T, y_null)): the
    direction that guidance would follow.
    """

    step: FirstStep
    parts: list[list[tuple[int, float]]]
    """For each image, the rows of `cond` that are its prompt, with their weights."""
    cond: Cond
    uncond: Cond
    image_cond: Tensor
    reports: list[ImageReport]
    images: list[int]
    """Which images of the batch these are."""
    answers: Answers
    """Takes what the sampler may ask again."""
    host_uncond: Cond = None
    """The host's own unconditional rows, where these are others than `uncond`."""
    length: int = 0
    """Tokens of the prompts before any padding to another length."""
    unconditional: Tensor | None = None
    """The native outputs of the unconditional rows, where they are known."""
    calls: tuple[tuple[int, int], ...] = ()
    """If given, the host's rows are evaluated in these calls, as its first step would (`Network.first_calls`)."""

    @property
    def rows(self) -> int:
        """Network rows of one evaluation."""
        return sum(len(part) + 1 for part in self.parts)

    def select(self, images: list[int]) -> Predictor:
        return replace(
            self,
            parts=[self.parts[i] for i in images],
            uncond=select_rows(self.uncond, images),
            image_cond=self.image_cond[images],
            reports=[self.reports[i] for i in images],
            images=[self.images[i] for i in images],
            host_uncond=None,
            calls=(),
            step=self.step.select(images),
        )

    def cloned(self) -> Predictor:
        """The same with tensors of its own: those made in inference mode cannot be part of a gradient."""
        return replace(
            self,
            step=self.step.cloned(),
            cond=cloned(self.cond),
            uncond=cloned(self.uncond),
            image_cond=self.image_cond.clone(),
            host_uncond=cloned(self.host_uncond),
        )

    def __call__(self, x: Tensor) -> Tensor:
        raise_if_interrupted()
        images = range(x.shape[0])
        owners = [i for i in images for _ in self.parts[i]]
        cond = select_rows(self.cond, [row for part in self.parts for row, _ in part])
        inputs = self.step.network_input(x)

        evaluated = network().evaluate(self, inputs, owners, cond)
        (_, of_prompts), (_, of_nothing) = evaluated[:2]
        out_cond, out_uncond = of_prompts.float(), of_nothing.float()

        delta = torch.zeros_like(out_uncond)
        weights = [weight for part in self.parts for _, weight in part]
        differences = (out_cond - out_uncond[owners]) * per_image(out_uncond.new_tensor(weights))
        delta = delta.index_add(0, torch.tensor(owners, device=delta.device), differences)
        delta = network().native(delta, self.step.at)

        value = magnitude(delta.detach()).tolist()
        kept = self._keep(value, inputs, owners, evaluated)
        for report, measured, rows in zip(self.reports, value, kept):
            report.forward_rows += len(rows) - (self.unconditional is not None)
            report.before = measured if report.before is None else report.before
        if delta.requires_grad:
            delta.register_hook(self._count_backward)
        return delta

    @property
    def vectors(self) -> list[Tensor]:
        """See `lib_memnoise.core.delta.PromptedDelta`."""
        every = tokens.vectors(self.cond)
        return [every[[row for row, _ in part]] for part in self.parts]

    @property
    def fixed(self) -> list[int]:
        """Start tokens, one for each chunk, and what only pads to the negative prompt's length."""
        return [place for place in range(token_length(self.cond)) if place % tokens.CHUNK == 0 or place >= self.length]

    def hearing(self, x: Tensor) -> Callable[[list[Tensor], list[int]], Tensor]:
        """See `lib_memnoise.core.delta.PromptedDelta`."""
        known: list[Tensor] = []

        def delta(vectors: list[Tensor], images: list[int]) -> Tensor:
            part = self.select(images)
            rows = [row for own in part.parts for row, _ in own]
            # Rows of the condition are now in the order of the images.
            weights, parts, next_row = [[weight for _, weight in own] for own in part.parts], [], 0
            for own in weights:
                parts.append([(next_row + k, weight) for k, weight in enumerate(own)])
                next_row += len(own)
            heard = torch.cat(vectors).to(tokens.vectors(self.cond).dtype)
            part = replace(part, parts=parts, cond=tokens.with_vectors(select_rows(self.cond, rows), heard))
            if not known:
                with torch.no_grad():
                    known.append(self._unconditional(x))
            return replace(part, unconditional=known[0][images])(x[images])

        return delta

    def _unconditional(self, x: Tensor) -> Tensor:
        for report in self.reports:
            report.forward_rows += 1
        return network().unconditional(self, self.step.network_input(x))

    def _keep(
        self, value: list[float], inputs: Tensor, owners: list[int], evaluated: list[tuple[dict[str, Any], Tensor]]
    ) -> list[list[Answer]]:
        """Note what the sampler may ask again. Returns the rows that were evaluated of each image."""
        self.answers.state = network().state()
        t = self.step.at[0]
        rows: list[list[Answer]] = [[] for _ in value]
        for k, (cond, out) in enumerate(evaluated):
            for row, image in enumerate(range(len(value)) if k else owners):
                own = detached(select_rows(cond, [row]))
                rows[image].append(Answer(inputs[image].detach(), t, own, out[row].detach()))
        for image, measured, kept in zip(self.images, value, rows):
            self.answers.keep(image, measured, kept)
        return rows

    def _count_backward(self, gradient: Tensor) -> None:
        raise_if_interrupted()
        for report, part, norm in zip(self.reports, self.parts, magnitude(gradient).tolist()):
            if norm:
                report.backward_rows += len(part) + (self.unconditional is None)


def detached(value: Any) -> Any:
    """The same tensors, in nested lists and dicts, without their history."""
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, Mapping):
        return {key: detached(entry) for key, entry in value.items()}
    return [detached(entry) for entry in value] if isinstance(value, list) else value


def cloned(cond: Cond) -> Cond:
    if isinstance(cond, Mapping):
        return prompt_parser.DictWithShape({key: value.clone() for key, value in cond.items()})
    return None if cond is None else cond.clone()


def make_predictor(
    p: Any,
    x: Tensor,
    c: Any,
    uc: Any,
    *,
    reference: str,
    reports: list[ImageReport],
    empty: Callable[[], Cond],
    as_host: bool = False,
) -> Predictor:
    """Δ of the batch that the host is about to sample, under the conditions of its first step.

    `as_host`: what the host will ask for is evaluated as the host would, also its unconditional rows.
    """
    asked, denoiser = network(), p.sampler.model_wrap_cfg
    parts, given = prompt_parser.reconstruct_multicond_batch(c, 0)
    parts = asked.composition(parts)
    # A host may have no negative prompt where the CFG scale is no guidance.
    negative = None if uc is None else prompt_parser.reconstruct_cond_batch(uc, 0)
    same = follows_negative(p, reference) and negative is not None
    uncond = negative if same else select_rows(empty(), [0] * len(parts))
    cond, uncond = asked.padded(denoiser, given, uncond)
    host_uncond = None
    if as_host and negative is not None:
        host_cond, negative = asked.padded(denoiser, given, negative)
        if not same:
            cond, host_uncond = host_cond, negative
    step = asked.first_step(p, p.sampler, x)
    calls: tuple[tuple[int, int], ...] = ()
    if as_host and negative is not None:
        rows = sum(len(part) for part in parts)
        equal = token_length(cond) == token_length(negative)
        calls = asked.first_calls(p, rows, len(parts), equal=equal, sigma=step.sigma)
    asked.load(x)  # when all is encoded that has to be, which may take the network's place
    return Predictor(
        step=step,
        parts=parts,
        cond=cond,
        uncond=uncond,
        image_cond=image_conditioning(p, x),
        length=token_length(given),
        reports=reports,
        images=list(range(len(parts))),
        answers=Answers(),
        host_uncond=host_uncond,
        calls=calls,
    )


def image_conditioning(p: Any, x: Tensor) -> Tensor:
    """What the host gives the network of the picture, a row an image.

    Raises:
        Unsupported: it cannot be known.
    """
    model = shared.sd_model
    if hasattr(p, "init_images"):
        if getattr(model, "cond_stage_key", None) == "edit":
            raise Unsupported("checkpoints that edit pictures by instructions have two kinds of guidance")
        given: Tensor = p.image_conditioning
        return given.expand(x.shape[0], *given.shape[1:])
    inpainting = getattr(model, "is_inpaint", False) or getattr(
        getattr(model, "model", None), "conditioning_key", None
    ) in ("hybrid", "concat")
    if p.is_hr_pass and inpainting:
        raise Unsupported("the hires pass of an inpainting checkpoint cannot be adjusted")
    found: Tensor = p.txt2img_image_conditioning(x)
    return found
