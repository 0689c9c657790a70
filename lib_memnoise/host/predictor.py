"""Δ from the network that the WebUI is about to sample with, at the sampler's own first timestep."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from modules import devices, prompt_parser, shared
from torch import Tensor

from lib_memnoise.generation import ImageReport
from lib_memnoise.host import words
from lib_memnoise.host.handover import Answer, Answers, network_state
from lib_memnoise.host.refusals import Unsupported, raise_if_interrupted
from lib_memnoise.host.rows import Cond, select_rows
from lib_memnoise.prediction import magnitude, per_image


def tokens(cond: Cond) -> int:
    return cond.shape[1]


def conditioning(text: Cond, image: Tensor, *, unconditional: bool) -> dict[str, Any]:
    """The condition dict that the host's denoiser gives the network for these rows."""
    if shared.sd_model.model.conditioning_key == "crossattn-adm":
        return {"c_crossattn": [text], "c_adm": torch.zeros_like(image) if unconditional else image}
    if isinstance(text, Mapping):
        return {**text, "c_concat": [image]}
    return {"c_crossattn": [text], "c_concat": [image]}


def pad_unconditional(denoiser: Any, cond: Cond, uncond: Cond) -> tuple[Cond, Cond]:
    """Both conditions with the padding that the host's options ask for where their lengths differ."""
    if tokens(cond) == tokens(uncond):
        return cond, uncond
    for option in ("pad_cond_uncond_v0", "pad_cond_uncond"):
        if getattr(shared.opts, option, False):
            # The host pads dicts in place; these are copies of the dict, not of the tensors.
            copies = [prompt_parser.DictWithShape(c) if isinstance(c, Mapping) else c for c in (cond, uncond)]
            return getattr(denoiser, option)(*copies)
    return cond, uncond


def empty_prompt(p: Any) -> Cond:
    """One row: the empty prompt, encoded as the host encodes an empty negative prompt (zeroed on SDXL)."""
    texts = prompt_parser.SdConditioning([""], width=p.width, height=p.height, is_negative_prompt=True)
    with devices.autocast():
        schedules = prompt_parser.get_learned_conditioning(shared.sd_model, texts, p.steps)
    return prompt_parser.reconstruct_cond_batch(schedules, 0)


def follows_negative(p: Any, reference: str) -> bool:
    """Whether the host's own unconditional rows are the wanted ones: asked for, or all prompts are empty."""
    prompts = p.hr_negative_prompts if p.is_hr_pass else p.negative_prompts
    return reference == "negative" or all(prompt == "" for prompt in prompts or [""])


@dataclass(frozen=True)
class FirstStep:
    """The sampler's first evaluation: network input `(base + scale · noise) · c_in` at `timestep`."""

    timestep: Tensor
    """`(1,)`, as the network receives it: T."""
    scale: float | Tensor
    c_in: float | Tensor = 1.0
    base: float | Tensor = 0.0
    """0 in txt2img; in a second pass the clean latent, scaled as the sampler scales it."""
    sigma: float = float("inf")
    """What the sampler's denoiser is given: a sigma, or infinity where it counts in timesteps."""

    @property
    def t(self) -> float:
        return float(self.timestep)

    def network_input(self, noise: Tensor) -> Tensor:
        return (self.base + noise * self.scale) * self.c_in


def first_step(p: Any, sampler: Any, x: Tensor) -> FirstStep:
    """Where this sampler will evaluate the network first, read off the sampler itself.

    `x` is the clean latent in a second pass, the noise in txt2img.
    """
    second_pass = p.is_hr_pass
    steps = (p.hr_second_pass_steps or p.steps) if second_pass else p.steps
    used = 0
    if second_pass:
        from modules import sd_samplers_common

        steps, used = sd_samplers_common.setup_img2img_steps(p, steps)

    if hasattr(sampler, "get_timesteps"):
        timesteps = sampler.get_timesteps(p, steps).to(x.device)
        if second_pass:
            alpha_bar = shared.sd_model.alphas_cumprod[timesteps[used]]
            return FirstStep(
                timestep=timesteps[used - 1].float().reshape(1),
                scale=(1 - alpha_bar).sqrt(),
                base=x * alpha_bar.sqrt(),
            )
        # UniPC has a continuous schedule of its own, whose first timestep is the last of training.
        first = 999.0 if sampler.config.name == "UniPC" else float(timesteps[-1])
        return FirstStep(timestep=x.new_full((1,), first), scale=1.0)

    inner = sampler.model_wrap_cfg.inner_model
    sigmas = sampler.get_sigmas(p, steps)
    if second_pass:
        sigmas = sigmas[steps - used - 1 :]
    start = sigma = sigmas[0].to(x)
    if second_pass:
        scale = start
    else:
        scale = torch.sqrt(1.0 + start**2.0) if getattr(shared.opts, "sgm_noise_multiplier", False) else start
        if sampler.config.name in ("DPM fast", "DPM adaptive"):
            # These two ignore the schedule and start from the model's own largest sigma.
            sigma = inner.sigmas[-1].to(x)
    sigma = sigma.reshape(1)
    return FirstStep(
        timestep=inner.sigma_to_t(sigma),
        scale=scale,
        c_in=per_image(inner.get_scalings(sigma)[-1]),
        base=x if second_pass else 0.0,
        sigma=float(sigma),
    )


