"""memnoise for pipelines of Hugging Face diffusers (0.30 and later): Stable Diffusion 1 and 2, SDXL, any scheduler.

    mitigated = mitigate(pipe, "a prompt", seeds=[1, 2], settings={"method": "batch_wise"}, num_inference_steps=50)
    images = pipe(**mitigated.arguments).images

The settings, their bounds and the reports are the WebUI's. Nothing of the pipeline is patched.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lib_memnoise.core.delta import magnitude
from lib_memnoise.core.guidance import Start
from lib_memnoise.core.report import ImageReport, note_all, report_infotext
from lib_memnoise.errors import Unsupported
from lib_memnoise.methods.batch import BatchContext, Outcome
from lib_memnoise.methods.pipeline import mitigate as run_pipeline
from lib_memnoise.sampling.memory_mode import first_attempt, free_memory, run_from
from lib_memnoise.settings import ResolvedSettings, Settings, from_mapping, preset_for, to_infotext
from lib_memnoise.torch_utils.patching import frozen

PROMPT_METHODS = ("cross_attention", "padding_fix", "prompt_embedding", "random_tokens")
FAMILIES = {768: "sd1", 1024: "sd2"}  # by the width of a token's vector
Embeds = tuple[Tensor, ...]  # vectors of prompts, `(B, tokens, width)`; with SDXL the pooled ones too, `(B, width)`


@dataclass(frozen=True)
class Mitigated:
    """What to call the pipeline with, and what happened to each image."""

    arguments: dict[str, Any]
    """The pipeline's, `latents` and `callback_on_step_end` among them, for one call."""
    reports: list[ImageReport]
    settings: ResolvedSettings
    pinned: Settings

    @property
    def infotext(self) -> list[dict[str, Any]]:
        """Of each image, what the WebUI would write into its infotext."""
        every = [{**to_infotext(self.pinned), **report_infotext(report)} for report in self.reports]
        return [{key: value for key, value in text.items() if value is not None} for text in every]


@dataclass(frozen=True)
class PipelineDelta:
    """Δ(x, t) of a pipeline's network; a `lib_memnoise.core.delta.SelectableDelta`."""

    unet: Any
    t: Tensor
    network_input: Callable[[Tensor], Tensor]
    """From what Δ is asked at to what the network is given."""
    cond: Embeds
    uncond: Embeds
    time_ids: Any
    reports: Sequence[ImageReport]

    def select(self, images: list[int]) -> PipelineDelta:
        cond, uncond = (tuple(value[images] for value in embeds) for embeds in (self.cond, self.uncond))
        return replace(self, cond=cond, uncond=uncond, reports=[self.reports[i] for i in images])

    def __call__(self, x: Tensor) -> Tensor:
        vectors, *pooled = (torch.cat(pair) for pair in zip(self.cond, self.uncond))
        added = {"text_embeds": pooled[0], "time_ids": self.time_ids.repeat(2 * len(x), 1)} if pooled else {}
        inputs = self.network_input(torch.cat([x, x])).to(vectors.dtype)
        out = self.unet(inputs, self.t, encoder_hidden_states=vectors, added_cond_kwargs=added, return_dict=False)[0]
        cond, uncond = out.float().chunk(2)
        delta: Tensor = cond - uncond
        for report, value in zip(self.reports, magnitude(delta.detach()).tolist()):
            report.forward_rows += 2
            report.before = value if report.before is None else report.before
        if delta.requires_grad:
            delta.register_hook(self._count_backward)
        return delta

    def _count_backward(self, gradient: Tensor) -> None:
        for report, norm in zip(self.reports, magnitude(gradient).tolist()):
            report.backward_rows += 2 if norm else 0


