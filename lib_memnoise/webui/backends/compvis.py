"""The backend for AUTOMATIC1111: the checkpoint's `apply_model` takes timesteps and returns native outputs."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from modules import prompt_parser, sd_models, shared
from torch import Tensor, nn

from lib_memnoise.core.report import note_all
from lib_memnoise.sampling.backend import DeltaQuery, Evaluated, FirstStep
from lib_memnoise.sampling.cond_rows import Cond, Conditions, joined, select_rows, token_length
from lib_memnoise.sampling.guider import GuidancePlan, Guider, Step
from lib_memnoise.sampling.output_cache import CachedModel
from lib_memnoise.torch_utils.patching import frozen, original
from lib_memnoise.webui.backends.base import WebuiBackend
from lib_memnoise.webui.backends.left_out_rows import StepNow, by_a1111
from lib_memnoise.webui.sampler_start import compvis_first_step


def conditioning(text: Cond, image: Tensor, *, unconditional: bool) -> Conditions:
    """The condition dict that the host's denoiser passes to the network for these rows."""
    if shared.sd_model.model.conditioning_key == "crossattn-adm":
        return {"c_crossattn": [text], "c_adm": torch.zeros_like(image) if unconditional else image}
    if isinstance(text, Mapping):
        return {**text, "c_concat": [image]}
    return {"c_crossattn": [text], "c_concat": [image]}