def leaves_out_unconditional(p: Any, sigma: float, step: int = 0, steps: int = 1) -> bool:
    """Whether the host's step of this number evaluates no unconditional rows ("skip early CFG", NGMS)."""
    early, floor = getattr(shared.opts, "skip_early_cond", 0.0), getattr(p, "s_min_uncond", 0.0)
    if early != 0.0 and step / steps <= early:
        return True
    return bool((step % 2 or getattr(shared.opts, "s_min_uncond_all", False)) and sigma < floor)


def host_calls(p: Any, rows: int, images: int, *, equal: bool, sigma: float) -> list[tuple[int, int]]:
    """The calls in which the host's first step evaluates its rows, each from a row to the next call's first.

    Rows are those of the prompts, then the unconditional ones, unless the host leaves these out.
    """
    together = getattr(shared.opts, "batch_cond_uncond", True)
    skipped = leaves_out_unconditional(p, sigma)
    if equal or skipped:
        every = rows if skipped else rows + images
        size = every if together else images
        return [(a, min(a + size, every)) for a in range(0, every, size)]
    size = 2 * images if together else images
    return [(a, min(a + size, rows)) for a in range(0, rows, size)] + [(rows, rows + images)]


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
    """If given, the host's rows are evaluated in these calls, as its first step would (`host_calls`)."""

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
            step=self.step
            if not isinstance(self.step.base, Tensor)
            else replace(self.step, base=self.step.base[images]),
        )

    def __call__(self, x: Tensor) -> Tensor:
        raise_if_interrupted()
        images = range(x.shape[0])
        owners = [i for i in images for _ in self.parts[i]]
        cond = select_rows(self.cond, [row for part in self.parts for row, _ in part])
        inputs = self.step.network_input(x)

        conditional = conditioning(cond, self.image_cond[owners], unconditional=False)
        unconditional = conditioning(self.uncond, self.image_cond, unconditional=True)
        if self.unconditional is not None:
            evaluated = [
                (conditional, self._network(inputs[owners], conditional)),
                (unconditional, self.unconditional),
            ]
        elif self.calls:
            evaluated = self._as_host(inputs, owners, cond, conditional, unconditional)
        elif tokens(cond) == tokens(self.uncond) and getattr(shared.opts, "batch_cond_uncond", True):
            out = self._network(torch.cat([inputs[owners], inputs]), joined(conditional, unconditional))
            evaluated = list(zip((conditional, unconditional), out.split([len(owners), len(images)])))
        else:
            evaluated = [
                (conditional, self._network(inputs[owners], conditional)),
                (unconditional, self._network(inputs, unconditional)),
            ]
        (_, native_cond), (_, native_uncond) = evaluated[:2]
        out_cond, out_uncond = native_cond.float(), native_uncond.float()

        delta = torch.zeros_like(out_uncond)
        weights = [weight for part in self.parts for _, weight in part]
        differences = (out_cond - out_uncond[owners]) * per_image(out_uncond.new_tensor(weights))
        delta = delta.index_add(0, torch.tensor(owners, device=delta.device), differences)

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
        """See `lib_memnoise.prediction.PromptedDelta`."""
        every = words.vectors(self.cond)
        return [every[[row for row, _ in part]] for part in self.parts]

    @property
    def fixed(self) -> list[int]:
        """Start tokens, one for each chunk, and what only pads to the negative prompt's length."""
        return [place for place in range(tokens(self.cond)) if place % words.CHUNK == 0 or place >= self.length]

    def hearing(self, x: Tensor) -> Callable[[list[Tensor], list[int]], Tensor]:
        """See `lib_memnoise.prediction.PromptedDelta`."""
        known: list[Tensor] = []

        def delta(vectors: list[Tensor], images: list[int]) -> Tensor:
            part = self.select(images)
            rows = [row for own in part.parts for row, _ in own]
            # Rows of the condition are now in the order of the images.
            weights, parts, next_row = [[weight for _, weight in own] for own in part.parts], [], 0
            for own in weights:
                parts.append([(next_row + k, weight) for k, weight in enumerate(own)])
                next_row += len(own)
            heard = torch.cat(vectors).to(words.vectors(self.cond).dtype)
            part = replace(part, parts=parts, cond=words.with_vectors(select_rows(self.cond, rows), heard))
            if not known:
                with torch.no_grad():
                    known.append(self._unconditional(x))
            return replace(part, unconditional=known[0][images])(x[images])

        return delta

    def _unconditional(self, x: Tensor) -> Tensor:
        for report in self.reports:
            report.forward_rows += 1
        return self._network(self.step.network_input(x), conditioning(self.uncond, self.image_cond, unconditional=True))

    def _as_host(
        self, inputs: Tensor, owners: list[int], cond: Cond, conditional: dict[str, Any], unconditional: dict[str, Any]
    ) -> list[tuple[dict[str, Any], Tensor]]:
        """The same rows, those that the host will ask for in its very calls: what is handed over is then exact.

        Returns condition and outputs of the prompts' rows, of the unconditional ones, and of the host's own where
        these are others.
        """
        count = len(owners)
        own = self.uncond if self.host_uncond is None else self.host_uncond
        theirs = conditioning(own, self.image_cond, unconditional=True)
        equal = tokens(cond) == tokens(own)
        every = torch.cat([inputs[owners], inputs])
        parts = []
        for a, b in self.calls:
            if equal:
                condition = select_rows(joined(conditional, theirs), range(a, b))
            elif b <= count:
                condition = select_rows(conditional, range(a, b))
            else:
                condition = theirs
            parts.append(self._network(every[a:b], condition))
        out = torch.cat(parts)
        prompts, others = (conditional, out[:count]), [(theirs, out[count:])] if len(out) > count else []
        if self.host_uncond is None and others:
            return [prompts, *others]
        return [prompts, (unconditional, self._network(inputs, unconditional)), *others]

    def _keep(
        self, value: list[float], inputs: Tensor, owners: list[int], evaluated: list[tuple[dict[str, Any], Tensor]]
    ) -> list[list[Answer]]:
        """Note what the sampler may ask again. Returns the rows that were evaluated of each image."""
        self.answers.state = network_state()
        t = self.step.timestep[0]
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

    def _network(self, inputs: Tensor, cond: dict[str, Any]) -> Tensor:
        timestep = self.step.timestep.expand(inputs.shape[0])
        out: Tensor = shared.sd_model.apply_model(inputs, timestep, cond=cond)
        return out