@dataclass
class Guidance:
    """`callback_on_step_end`: until an image's guidance starts, its prompt's rows are the unconditional ones."""

    delta: PipelineDelta
    starts: list[Start]
    negative: Embeds
    """The pipeline's own unconditional rows."""

    def rows(self, t: float) -> list[Tensor]:
        """The conditions for a step at t, unconditional rows first, as the pipeline has them."""
        off = [start.is_off(t) for start in self.starts]
        return [
            torch.cat([torch.stack([(unguided if o else rows)[i] for i, o in enumerate(off)]) for rows in pair])
            for *pair, unguided in zip(self.negative, self.delta.cond, self.delta.uncond)
        ]

    @torch.no_grad()
    def __call__(self, pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        for report in self.delta.reports:
            report.forward_rows += 2
        if step + 1 == len(pipe.scheduler.timesteps):
            return {}
        t = pipe.scheduler.timesteps[step + 1]
        watched = [i for i, start in enumerate(self.starts) if start.evaluates_prompt and start.is_off(float(t))]
        if watched:
            part = replace(self.delta, t=t, network_input=lambda x: pipe.scheduler.scale_model_input(x, t))
            for i, value in zip(watched, magnitude(part.select(watched)(given["latents"][watched])).tolist()):
                self.starts[i].observe(float(t), value)
        return dict(zip(("prompt_embeds", "add_text_embeds"), self.rows(float(t))))


def mitigate(
    pipe: Any,
    prompt: str | Sequence[str],
    *,
    seeds: Sequence[int],
    settings: Mapping[str, Any],
    negative_prompt: str | None = None,
    num_inference_steps: int = 50,
    guidance_scale: float = 7.5,
    height: int | None = None,
    width: int | None = None,
) -> Mitigated:
    """Adjust the noise of a batch, an image for each seed, and prepare its sampling.

    Args:
        pipe: a `StableDiffusionPipeline` or `StableDiffusionXLPipeline`.
        prompt: one for all images, or one for each.
        seeds: of the images' noise, drawn on the CPU as the WebUI draws it.
        settings: by name, as the WebUI's API takes them.

    Raises:
        SettingError: a setting that cannot be used. Unsupported: what cannot be done in diffusers.
    """
    chosen, scheduler = from_mapping({"enabled": True, **settings}), copy.deepcopy(pipe.scheduler)
    kind = {"epsilon": "eps", "v_prediction": "v"}.get(scheduler.config.get("prediction_type", ""), "")
    family = FAMILIES.get(pipe.unet.config.cross_attention_dim, "other")
    resolved = chosen.resolved(preset := preset_for(parameterization=kind, family=family))
    refused = {
        "method": chosen.method in PROMPT_METHODS, "preset": chosen.preset == "calibrated",
        "trace": chosen.trace != "off", "opposite": resolved.start != "first" and resolved.opposite,
    }  # fmt: skip
    if name := next((name for name, is_refused in refused.items() if is_refused), None):
        raise Unsupported(f"{name} = {getattr(resolved, name)} cannot be had in diffusers")
    if not kind:
        raise Unsupported("the network predicts neither noise nor v")
    scheduler.set_timesteps(num_inference_steps, device=pipe.device)
    t, factor = scheduler.timesteps[0], pipe.vae_scale_factor
    size = [(length or pipe.unet.config.sample_size * factor) // factor for length in (height, width)]
    shape = (pipe.unet.config.in_channels, *size)
    noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    prompts = [prompt] * len(seeds) if isinstance(prompt, str) else list(prompt)
    if len(prompts) != len(seeds):
        raise ValueError(f"memnoise: there are {len(prompts)} prompts for {len(seeds)} seeds; each image takes one.")
    reports = [ImageReport(left_alone=not text.strip()) for text in prompts]
    cond, negative = encoded(pipe, prompts, negative_prompt)
    uncond = negative if chosen.reference == "negative" else encoded(pipe, prompts, None)[1]
    ids, whole = None, tuple(length * factor for length in size)
    if len(cond) > 1:
        projection = pipe.text_encoder_2.config.projection_dim
        ids = pipe._get_add_time_ids(whole, (0, 0), whole, cond[0].dtype, projection).to(pipe.device)
    delta = PipelineDelta(
        pipe.unet, t, lambda x: scheduler.scale_model_input(x * scheduler.init_noise_sigma, t), cond, uncond, ids,
        reports)  # fmt: skip
    context = BatchContext(kind, float(t), float(scheduler.alphas_cumprod[round(float(t))]), seeds, prompts)

    def with_gradient(x: Tensor, delta: Any, context: BatchContext) -> Outcome:
        mode, note = first_attempt(pipe.unet, x, 2 * len(x), free_memory(x.device)), partial(note_all, delta.reports)
        return run_from(mode, x, delta, resolved, context, unet=pipe.unet, empty=torch.cuda.empty_cache, note=note)

    with frozen(pipe.unet):
        found = run_pipeline(
            noise.to(pipe.device), delta, resolved, context, reports=reports, guidance=guidance_scale,
            with_gradient=with_gradient)  # fmt: skip
    arguments = {"latents": found.outcome.x.to(cond[0].dtype), "guidance_scale": guidance_scale,
        "num_inference_steps": num_inference_steps}  # fmt: skip
    guidance = Guidance(delta, found.starts, negative)
    for name, rows in zip(("prompt_embeds", "pooled_prompt_embeds"), guidance.rows(float(t))):
        arguments[f"negative_{name}"], arguments[name] = rows.chunk(2)
    if guidance_scale > 1:
        names = ["latents", "prompt_embeds", "add_text_embeds"][: 1 + len(cond)]
        arguments |= {"callback_on_step_end": guidance, "callback_on_step_end_tensor_inputs": names}
    return Mitigated(arguments, reports, resolved, chosen.pinned(preset))


@torch.no_grad()
def encoded(pipe: Any, prompts: Sequence[str], negative: str | None) -> tuple[Embeds, Embeds]:
    """Conditions of the prompts and of the negative prompt, as the pipeline makes them."""
    negatives = None if negative is None else [negative] * len(prompts)
    found = pipe.encode_prompt(list(prompts), device=pipe.device, num_images_per_prompt=1,
        do_classifier_free_guidance=True, negative_prompt=negatives)  # fmt: skip
    return found[:4:2], found[1:4:2]
