"""The calls of the network in hosts that patch a U-Net: names, inputs and chunks of rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from modules import shared
from torch import Tensor

from lib_memnoise.sampling.backend import Composition
from lib_memnoise.sampling.cond_rows import Cond, Conditions, vectors

WRAPPER = "model_function_wrapper"
"""The U-Net's option for a function that wraps the network."""
NOT_CONDITIONS = ("transformer_options", "control", "control_model")
"""The network's inputs that are not conditions."""
COND, UNCOND = 0, 1
"""The host's marks of chunks of rows."""
ELSEWHERE = 1 << 30
"""The number of a row that does not belong to the step."""


def patcher() -> Any:
    """The U-Net with the patches of the current pass."""
    return shared.sd_model.forge_objects.unet


def scaling(model: Any) -> Any:
    """The object that converts between the network's inputs and outputs and the sampler's latents."""
    return model.predictor if hasattr(model, "predictor") else model.model_sampling


def gain(model: Any, sigma: Tensor) -> float:
    """∂(denoised)/∂(native output) at a sigma `(1,)`: denoised latents are linear in the native output."""
    one = torch.ones(1, 1, 1, 1, device=sigma.device)
    return float(scaling(model).calculate_denoised(sigma, one, torch.zeros_like(one)))


def paired_parts(parts: Composition) -> Composition:
    """The parts as the host uses them: as many as the shortest prompt has, with the weights of the last prompt."""
    count = min(len(prompt_parts) for prompt_parts in parts)
    return [[(row, weight) for (row, _), (_, weight) in zip(prompt_parts[:count], parts[-1])] for prompt_parts in parts]


def which_part(crossattn: Tensor, cond: Cond, rows_of_part: Sequence[list[int]]) -> int | None:
    """The number of the prompts' part that a chunk of rows is; None where it is none. Equal parts are alike."""
    every = vectors(cond)
    length = every.shape[1]
    for k, rows in enumerate(rows_of_part):
        expected = every[rows].to(crossattn)
        if crossattn.shape[0] == len(rows) and torch.equal(crossattn[:, :length], expected):
            return k
    return None


def contents(c: Mapping[str, Any]) -> Conditions:
    """The conditions among the network's inputs."""
    return {key: value for key, value in c.items() if key not in NOT_CONDITIONS}


def nested(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply a function to every tensor in nested lists and dicts; these are new, because the network empties them."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: nested(entry, function) for key, entry in value.items()}
    return [nested(entry, function) for entry in value] if isinstance(value, list) else value


def marks_of(c: Mapping[str, Any], rows: int) -> list[int]:
    """The mark of each row, COND or UNCOND."""
    chunks = c["transformer_options"]["cond_or_uncond"]
    return [mark for mark in chunks for _ in range(rows // len(chunks))]


def some_rows(c: Mapping[str, Any], rows: Sequence[int], marks: Sequence[int] | None = None) -> dict[str, Any]:
    """The network's inputs for some rows, each as a chunk of its own.

    Args:
        c: the inputs of a whole call.
        marks: replaces the rows' own marks.
    """
    count = c["c_crossattn"].shape[0]

    def take(value: Tensor) -> Tensor:
        return value[list(rows)] if value.ndim and value.shape[0] == count else value

    selected = {key: nested(value, take) for key, value in c.items() if key != "transformer_options"}
    if marks is None:
        every = marks_of(c, count)
        marks = [every[row] for row in rows]
    options = dict(c["transformer_options"])
    options["cond_or_uncond"] = list(marks)
    options["sigmas"] = options["sigmas"][:1]
    if "cond_mark" in options:
        options["cond_mark"] = options["cond_mark"].new_tensor([float(mark) for mark in marks])
        options["cond_indices"] = [k for k, mark in enumerate(marks) if mark == COND]
        options["uncond_indices"] = [k for k, mark in enumerate(marks) if mark != COND]
    if "uuids" in options:
        chunk = count // len(options["uuids"])
        options["uuids"] = [options["uuids"][row // chunk] for row in rows]
    return {**selected, "transformer_options": options}


def call_behind(
    inner: Callable[..., Tensor] | None, apply_model: Callable[..., Tensor], args: dict[str, Any]
) -> Tensor:
    """Call what a wrapper wraps: another wrapper, or the network."""
    return apply_model(args["input"], args["timestep"], **args["c"]) if inner is None else inner(apply_model, args)
