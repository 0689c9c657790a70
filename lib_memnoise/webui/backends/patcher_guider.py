"""The guider for hosts that patch a U-Net: it wraps the U-Net of one pass."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lib_memnoise.sampling.backend import Backend
from lib_memnoise.sampling.cond_rows import Cond, vectors
from lib_memnoise.sampling.guider import GuidancePlan, Guider, Step
from lib_memnoise.sampling.output_cache import CachedModel
from lib_memnoise.webui.backends.left_out_rows import StepNow
from lib_memnoise.webui.backends.patcher_calls import (
    COND,
    ELSEWHERE,
    UNCOND,
    WRAPPER,
    call_behind,
    contents,
    gain,
    nested,
    paired_parts,
    scaling,
    some_rows,
    which_part,
)
from lib_memnoise.webui.backends.patcher_hosts import host
from lib_memnoise.webui.sampler_start import cfg_scale


def weak_wrapper(guider: PatchGuider, inner: Callable[..., Tensor] | None) -> Callable[..., Tensor]:
    """A function for the U-Net's options that calls the guider, which it references weakly.

    A host may keep a checkpoint, and with it the U-Net of its last pass, for as long as it runs; that must not keep the
    objects of a request alive. The pass's denoiser holds the guider. The wrapper is a plain function because the host
    makes deep copies of options, which leave functions alone.
    """
    weakly = weakref.ref(guider)

    def wrapper(apply_model: Any, args: dict[str, Any]) -> Tensor:
        guider = weakly()
        return call_behind(inner, apply_model, args) if guider is None else guider.called(apply_model, args)

    wrapper.memnoise_inner = inner  # type: ignore[attr-defined]
    return wrapper


class PatchGuider(Guider):
    """A guider that wraps the pass's own copy of the U-Net, which the host drops with the next pass.

    It attaches at the first step, after every extension has made its patches, and again where a refiner takes over.
    """

    def __init__(self, backend: Backend, p: Any, plan: GuidancePlan) -> None:
        super().__init__(backend, plan)
        self.p = p
        self._wrapper: Any = None
        self._inner: Any = None
        self._apply: Any = None
        self._unet: Any = None

    def begin_step(self, params: Any) -> None:
        before = self._unet
        super().begin_step(params)
        if before not in (None, self._unet):
            # What is encoded anew when a refiner takes over may take its network's place.
            self.backend.load(params.x)

    def attach(self, denoiser: Any) -> None:
        objects = denoiser.inner_model.inner_model.forge_objects
        if self._wrapper is not None and objects.unet.model_options.get(WRAPPER) is self._wrapper:
            return

        unet = objects.unet.clone()
        self._inner = unet.model_options.get(WRAPPER)
        unet.model_options[WRAPPER] = self._wrapper = weak_wrapper(self, self._inner)
        objects.unet = self._unet = unet
        self._cached = CachedModel(self, self.cache, self.backend, compared=contents, selected=some_rows)

    def detach(self) -> None:
        self.retired = True

    def step_of(self, denoiser: Any, params: Any) -> Step:
        batch = denoiser.sampler.sampler_extra_args["cond"].batch
        paired = paired_parts([[(k, part.weight) for k, part in enumerate(parts)] for parts in batch])
        weights = [[weight for _, weight in parts] for parts in paired]
        lengths = [len(parts) for parts in batch]
        # For each part, its rows in the texts' condition.
        self._rows_of_part = [[sum(lengths[:i]) + k for i in range(len(batch))] for k in range(min(lengths))]
        self._params = params
        return Step(
            t=float(scaling(self._unet.model).timestep(params.sigma[:1])),
            weights=weights,
            known=params.x.shape[0] == len(weights),
            latents=params.x,
            scale=self._scale(denoiser, float(params.sigma[0])),
        )

    def _scale(self, denoiser: Any, sigma: float) -> float | None:
        """The CFG scale of a step, or None where the host leaves the unconditional rows out."""
        scale = cfg_scale(self.p)
        floor = float(denoiser.sampler.sampler_extra_args.get("s_min_uncond") or 0.0)
        skipped = host().leaves_out_uncond(StepNow(denoiser.step, denoiser.total_steps, sigma, floor))
        alone = math.isclose(scale, 1.0) and not self._unet.model_options.get("disable_cfg1_optimization", False)
        return None if skipped or alone else scale

    def called(self, apply_model: Any, args: dict[str, Any]) -> Tensor:
        """Called in place of the network, for some chunks of the step's rows."""
        x, sigma, c, marks = args["input"], args["timestep"], args["c"], args["cond_or_uncond"]
        self._apply, step = apply_model, self.step
        if self.retired or step is None:
            return self.apply_model(x, sigma, c)
        images = len(step.weights)
        rows = [ELSEWHERE] * len(x)
        if len(x) == images * len(marks) and step.known:
            rows = []
            for chunk, mark in enumerate(marks):
                part = None
                if mark == COND:
                    crossattn = c["c_crossattn"][chunk * images : (chunk + 1) * images]
                    part = which_part(crossattn, self._params.text_cond, self._rows_of_part)
                for image in range(images):
                    prompt_numbers, uncond_number = self._rows_of(image)
                    rows.append(
                        uncond_number if mark == UNCOND else prompt_numbers[part] if part is not None else ELSEWHERE
                    )
        self._rows = rows
        self._c = c
        return self.outputs_of(rows, x, sigma, c=c)

    def apply_model(self, x: Tensor, sigma: Tensor, c: dict[str, Any]) -> Tensor:
        """The network behind this guider."""
        if "control" in c:
            c = {**c, "control": nested(c["control"], lambda value: value)}
        if self._inner is None:
            out: Tensor = self._apply(x, sigma, **c)
            return out
        marks = c["transformer_options"]["cond_or_uncond"]
        out = self._inner(self._apply, {"input": x, "timestep": sigma, "c": c, "cond_or_uncond": marks})
        return out

    def evaluate(self, rows: list[int], x: Tensor, sigma: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        c = kwargs["c"] if "c" in kwargs else self._conditioned(**kwargs)
        self._cached.attention = self.attention_of(rows)
        try:
            out = self._cached.apply_model(x, sigma, c)
        finally:
            self._cached.attention = []
        self.count(rows, self._cached.known)
        return out, out.detach() / gain(self._unet.model, sigma[:1])

    def conditions(self, text: Cond, rows: list[int], *, unconditional: bool) -> dict[str, Any]:
        """The text, and the rows of the current call that the network's other inputs are taken from."""
        assert self.step is not None
        owners = self.step.owners
        there = [owners[row] if row < len(owners) else -1 for row in self._rows]
        places = [self._rows.index(row) if row in self._rows else there.index(owners[row]) for row in rows]
        return {"text": text, "places": places, "marks": [UNCOND if unconditional else COND] * len(rows)}

    def _conditioned(self, text: Cond, places: list[int], marks: list[int]) -> dict[str, Any]:
        c = some_rows(self._c, places, marks)
        c["c_crossattn"] = vectors(text)
        if isinstance(text, Mapping) and "vector" in text:
            c["y"] = text["vector"]
        return c

    def join(self, first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any] | None:
        texts = first["text"], second["text"]
        lengths = [vectors(text).shape[1] for text in texts]
        longest = math.lcm(*lengths)
        if longest > 4 * min(lengths):  # the host's own bound
            return None
        values = torch.cat([vectors(text).repeat(1, longest // vectors(text).shape[1], 1) for text in texts])
        text: Cond = values
        if isinstance(texts[0], Mapping):
            text = {
                **{key: torch.cat([t[key] for t in texts]) for key in texts[0] if key != "crossattn"},
                "crossattn": values,
            }
        return {"text": text, **{key: first[key] + second[key] for key in ("places", "marks")}}

    def select(self, kwargs: dict[str, Any], rows: list[int]) -> dict[str, Any]:
        return {"c": some_rows(kwargs["c"], rows)}

    def _strength(self, image: int) -> float:
        """The factor by which the host multiplies the CFG scale: the sum of the weights of a prompt's parts."""
        assert self.step is not None
        strength = sum(self.step.weights[image])
        return 1.0 if math.isclose(strength, 1.0) else strength

    def unguided(self, image: int, unconditional: Tensor) -> list[Tensor]:
        return self._rows_for(image, unconditional, unconditional)

    def opposite(self, image: int, prompts: Tensor, unconditional: Tensor, s: float) -> list[Tensor]:
        assert self.step is not None
        weights = prompts.new_tensor(self.step.weights[image]).reshape(-1, 1, 1, 1)
        return self._rows_for(image, unconditional - s * (weights * (prompts - unconditional)).sum(0), unconditional)

    def _rows_for(self, image: int, wanted: Tensor, unconditional: Tensor) -> list[Tensor]:
        """Outputs for the prompts' rows that make the host's own combination equal to `wanted`."""
        assert self.step is not None
        row, strength = wanted, self._strength(image)
        if self.step.scale is None:
            # The host has zeros for the unconditional rows, and follows the prompts' rows times their strength.
            row = wanted / strength
        elif wanted is not unconditional:
            row = unconditional + (wanted - unconditional) / (self.step.scale * strength)
        return [row] * len(self.step.weights[image])