class CompVisBackend(WebuiBackend):
    """The checkpoint's own `apply_model`."""

    @property
    def unet(self) -> nn.Module:
        unet: nn.Module = shared.sd_model.model.diffusion_model
        return unet

    @property
    def kind(self) -> str:
        model = shared.sd_model
        if getattr(model, "is_sd3", False) or hasattr(model, "create_denoiser"):
            return "flow"
        return "v" if model.parameterization == "v" else "eps"

    def alpha_bar(self, t: float) -> float:
        return float(shared.sd_model.alphas_cumprod[round(t)])

    def first_step(self, p: Any, sampler: Any, x: Tensor) -> FirstStep:
        return compvis_first_step(p, sampler, x)

    def padded(self, denoiser: Any, cond: Cond, uncond: Cond) -> tuple[Cond, Cond]:
        """Both conditions, padded as the host's options say where their lengths differ."""
        if token_length(cond) == token_length(uncond):
            return cond, uncond
        for option in ("pad_cond_uncond_v0", "pad_cond_uncond"):
            if getattr(shared.opts, option, False):
                # The host pads dicts in place; these are copies of the dict, not of the tensors.
                copies = [prompt_parser.DictWithShape(c) if isinstance(c, Mapping) else c for c in (cond, uncond)]
                padded: tuple[Cond, Cond] = getattr(denoiser, option)(*copies)
                return padded
        return cond, uncond

    def first_calls(self, p: Any, rows: int, images: int, *, equal: bool, sigma: float) -> tuple[tuple[int, int], ...]:
        """The calls of the host's first step, without unconditional rows where the host leaves these out."""
        together = getattr(shared.opts, "batch_cond_uncond", True)
        skipped = by_a1111(StepNow(0, 1, sigma, p.s_min_uncond))
        if equal or skipped:
            every = rows if skipped else rows + images
            size = every if together else images
            return tuple((a, min(a + size, every)) for a in range(0, every, size))
        size = 2 * images if together else images
        return (*((a, min(a + size, rows)) for a in range(0, rows, size)), (rows, rows + images))

    def evaluate(self, query: DeltaQuery, inputs: Tensor, owners: list[int], cond: Cond) -> Evaluated:
        conditional = conditioning(cond, query.image_cond[owners], unconditional=False)
        unconditional = conditioning(query.uncond, query.image_cond, unconditional=True)
        at = query.step.at
        if query.unconditional is not None:
            return [(conditional, apply_model(inputs[owners], at, conditional)), (unconditional, query.unconditional)]
        if query.calls:
            return self._as_host(query, inputs, owners, cond, conditional, unconditional)
        if token_length(cond) == token_length(query.uncond) and getattr(shared.opts, "batch_cond_uncond", True):
            out = apply_model(torch.cat([inputs[owners], inputs]), at, joined(conditional, unconditional))
            return list(zip((conditional, unconditional), out.split([len(owners), len(inputs)])))
        return [
            (conditional, apply_model(inputs[owners], at, conditional)),
            (unconditional, apply_model(inputs, at, unconditional)),
        ]

    def _as_host(
        self,
        query: DeltaQuery,
        inputs: Tensor,
        owners: list[int],
        cond: Cond,
        conditional: Conditions,
        unconditional: Conditions,
    ) -> Evaluated:
        """Evaluate the rows that the host will need in the host's own calls, so that cached outputs are exact.

        Where the host's own unconditional rows differ from `query.uncond`, they are evaluated besides.
        """
        count, at = len(owners), query.step.at
        host_uncond = query.uncond if query.host_uncond is None else query.host_uncond
        theirs = conditioning(host_uncond, query.image_cond, unconditional=True)
        equal = token_length(cond) == token_length(host_uncond)
        every = torch.cat([inputs[owners], inputs])
        parts = []
        for a, b in query.calls:
            if equal:
                condition = select_rows(joined(conditional, theirs), range(a, b))
            elif b <= count:
                condition = select_rows(conditional, range(a, b))
            else:
                condition = theirs
            parts.append(apply_model(every[a:b], at, condition))
        out = torch.cat(parts)
        prompts, others = (conditional, out[:count]), [(theirs, out[count:])] if len(out) > count else []
        if query.host_uncond is None and others:
            return [prompts, *others]
        return [prompts, (unconditional, apply_model(inputs, at, unconditional)), *others]

    def unconditional(self, query: DeltaQuery, inputs: Tensor) -> Tensor:
        given = conditioning(query.uncond, query.image_cond, unconditional=True)
        return apply_model(inputs, query.step.at, given)

    def state(self) -> tuple[Any, ...]:
        """The functions that extensions may replace, and token merging, which is off during gradients."""
        model = shared.sd_model
        if self.is_doubtful():
            return (object(),)  # equal to no other state
        return (
            model.apply_model,
            model.model.forward,
            original(model.model.diffusion_model.forward),
            getattr(model, "applied_token_merged_ratio", 0),
        )

    def is_patched(self) -> bool:
        modules = list(self.unet.modules())
        hooks = [hook for m in modules for kind in (m._forward_hooks, m._forward_pre_hooks) for hook in kind.values()]
        # Some extensions restore a module's own `forward` as an attribute; and the host has hooks of its own.
        return any(
            getattr(original(module.forward), "__func__", None) is not type(module).forward for module in modules
        ) or any(not str(getattr(hook, "__module__", "")).startswith(("modules.", "lib_memnoise.")) for hook in hooks)

    def is_doubtful(self) -> bool:
        # The host's U-Nets use a torch module of their own, whose attributes are only those that extensions set.
        own_torch = getattr(sys.modules.get("modules.sd_hijack_unet"), "th", None)
        return self.is_patched() or (own_torch is not None and bool(vars(own_torch)))

    @contextlib.contextmanager
    def gradients(self) -> Iterator[None]:
        """A context with frozen weights (only x needs a gradient) and without token merging (its gradient is wrong)."""
        model = shared.sd_model
        merging = getattr(model, "applied_token_merged_ratio", 0)
        with frozen(model.model):
            try:
                sd_models.apply_token_merging(model, 0)
                yield
            finally:
                sd_models.apply_token_merging(model, merging)

    def guider(self, p: Any, denoiser: Any, plan: GuidancePlan) -> WrapperGuider:
        return WrapperGuider(self, p, denoiser, plan)


def apply_model(inputs: Tensor, at: Tensor, cond: Conditions) -> Tensor:
    """The native outputs `(rows, C, H, W)` of the network, at one timestep `at`, `(1,)`, for all rows."""
    out: Tensor = shared.sd_model.apply_model(inputs, at.expand(inputs.shape[0]), cond=cond)
    return out