def detached(value: Any) -> Any:
    """The same tensors, in nested lists and dicts, without their history."""
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, Mapping):
        return {key: detached(entry) for key, entry in value.items()}
    return [detached(entry) for entry in value] if isinstance(value, list) else value


def joined(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """One condition dict for the rows of two."""
    return {
        key: [torch.cat(pair) for pair in zip(value, second[key])]
        if isinstance(value, list)
        else torch.cat([value, second[key]])
        for key, value in first.items()
    }


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
    denoiser = p.sampler.model_wrap_cfg
    parts, given = prompt_parser.reconstruct_multicond_batch(c, 0)
    negative = prompt_parser.reconstruct_cond_batch(uc, 0)
    same = follows_negative(p, reference)
    uncond = negative if same else select_rows(empty(), [0] * len(parts))
    cond, uncond = pad_unconditional(denoiser, given, uncond)
    host_uncond, calls = None, []
    if as_host:
        host_cond, negative = pad_unconditional(denoiser, given, negative)
        if not same:
            cond, host_uncond = host_cond, negative
    if p.is_hr_pass and shared.sd_model.model.conditioning_key in ("hybrid", "concat"):
        raise Unsupported("the hires pass of an inpainting checkpoint cannot be adjusted")
    step = first_step(p, p.sampler, x)
    if as_host:
        rows = sum(len(part) for part in parts)
        equal = tokens(cond) == tokens(negative)
        calls = host_calls(p, rows, len(parts), equal=equal, sigma=step.sigma)
    return Predictor(
        step=step,
        parts=parts,
        cond=cond,
        uncond=uncond,
        image_cond=p.txt2img_image_conditioning(x),
        length=tokens(given),
        reports=reports,
        images=list(range(len(parts))),
        answers=Answers(),
        host_uncond=host_uncond,
        calls=tuple(calls),
    )
