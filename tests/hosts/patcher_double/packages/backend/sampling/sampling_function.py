"""One step's evaluation of the network, and classifier-free guidance."""

from __future__ import annotations

import math
import weakref
from typing import Any, NamedTuple

import torch
from modules import shared

from backend.sampling.condition import Condition, compile_conditions, compile_weighted_conditions

COND, UNCOND = 0, 1

displaced: weakref.WeakSet[Any] = weakref.WeakSet()
"""Networks that are not loaded: there is room for one model at a time, and others have been used since."""


class Chunk(NamedTuple):
    """One part of the prompts, or the unconditional rows: a row an image."""

    mark: int
    strength: float
    given: dict[str, Any]
    control: Any

    def fits(self, other: Chunk) -> bool:
        """Whether both can be evaluated in one call."""
        alike = self.control is other.control and self.given.keys() == other.given.keys()
        return alike and all(self.given[key].can_concat(other.given[key]) for key in self.given)


def _chunk(entry: dict[str, Any], mark: int, x: torch.Tensor) -> Chunk:
    given = {key: value.process_cond(len(x), x.device) for key, value in entry["model_conds"].items()}
    return Chunk(mark, entry.get("strength", 1.0), given, entry.get("control"))


def _options(model_options: dict[str, Any], marks: list[int], sigma: torch.Tensor) -> dict[str, Any]:
    """What the network's own parts are told of a call."""
    every = [mark for mark in marks for _ in sigma]
    return {
        **model_options.get("transformer_options", {}),
        "cond_or_uncond": list(marks),
        "sigmas": sigma,
        "cond_mark": torch.tensor(every, dtype=sigma.dtype),
        "cond_indices": [row for row, mark in enumerate(every) if mark == COND],
        "uncond_indices": [row for row, mark in enumerate(every) if mark != COND],
    }


def calc_cond_uncond_batch(
    model: Any, cond: list[Any], uncond: list[Any] | None, x_in: Any, timestep: Any, model_options: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The denoised latents of the prompts, their parts averaged by weight, and the unconditional ones, else zeros."""
    waiting = [_chunk(entry, COND, x_in) for entry in cond]
    waiting += [_chunk(entry, UNCOND, x_in) for entry in uncond or []]
    totals = torch.zeros_like(x_in), torch.zeros_like(x_in)
    weights = [1e-37, 1e-37]
    while waiting:
        together = [chunk for chunk in waiting if chunk.fits(waiting[0])][::-1]
        if not shared.opts.batch_cond_uncond:  # stands for memory that is short
            together = together[:1]
        waiting = [chunk for chunk in waiting if all(chunk is not other for other in together)]
        marks = [chunk.mark for chunk in together]
        x, sigma = torch.cat([x_in] * len(together)), torch.cat([timestep] * len(together))
        first = together[0].given
        c: dict[str, Any] = {
            key: value.concat([chunk.given[key] for chunk in together[1:]]) for key, value in first.items()
        }
        c["transformer_options"] = _options(model_options, marks, timestep)
        control = together[0].control
        if control is not None:
            c |= {"control": control.get_control(x, sigma, dict(c), len(together)), "control_model": control}
        wrapper = model_options.get("model_function_wrapper")
        if wrapper is None:
            out = model.apply_model(x, sigma, **c)
        else:
            out = wrapper(model.apply_model, {"input": x, "timestep": sigma, "c": c, "cond_or_uncond": marks})
        for chunk, own in zip(together, out.chunk(len(together))):
            totals[chunk.mark].add_(own * chunk.strength)
            weights[chunk.mark] += chunk.strength
    return totals[COND] / weights[COND], totals[UNCOND] / weights[UNCOND]


def sampling_function(denoiser: Any, params: Any, cond_scale: float, composition: Any) -> tuple[Any, Any, Any]:
    """What is followed in a step of the denoiser, and of what it is made."""
    unet = denoiser.inner_model.inner_model.forge_objects.unet
    options = unet.model_options
    uncond = compile_conditions(params.text_uncond)
    cond = compile_weighted_conditions(params.text_cond, composition)
    picture = params.image_cond if unet.extra_concat_condition is None else unet.extra_concat_condition
    for entry in [*cond, *(uncond or [])]:
        if (len(picture), *picture.shape[2:]) == (len(params.x), *params.x.shape[2:]):
            entry["model_conds"]["c_concat"] = Condition(picture)
        if unet.controlnet_linked_list is not None:
            entry["control"] = unet.controlnet_linked_list
    if math.isclose(cond_scale, 1.0) and not options.get("disable_cfg1_optimization", False):
        uncond = None
    of_prompts, of_nothing = calc_cond_uncond_batch(unet.model, cond, uncond, params.x, params.sigma, options)
    strength = sum(entry["strength"] for entry in cond)
    scale = cond_scale if math.isclose(strength, 1.0) else cond_scale * strength
    return of_nothing + (of_prompts - of_nothing) * scale, of_prompts, of_nothing


def sampling_prepare(unet: Any, x: torch.Tensor) -> None:
    """Load the network."""
    displaced.discard(unet.model)


def sampling_cleanup(unet: Any) -> None:
    pass
