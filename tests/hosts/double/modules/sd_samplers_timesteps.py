"""Samplers that go by timesteps and predict ε."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
from modules import devices, sd_samplers_common, sd_samplers_timesteps_impl, shared
from modules.sd_samplers_cfg_denoiser import CFGDenoiser
from modules.shared import opts


class CompVisTimestepsDenoiser(torch.nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.inner_model = model

    def forward(self, input: torch.Tensor, timesteps: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return self.inner_model.apply_model(input, timesteps, **kwargs)


class CompVisTimestepsVDenoiser(CompVisTimestepsDenoiser):
    """ε = √ᾱ·v + √(1−ᾱ)·x"""

    def forward(self, input: torch.Tensor, timesteps: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        v = super().forward(input, timesteps, **kwargs)
        bar = self.inner_model.alphas_cumprod[timesteps.to(torch.int)][:, None, None, None]
        return bar.sqrt() * v + (1 - bar).sqrt() * input


class CFGDenoiserTimesteps(CFGDenoiser):
    def __init__(self, sampler: Any) -> None:
        super().__init__(sampler)
        self.alphas = shared.sd_model.alphas_cumprod
        self.mask_before_denoising = True

    def get_pred_x0(self, x_in: torch.Tensor, x_out: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        bar = self.alphas[sigma.to(dtype=torch.int)][:, None, None, None]
        return (x_in - (1 - bar).sqrt() * x_out) / bar.sqrt()

    @property
    def inner_model(self) -> Any:
        if self.model_wrap is None:
            v = shared.sd_model.parameterization == "v"
            self.model_wrap = (CompVisTimestepsVDenoiser if v else CompVisTimestepsDenoiser)(shared.sd_model)
        return self.model_wrap


class CompVisSampler(sd_samplers_common.Sampler):
    def __init__(self, funcname: Any, sd_model: Any) -> None:
        super().__init__(funcname)
        self.eta_option_field = "eta_ddim"
        self.eta_infotext_field = "Eta DDIM"
        self.eta_default = 0.0
        self.model_wrap_cfg = CFGDenoiserTimesteps(self)
        self.model_wrap = self.model_wrap_cfg.inner_model

    def get_timesteps(self, p: Any, steps: int) -> torch.Tensor:
        """1, 1 + stride, …, rising."""
        if opts.always_discard_next_to_last_sigma:
            p.extra_generation_params["Discard penultimate sigma"] = True
            steps += 1
        return torch.arange(1, 1001, 1000 // steps, device=devices.device).clamp(max=999)

    def _start(self, p: Any, timesteps: torch.Tensor, conds: tuple, image_conditioning: Any, img2img: bool) -> dict:
        kwargs = self.initialize(p)
        accepted = inspect.signature(self.func).parameters
        if "timesteps" in accepted:
            kwargs["timesteps"] = timesteps
        if img2img and "is_img2img" in accepted:
            kwargs["is_img2img"] = True
        self.sampler_extra_args = self._extra_args(p, *conds, image_conditioning)
        return kwargs

    def sample(
        self,
        p: Any,
        x: Any,
        conditioning: Any,
        unconditional_conditioning: Any,
        steps: int | None = None,
        image_conditioning: Any = None,
    ) -> Any:
        steps = steps or p.steps
        timesteps = self.get_timesteps(p, steps)
        conds = (conditioning, unconditional_conditioning)
        kwargs = self._start(p, timesteps, conds, image_conditioning, False)
        self.last_latent = x
        return self._run(steps, x, kwargs)

    def sample_img2img(
        self,
        p: Any,
        x: Any,
        noise: Any,
        conditioning: Any,
        unconditional_conditioning: Any,
        steps: int | None = None,
        image_conditioning: Any = None,
    ) -> Any:
        steps, made = sd_samplers_common.setup_img2img_steps(p, steps)
        timesteps = self.get_timesteps(p, steps)
        bar = shared.sd_model.alphas_cumprod[timesteps[made]]
        xi = x * bar.sqrt() + noise * (1 - bar).sqrt()
        xi = sd_samplers_common.add_extra_noise(p, x, noise, xi, bar.sqrt())
        conds = (conditioning, unconditional_conditioning)
        kwargs = self._start(p, timesteps[:made], conds, image_conditioning, True)
        self.model_wrap_cfg.init_latent = self.last_latent = x
        return self._run(made + 1, xi, kwargs)


def _data(label: str, function: Any, alias: str) -> sd_samplers_common.SamplerData:
    return sd_samplers_common.SamplerData(label, lambda model: CompVisSampler(function, model), [alias], {})


samplers_timesteps = [
    ("DDIM", sd_samplers_timesteps_impl.ddim, "ddim"),
    ("DDIM CFG++", sd_samplers_timesteps_impl.ddim_cfgpp, "ddim_cfgpp"),
    ("PLMS", sd_samplers_timesteps_impl.plms, "plms"),
    ("UniPC", sd_samplers_timesteps_impl.unipc, "unipc"),
]
samplers_data_timesteps = [_data(*row) for row in samplers_timesteps]

sys.modules["modules.sd_samplers_compvis"] = sys.modules[__name__]
VanillaStableDiffusionSampler = CompVisSampler
