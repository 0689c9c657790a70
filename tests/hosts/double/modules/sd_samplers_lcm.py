"""Latent consistency models: few steps on a coarse grid of 50 timesteps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from modules import _kdiffusion, sd_samplers_cfg_denoiser, sd_samplers_common, sd_samplers_kdiffusion, shared

_kdiffusion.install()
from k_diffusion import sampling, utils  # noqa: E402
from k_diffusion.external import DiscreteEpsDDPMDenoiser  # noqa: E402


class LCMCompVisDenoiser(DiscreteEpsDDPMDenoiser):
    """Denoiser on timesteps 19, 39, …, 999, with LCM's boundary conditions; takes every model for an ε model."""

    skip_steps = 20

    def __init__(self, model: Any) -> None:
        super().__init__(model, model.alphas_cumprod[self.skip_steps - 1 :: self.skip_steps].float(), quantize=None)

    def get_sigmas(self, n: int | None = None) -> torch.Tensor:
        if n is None:
            return sampling.append_zero(self.sigmas.flip(0))
        ends = (float(self.sigma_to_t(self.sigma_max)), float(self.sigma_to_t(self.sigma_min)))
        return sampling.append_zero(self.t_to_sigma(torch.linspace(*ends, n, device=self.sigmas.device)))

    def sigma_to_t(self, sigma: torch.Tensor, quantize: Any = None) -> torch.Tensor:
        index = (sigma.log() - self.log_sigmas[:, None]).abs().argmin(dim=0).view(sigma.shape)
        return (index + 1) * self.skip_steps - 1

    def t_to_sigma(self, timestep: torch.Tensor) -> torch.Tensor:
        position = (timestep - (self.skip_steps - 1)) / self.skip_steps
        return super().t_to_sigma(position.float().clamp(0, len(self.sigmas) - 1))

    def get_eps(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.inner_model.apply_model(*args, **kwargs)

    def forward(self, input: torch.Tensor, sigma: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        c_out, c_in = (utils.append_dims(c, input.ndim) for c in self.get_scalings(sigma))
        t = self.sigma_to_t(sigma)
        x0 = input + c_out * self.get_eps(input * c_in, t, **kwargs)
        scaled = utils.append_dims(t, input.ndim) * 10.0
        norm = scaled**2 + 0.25
        return x0 * scaled / norm.sqrt() + input * 0.25 / norm


def sample_lcm(
    model: Any,
    x: torch.Tensor,
    sigmas: torch.Tensor,
    extra_args: dict | None = None,
    callback: Callable | None = None,
    disable: bool | None = None,
    noise_sampler: Any = None,
) -> torch.Tensor:
    noise_sampler = noise_sampler or sampling.default_noise_sampler(x)
    ones = x.new_ones([x.shape[0]])
    for i, (sigma, target) in enumerate(zip(sigmas[:-1], sigmas[1:])):
        denoised = model(x, sigma * ones, **(extra_args or {}))
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised})
        x = denoised + target * noise_sampler(sigma, target) if target > 0 else denoised
    return x


class CFGDenoiserLCM(sd_samplers_cfg_denoiser.CFGDenoiser):
    @property
    def inner_model(self) -> Any:
        if self.model_wrap is None:
            self.model_wrap = LCMCompVisDenoiser(shared.sd_model)
        return self.model_wrap


class LCMSampler(sd_samplers_kdiffusion.KDiffusionSampler):
    def __init__(self, funcname: Any, sd_model: Any, options: dict | None = None) -> None:
        super().__init__(funcname, sd_model, options)
        self.model_wrap_cfg = CFGDenoiserLCM(self)
        self.model_wrap = self.model_wrap_cfg.inner_model


samplers_lcm: list[tuple] = [("LCM", sample_lcm, ["k_lcm"], {})]
samplers_data_lcm = [sd_samplers_common.SamplerData("LCM", lambda model: LCMSampler(sample_lcm, model), ["k_lcm"], {})]
