"""The backend for hosts that patch a U-Net (Forge, reForge): `forge_objects.unet` gives denoised latents at a sigma.

These hosts generate in inference mode, give each pass a U-Net with patches of its own, and evaluate each part of the
prompts, and the unconditional rows, as a chunk with one row for each image.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from modules import shared
from torch import Tensor, nn

from lib_memnoise.core.delta import per_image
from lib_memnoise.errors import Unsupported
from lib_memnoise.sampling.backend import Composition, DeltaQuery, Evaluated, FirstStep
from lib_memnoise.sampling.cond_rows import Cond, Conditions
from lib_memnoise.sampling.guider import GuidancePlan
from lib_memnoise.torch_utils.inference_tensors import normal_tensors
from lib_memnoise.torch_utils.out_of_place import out_of_place
from lib_memnoise.torch_utils.patching import original
from lib_memnoise.webui.backends.base import WebuiBackend
from lib_memnoise.webui.backends.patcher_calls import (
    UNCOND,
    WRAPPER,
    call_behind,
    contents,
    gain,
    paired_parts,
    patcher,
    scaling,
    which_part,
)
from lib_memnoise.webui.backends.patcher_guider import PatchGuider
from lib_memnoise.webui.backends.patcher_hosts import host
from lib_memnoise.webui.sampler_start import in_sigmas, in_timesteps


def fingerprint(value: Any) -> Any:
    """A value that is equal for equal options of a U-Net. memnoise's own wrapper is left out."""
    if isinstance(value, Mapping):
        entries = []
        for key, entry in value.items():
            if key == WRAPPER and hasattr(entry, "memnoise_inner"):
                entry = entry.memnoise_inner
            if entry is not None:
                entries.append((key, fingerprint(entry)))
        return tuple(entries)
    if isinstance(value, (list, tuple)):
        return tuple(fingerprint(entry) for entry in value)
    return value if isinstance(value, (str, int, float, bool, type(None))) else id(value)


def without_token_merging(options: Any) -> Any:
    """A U-Net's options without token merging, whose gradient is wrong."""
    if isinstance(options, Mapping):
        return {key: without_token_merging(value) for key, value in options.items()}
    if isinstance(options, list):
        return [value for value in options if not str(getattr(value, "__module__", "")).endswith("tomesd")]
    return options


def options_of(unet: Any) -> dict[str, Any]:
    """The options to evaluate a U-Net with; without token merging where gradients are enabled."""
    options: dict[str, Any] = unet.model_options
    return without_token_merging(options) if torch.is_grad_enabled() else dict(options)


@dataclass(frozen=True)
class Call:
    """One call of the network."""

    c: Conditions
    marks: list[int]
    """COND or UNCOND for each chunk."""
    out: Tensor
    """The outputs `(rows, C, H, W)`."""


def recording(options: dict[str, Any]) -> tuple[dict[str, Any], list[Call]]:
    """Options that record every call of the network, and the list that the calls are added to."""
    calls: list[Call] = []
    inner = options.get(WRAPPER)

    def record(apply_model: Callable[..., Tensor], args: dict[str, Any]) -> Tensor:
        out = call_behind(inner, apply_model, args)
        calls.append(Call(contents(args["c"]), list(args["cond_or_uncond"]), out))
        return out

    return {**options, WRAPPER: record}, calls


