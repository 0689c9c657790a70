"""Classifier-free guidance around the network: rows, callbacks, combination."""

from __future__ import annotations

from typing import Any

import torch
from modules import prompt_parser, sd_samplers_common, shared
from modules.script_callbacks import (
    AfterCFGCallbackParams,
    CFGDenoisedParams,
    CFGDenoiserParams,
    cfg_after_cfg_callback,
    cfg_denoised_callback,
    cfg_denoiser_callback,
)
from modules.shared import opts, state


def catenate_conds(conds: list[Any]) -> Any:
    if isinstance(conds[0], dict):
        return {key: torch.cat([x[key] for x in conds]) for key in conds[0]}
    return torch.cat(conds)


def subscript_cond(cond: Any, a: int, b: int) -> Any:
    return {key: value[a:b] for key, value in cond.items()} if isinstance(cond, dict) else cond[a:b]


def pad_cond(tensor: Any, repeats: int, empty: torch.Tensor) -> Any:
    if isinstance(tensor, dict):
        tensor["crossattn"] = pad_cond(tensor["crossattn"], repeats, empty)
        return tensor
    return torch.cat([tensor, empty.repeat(tensor.shape[0], repeats, 1)], dim=1)


class CFGDenoiser(torch.nn.Module):
    """Called by the sampling function once a network evaluation, with the conditions of the whole generation."""

    def __init__(self, sampler: Any) -> None:
        super().__init__()
        self.model_wrap = None
        self.sampler = sampler
        self.p: Any = None
        self.mask: Any = None
        self.nmask: Any = None
        self.init_latent: Any = None
        self.steps: int | None = None
        self.total_steps: int | None = None
        self.step = 0
        self.image_cfg_scale: float | None = None
        self.padded_cond_uncond = False
        self.padded_cond_uncond_v0 = False
        self.cond_scale_miltiplier = 1.0
        self.need_last_noise_uncond = False
        self.last_noise_uncond: Any = None
        self.mask_before_denoising = False

    @property
    def inner_model(self) -> Any:
        raise NotImplementedError()

    def combine_denoised(self, x_out: torch.Tensor, conds_list: list, uncond: Any, cond_scale: float) -> torch.Tensor:
        base = x_out[-uncond.shape[0] :]
        result = base.clone()
        for i, parts in enumerate(conds_list):
            for row, weight in parts:
                result[i] += (x_out[row] - base[i]) * (weight * cond_scale)
        return result

    def get_pred_x0(self, x_in: torch.Tensor, x_out: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return x_out

    def update_inner_model(self) -> None:
        self.model_wrap = None
        c, uc = self.p.get_conds()
        self.sampler.sampler_extra_args.update(cond=c, uncond=uc)

    def pad_cond_uncond(self, cond: Any, uncond: Any) -> tuple[Any, Any]:
        """Lengthen the shorter one with empty prompts."""
        empty = shared.sd_model.cond_stage_model_empty_prompt
        missing = (cond.shape[1] - uncond.shape[1]) // empty.shape[1]
        if missing < 0:
            cond = pad_cond(cond, -missing, empty)
        elif missing > 0:
            uncond = pad_cond(uncond, missing, empty)
        self.padded_cond_uncond = self.padded_cond_uncond or missing != 0
        return cond, uncond

    def pad_cond_uncond_v0(self, cond: Any, uncond: Any) -> tuple[Any, Any]:
        """Fit the negative prompt to the prompt: cut it, or repeat its last vector."""
        vectors = uncond["crossattn"] if isinstance(uncond, dict) else uncond
        wanted, length = cond.shape[1], vectors.shape[1]
        if length != wanted:
            tail = vectors[:, -1:].repeat(1, max(0, wanted - length), 1)
            vectors = torch.cat([vectors[:, :wanted], tail], dim=1)
            self.padded_cond_uncond_v0 = True
        if isinstance(uncond, dict):
            uncond["crossattn"] = vectors
            return cond, uncond
        return cond, vectors

    def _blend(self, latent: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """Inpainting: the unmasked part stays what it was."""
        blended = latent * self.nmask + self.init_latent * self.mask
        if self.p.scripts is not None:
            from modules.scripts import MaskBlendArgs

            args = MaskBlendArgs(latent, self.nmask, self.init_latent, self.mask, blended, denoiser=self, sigma=sigma)
            self.p.scripts.on_mask_blend(self.p, args)
            blended = args.blended_latent
        return blended

    def _skips_uncond(self, sigma: torch.Tensor, s_min_uncond: float) -> bool:
        params = self.p.extra_generation_params
        early = opts.skip_early_cond
        if early != 0.0 and self.step / self.total_steps <= early:
            params["Skip Early CFG"] = early
            return True
        if (self.step % 2 or opts.s_min_uncond_all) and s_min_uncond > 0 and sigma[0] < s_min_uncond:
            params["NGMS"] = s_min_uncond
            if opts.s_min_uncond_all:
                params["NGMS all steps"] = opts.s_min_uncond_all
            return True
        return False

    def _evaluate(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor,
        image_cond: torch.Tensor,
        cond: Any,
        uncond: Any,
        skip: bool,
        batch_size: int,
    ) -> torch.Tensor:
        """All rows through the network: at once where prompt and negative prompt have one length."""
        as_dict = isinstance(uncond, dict)

        def rows(a: int, b: int, part: Any) -> torch.Tensor:
            conds = {**part} if as_dict else {"c_crossattn": [part]}
            conds["c_concat"] = [image_cond[a:b]]
            return self.inner_model(x[a:b], sigma[a:b], cond=conds)

        if cond.shape[1] == uncond.shape[1] or skip:
            together = cond if skip else catenate_conds([cond, uncond])
            if opts.batch_cond_uncond:
                conds = {**together} if as_dict else {"c_crossattn": [together]}
                return self.inner_model(x, sigma, cond={**conds, "c_concat": [image_cond]})
            x_out = torch.zeros_like(x)
            for a in range(0, len(x_out), batch_size):
                x_out[a : a + batch_size] = rows(a, a + batch_size, subscript_cond(together, a, a + batch_size))
            return x_out

        x_out = torch.zeros_like(x)
        stride = batch_size * 2 if opts.batch_cond_uncond else batch_size
        for a in range(0, cond.shape[0], stride):
            b = min(a + stride, cond.shape[0])
            x_out[a:b] = rows(a, b, subscript_cond(cond, a, b))
        a = len(x) - uncond.shape[0]
        x_out[a:] = rows(a, len(x), uncond)
        return x_out

    def forward(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor,
        uncond: Any,
        cond: Any,
        cond_scale: float,
        s_min_uncond: float,
        image_cond: torch.Tensor,
    ) -> torch.Tensor:
        if state.interrupted or state.skipped:
            raise sd_samplers_common.InterruptedException
        if sd_samplers_common.apply_refiner(self, sigma):
            cond = self.sampler.sampler_extra_args["cond"]
            uncond = self.sampler.sampler_extra_args["uncond"]

        conds_list, tensor = prompt_parser.reconstruct_multicond_batch(cond, self.step)
        uncond = prompt_parser.reconstruct_cond_batch(uncond, self.step)
        if self.mask_before_denoising and self.mask is not None:
            x = self._blend(x, sigma)

        batch_size = len(conds_list)
        image_of_row = [i for i, parts in enumerate(conds_list) for _ in parts] + list(range(batch_size))
        params = CFGDenoiserParams(
            x[image_of_row],
            image_cond[image_of_row],
            sigma[image_of_row],
            state.sampling_step,
            state.sampling_steps,
            tensor,
            uncond,
            self,
        )
        cfg_denoiser_callback(params)
        x_in, image_cond_in, sigma_in = params.x, params.image_cond, params.sigma
        tensor, uncond = params.text_cond, params.text_uncond

        skip_uncond = self._skips_uncond(sigma, s_min_uncond)
        if skip_uncond:
            x_in, sigma_in = x_in[:-batch_size], sigma_in[:-batch_size]
            if len(image_cond_in) != len(x_in) and self.sampler.conditioning_key in ("hybrid", "concat"):
                image_cond_in = image_cond_in[: len(x_in)]

        self.padded_cond_uncond = self.padded_cond_uncond_v0 = False
        if tensor.shape[1] != uncond.shape[1]:
            if opts.pad_cond_uncond_v0:
                tensor, uncond = self.pad_cond_uncond_v0(tensor, uncond)
            elif opts.pad_cond_uncond:
                tensor, uncond = self.pad_cond_uncond(tensor, uncond)

        x_out = self._evaluate(x_in, sigma_in, image_cond_in, tensor, uncond, skip_uncond, batch_size)
        first_rows = [parts[0][0] for parts in conds_list]
        if skip_uncond:
            x_out = torch.cat([x_out, torch.cat([x_out[i : i + 1] for i in first_rows])])

        cfg_denoised_callback(CFGDenoisedParams(x_out, state.sampling_step, state.sampling_steps, self.inner_model))
        if self.need_last_noise_uncond:
            self.last_noise_uncond = x_out[-uncond.shape[0] :].clone()
        scale = 1.0 if skip_uncond else cond_scale * self.cond_scale_miltiplier
        denoised = self.combine_denoised(x_out, conds_list, uncond, scale)
        if not self.mask_before_denoising and self.mask is not None:
            denoised = self._blend(denoised, sigma)

        def picked(y: torch.Tensor) -> torch.Tensor:
            return torch.cat([y[i : i + 1] for i in first_rows])

        self.sampler.last_latent = self.get_pred_x0(picked(x_in), picked(x_out), sigma)
        sd_samplers_common.store_latent(self.sampler.last_latent)
        after = AfterCFGCallbackParams(denoised, state.sampling_step, state.sampling_steps)
        cfg_after_cfg_callback(after)
        self.step += 1
        return after.x