class WrapperGuider(Guider):
    """A guider that replaces the `forward` of the sampler's network wrapper.

    The host's denoiser evaluates a list of rows in each of its steps, in one call or several: the prompts of every
    image, then the unconditional rows.
    """

    def __init__(self, backend: CompVisBackend, p: Any, denoiser: Any, plan: GuidancePlan) -> None:
        super().__init__(backend, plan)
        self.p = p
        self.attach(denoiser)

    def attach(self, denoiser: Any) -> None:
        """Stand in for this denoiser's network wrapper, which is a new one after a refiner switch."""
        if self.inner is denoiser.inner_model:
            return
        self.inner = denoiser.inner_model
        self._offset = 0
        """The number of rows of this step that the host has evaluated."""
        self._forward = self.inner.forward
        self._own = self.forward
        self.in_parts = "forward" in vars(self.inner)
        self.inner.forward = self._own
        if self.in_parts:
            note_all(
                self.reports,
                "another extension evaluates the network in its own way, in tiles for instance; the magnitude is "
                "that of the network without it" + (" and is not traced" if self.plan.tracing else ""),
            )
        self._cached = CachedModel(self.inner.inner_model, self.cache, self.backend)
        # Set in the instance's dict, which hides the submodule of this name and leaves it in place.
        self.inner.__dict__["inner_model"] = self._cached

    def detach(self) -> None:
        """Restore the wrapper: img2img samples every batch with the same one."""
        if self.inner is None:
            return
        if self.inner.forward is self._own:
            if self.in_parts:
                self.inner.forward = self._forward
            else:
                del self.inner.__dict__["forward"]
        if self.inner.__dict__.get("inner_model") is self._cached:
            del self.inner.__dict__["inner_model"]
        self.retired = True

    def step_of(self, denoiser: Any, params: Any) -> Step:
        weights = [[part.weight for part in parts] for parts in denoiser.sampler.sampler_extra_args["cond"].batch]
        self._offset = 0
        self._image_cond = params.image_cond
        inner = denoiser.inner_model
        t = float(inner.sigma_to_t(params.sigma[:1]) if hasattr(inner, "sigma_to_t") else params.sigma[0])
        step = StepNow(denoiser.step, denoiser.total_steps, float(params.sigma[0]), self.p.s_min_uncond)
        return Step(
            t=t,
            weights=weights,
            known=params.x.shape[0] == sum(map(len, weights)) + len(weights),
            latents=params.x[-len(weights) :],
            scale=None if by_a1111(step) else float(self.p.cfg_scale) * getattr(denoiser, "cond_scale_miltiplier", 1.0),
        )

    def forward(self, x: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        """The network wrapper's `forward`, for the next `len(x)` rows of the step."""
        if self.retired:
            out: Tensor = self._forward(x, sigma, **kwargs)
            return out
        rows = list(range(self._offset, self._offset + x.shape[0]))
        self._offset += x.shape[0]
        return self.outputs_of(rows, x, sigma, **kwargs)

    def evaluate(self, rows: list[int], x: Tensor, sigma: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        self._cached.attention = self.attention_of(rows)
        try:
            out: Tensor = self._forward(x, sigma, **kwargs)
        finally:
            self._cached.attention = []
        self.count(rows, self._cached.known)
        return out, self._cached.native.detach()

    def conditions(self, text: Cond, rows: list[int], *, unconditional: bool) -> dict[str, Any]:
        return {"cond": conditioning(text, self._image_cond[rows], unconditional=unconditional)}

    def join(self, first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any] | None:
        same = token_length(self.cond) == token_length(self.uncond) and shared.opts.batch_cond_uncond
        return {"cond": joined(first["cond"], second["cond"])} if same else None

    def select(self, kwargs: dict[str, Any], rows: list[int]) -> dict[str, Any]:
        selected: dict[str, Any] = select_rows(kwargs, rows)
        return selected

    def opposite(self, image: int, prompts: Tensor, unconditional: Tensor, s: float) -> list[Tensor]:
        assert self.step is not None
        differences = prompts - unconditional
        if self.step.scale is not None:  # the host has ε_u + w Σ w_k (row_k − ε_u)
            return list(unconditional - s / self.step.scale * differences)
        # Without unconditional rows the host uses the prompts' outputs directly, so each must be the wanted output.
        weights = differences.new_tensor(self.step.weights[image]).reshape(-1, 1, 1, 1)
        return [unconditional - s * (weights * differences).sum(0)] * len(prompts)