class UnetPatcherBackend(WebuiBackend):
    """The backend that evaluates `forge_objects.unet` of the current pass."""

    @property
    def unet(self) -> nn.Module:
        unet: nn.Module = patcher().model.diffusion_model
        return unet

    @property
    def kind(self) -> str:
        scale, one = scaling(patcher().model), torch.ones(1, 1, 1, 1)
        sigma = torch.ones(1)
        if float(scale.calculate_input(sigma, one)) == 1:
            return "flow"
        kept = float(scale.calculate_denoised(sigma, torch.zeros_like(one), one))
        return "eps" if kept == 1 else "v"

    def alpha_bar(self, t: float) -> float:
        return float(1 / (1 + scaling(patcher().model).sigmas[round(t)] ** 2))

    def load(self, x: Tensor) -> None:
        host().function("prepare")(patcher(), x)

    def first_step(self, p: Any, sampler: Any, x: Tensor) -> FirstStep:
        c_in: float | Tensor = 1.0
        if hasattr(sampler, "get_timesteps"):
            # The host's denoiser looks up the sigma, and scales the latents of these samplers.
            alphas_cumprod = shared.sd_model.alphas_cumprod.to(x.device)
            t, scale, base = in_timesteps(p, sampler, x, alphas_cumprod)
            sigma = (((1 - alphas_cumprod) / alphas_cumprod) ** 0.5)[round(t)].reshape(1)
            c_in = per_image((sigma**2.0 + 1.0) ** 0.5)
        else:
            sigma, scale, base = in_sigmas(p, sampler, x)
        timestep = scaling(patcher().model).timestep(sigma)
        return FirstStep(float(timestep), sigma, scale, c_in, base, sigma=float(sigma))

    def composition(self, parts: Composition) -> Composition:
        return paired_parts(parts)

    def evaluate(self, query: DeltaQuery, inputs: Tensor, owners: list[int], cond: Cond) -> Evaluated:
        if query.unconditional is not None:
            (prompts, _) = self._evaluate_by_host(query, inputs, cond, None)
            return [prompts, (self._conditions(query, inputs), query.unconditional)]
        own = query.uncond if query.host_uncond is None else query.host_uncond
        prompts, others = self._evaluate_by_host(query, inputs, cond, own)
        if query.host_uncond is None:
            return [prompts, others]
        return [prompts, self._evaluate_by_host(query, inputs, None, query.uncond)[1], others]

    def unconditional(self, query: DeltaQuery, inputs: Tensor) -> Tensor:
        return self._evaluate_by_host(query, inputs, None, query.uncond)[1][1]

    def _conditions(self, query: DeltaQuery, inputs: Tensor) -> Conditions:
        """The conditions of the unconditional rows, as the network receives them."""
        compiled = host().function("compile")(query.uncond)[0]
        self._complete([compiled], query, inputs)
        return {key: value.cond for key, value in compiled["model_conds"].items()}

    def _complete(self, conds: list[Any], query: DeltaQuery, inputs: Tensor) -> None:
        """Add the picture's condition and ControlNets to the conditions, as the host's denoiser does."""
        unet = patcher()
        picture = query.image_cond
        if isinstance(unet.extra_concat_condition, Tensor):
            picture = unet.extra_concat_condition
            if picture.shape[0] > len(inputs):
                picture = picture[query.images]
        if picture.shape[0] == inputs.shape[0] and picture.shape[2:] == inputs.shape[2:]:
            for cond in conds:
                cond["model_conds"]["c_concat"] = host().function("condition")(picture)
        if unet.controlnet_linked_list is not None:
            for cond in conds:
                cond["control"] = unet.controlnet_linked_list

    def _evaluate_by_host(self, query: DeltaQuery, inputs: Tensor, cond: Cond, uncond: Cond) -> Evaluated:
        """Evaluate the prompts' rows and the unconditional rows with the host's own function; either may be None."""
        images = len(inputs)
        first = [sum(map(len, query.parts[:i])) for i in range(images)]
        composition = [
            [(first[i] + k, weight) for k, (_, weight) in enumerate(own)] for i, own in enumerate(query.parts)
        ]
        rows_of_part = [list(column) for column in zip(*[[row for row, _ in own] for own in composition])]
        conds = [] if cond is None else host().function("compile_weighted")(cond, composition)
        unconds = None if uncond is None else host().function("compile")(uncond)
        self._complete([*conds, *(unconds or [])], query, inputs)
        unet = patcher()
        options, calls = recording(options_of(unet))
        host().function("evaluate")(unet.model, conds, unconds, inputs, query.step.at.repeat(images), options)

        count = 0 if cond is None else sum(map(len, query.parts))
        outputs: list[tuple[Conditions, Tensor]] = [({}, inputs[:1])] * (count + images)
        for call in calls:
            for chunk, mark in enumerate(call.marks):
                place = slice(chunk * images, (chunk + 1) * images)
                given = {key: value[place] for key, value in call.c.items() if isinstance(value, Tensor)}
                part = None if mark == UNCOND else which_part(given["c_crossattn"], cond, rows_of_part)
                rows = range(count, count + images) if mark == UNCOND else rows_of_part[part or 0]
                for k, row in enumerate(rows):
                    outputs[row] = {key: value[k : k + 1] for key, value in given.items()}, call.out[place][k : k + 1]

        def group(part: list[tuple[Conditions, Tensor]]) -> tuple[Conditions, Tensor]:
            shapes = {tuple(given["c_crossattn"].shape) for given, _ in part if given}
            # Rows of several lengths are not in the form that the sampler will need, so they get no conditions.
            together = (
                {key: torch.cat([given[key] for given, _ in part]) for key in part[0][0]} if len(shapes) == 1 else {}
            )
            return together, torch.cat([out for _, out in part])

        return [group(part) if part else ({}, inputs[:0]) for part in (outputs[:count], outputs[count:])]

    def native(self, difference: Tensor, at: Tensor) -> Tensor:
        return difference / gain(patcher().model, at)

    def state(self) -> tuple[Any, ...]:
        unet = patcher()
        return (
            id(unet.model),
            unet.model.apply_model,
            original(unet.model.diffusion_model.forward),
            fingerprint(options_of(unet)),
            id(unet.controlnet_linked_list),
            id(unet.extra_concat_condition),
        )

    def is_used(self) -> bool:
        return hasattr(patcher().model_options.get(WRAPPER), "memnoise_inner")

    @contextlib.contextmanager
    def left_as_it_was(self) -> Iterator[None]:
        objects = shared.sd_model.forge_objects
        shared.sd_model.forge_objects = objects.shallow_copy()
        try:
            yield
        finally:
            shared.sd_model.forge_objects = objects

    @contextlib.contextmanager
    def gradients(self) -> Iterator[None]:
        """A context outside inference mode, with ordinary weights and without in-place assignments.

        Token merging is off as well (`options_of`).
        """
        model = patcher().model
        with torch.inference_mode(False), normal_tensors(model), out_of_place(model.diffusion_model):
            try:
                yield
            except RuntimeError as error:
                if "nference tensors cannot be saved" not in str(error):
                    raise
                raise Unsupported(
                    "this checkpoint's weights are kept in a form that has no gradient; use batch-wise or "
                    "per-sample's rule forward"
                ) from error

    def guider(self, p: Any, denoiser: Any, plan: GuidancePlan) -> PatchGuider:
        return PatchGuider(self, p, plan)
