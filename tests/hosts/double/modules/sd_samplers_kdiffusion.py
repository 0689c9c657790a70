"""Samplers of k-diffusion."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from modules import devices, sd_samplers_cfg_denoiser, sd_samplers_common, sd_samplers_extra, sd_schedulers, shared
from modules.sd_samplers_cfg_denoiser import CFGDenoiser  # noqa: F401
from modules.shared import opts

import k_diffusion.external  # isort: skip
import k_diffusion.sampling  # isort: skip

_CHURN = ["s_churn", "s_tmin", "s_tmax", "s_noise"]
_KARRAS = {"scheduler": "karras"}
_SDE = {"scheduler": "exponential", "brownian_noise": True}
_SECOND = {"second_order": True}
_DISCARD = {"discard_next_to_last_sigma": True}
_ENSD = {"uses_ensd": True}

samplers_k_diffusion: list[tuple[str, Any, list[str], dict[str, Any]]] = [
    ("DPM++ 2M", "sample_dpmpp_2m", ["k_dpmpp_2m"], _KARRAS),
    ("DPM++ SDE", "sample_dpmpp_sde", ["k_dpmpp_sde"], {**_KARRAS, **_SECOND, "brownian_noise": True}),
    ("DPM++ 2M SDE", "sample_dpmpp_2m_sde", ["k_dpmpp_2m_sde"], _SDE),
    ("DPM++ 2M SDE Heun", "sample_dpmpp_2m_sde", ["k_dpmpp_2m_sde_heun"], {**_SDE, "solver_type": "heun"}),
    ("DPM++ 2S a", "sample_dpmpp_2s_ancestral", ["k_dpmpp_2s_a"], {**_KARRAS, **_ENSD, **_SECOND}),
    ("DPM++ 3M SDE", "sample_dpmpp_3m_sde", ["k_dpmpp_3m_sde"], {**_SDE, **_DISCARD}),
    ("Euler a", "sample_euler_ancestral", ["k_euler_a", "k_euler_ancestral"], _ENSD),
    ("Euler", "sample_euler", ["k_euler"], {}),
    ("LMS", "sample_lms", ["k_lms"], {}),
    ("Heun", "sample_heun", ["k_heun"], _SECOND),
    ("DPM2", "sample_dpm_2", ["k_dpm_2"], {**_KARRAS, **_DISCARD, **_SECOND}),
    ("DPM2 a", "sample_dpm_2_ancestral", ["k_dpm_2_a"], {**_KARRAS, **_DISCARD, **_ENSD, **_SECOND}),
    ("DPM fast", "sample_dpm_fast", ["k_dpm_fast"], _ENSD),
    ("DPM adaptive", "sample_dpm_adaptive", ["k_dpm_ad"], _ENSD),
    ("Restart", sd_samplers_extra.restart_sampler, ["restart"], {**_KARRAS, **_SECOND}),
]
sampler_extra_params: dict[Any, list[str]] = {
    **{f"sample_{name}": _CHURN for name in ("euler", "heun", "dpm_2")},
    **{
        f"sample_{name}": ["s_noise"]
        for name in ("dpm_fast", "dpm_2_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde")
    },
}


class CFGDenoiserKDiffusion(sd_samplers_cfg_denoiser.CFGDenoiser):
    @property
    def inner_model(self) -> Any:
        if self.model_wrap is None:
            model = shared.sd_model
            if hasattr(model, "create_denoiser"):
                self.model_wrap = model.create_denoiser()
            else:
                external = k_diffusion.external
                kind = external.CompVisVDenoiser if model.parameterization == "v" else external.CompVisDenoiser
                self.model_wrap = kind(model, quantize=opts.enable_quantization)
        return self.model_wrap


class KDiffusionSampler(sd_samplers_common.Sampler):
    def __init__(self, funcname: Any, sd_model: Any, options: dict | None = None) -> None:
        super().__init__(funcname)
        self.extra_params = sampler_extra_params.get(funcname, [])
        self.options = options or {}
        self.func = funcname if callable(funcname) else getattr(k_diffusion.sampling, funcname)
        self.model_wrap_cfg = CFGDenoiserKDiffusion(self)
        self.model_wrap = self.model_wrap_cfg.inner_model

    def get_sigmas(self, p: Any, steps: int) -> torch.Tensor:
        """The schedule; what deviates from the defaults is written to the infotext."""
        params = p.extra_generation_params
        options = self.config.options if self.config is not None else {}
        discard = options.get("discard_next_to_last_sigma", False)
        if opts.always_discard_next_to_last_sigma and not discard:
            discard = params["Discard penultimate sigma"] = True
        steps += int(discard)

        name = (p.hr_scheduler if p.is_hr_pass else p.scheduler) or "Automatic"
        scheduler = sd_schedulers.schedulers_map.get(options.get("scheduler") if name == "Automatic" else name)
        if p.sampler_noise_scheduler_override:
            sigmas = p.sampler_noise_scheduler_override(steps)
        elif scheduler is None or scheduler.function is None:
            sigmas = self.model_wrap.get_sigmas(steps)
        else:
            sigmas = scheduler.function(n=steps, **self._scheduler_arguments(p, scheduler), device=devices.cpu)
        if discard:
            sigmas = torch.cat([sigmas[:-2], sigmas[-1:]])
        return sigmas.cpu()

    def _scheduler_arguments(self, p: Any, scheduler: Any) -> dict[str, Any]:
        params = p.extra_generation_params
        if not p.is_hr_pass:
            params["Schedule type"] = scheduler.label
        elif scheduler.label != params.get("Schedule type"):
            params["Hires schedule type"] = scheduler.label
        model = {"sigma_min": self.model_wrap.sigmas[0].item(), "sigma_max": self.model_wrap.sigmas[-1].item()}
        old = {"sigma_min": 0.1, "sigma_max": 10} if opts.use_old_karras_scheduler_sigmas else model
        arguments: dict[str, Any] = dict(old)
        for key, label in (("sigma_min", "Schedule min sigma"), ("sigma_max", "Schedule max sigma")):
            chosen = getattr(opts, key)
            if chosen not in (0, model[key]):
                arguments[key] = params[label] = chosen
        if scheduler.default_rho != -1 and opts.rho not in (0, scheduler.default_rho):
            arguments["rho"] = params["Schedule rho"] = opts.rho
        if scheduler.need_inner_model:
            arguments["inner_model"] = self.model_wrap
        if scheduler.label == "Beta":
            params["Beta schedule alpha"] = opts.beta_dist_alpha
            params["Beta schedule beta"] = opts.beta_dist_beta
        return arguments

    def _function_arguments(self, p: Any, x: torch.Tensor, sigmas: torch.Tensor, offered: dict) -> dict[str, Any]:
        assert self.config is not None
        kwargs = self.initialize(p)
        accepted = inspect.signature(self.func).parameters
        kwargs.update({key: value for key, value in offered.items() if key in accepted})
        if self.config.options.get("brownian_noise", False):
            kwargs["noise_sampler"] = self.create_noise_sampler(x, sigmas, p)
        if self.config.options.get("solver_type") == "heun":
            kwargs["solver_type"] = "heun"
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
        sigmas = self.get_sigmas(p, steps)
        if opts.sgm_noise_multiplier:
            p.extra_generation_params["SGM noise multiplier"] = True
            x = x * torch.sqrt(1.0 + sigmas[0] ** 2.0)
        else:
            x = x * sigmas[0]
        offered = {"n": steps, "sigmas": sigmas}
        if "sigma_min" in inspect.signature(self.func).parameters:
            ends = self.model_wrap.sigmas
            offered.update(sigma_min=ends[0].item(), sigma_max=ends[-1].item())
        kwargs = self._function_arguments(p, x, sigmas, offered)
        self.last_latent = x
        self.sampler_extra_args = self._extra_args(p, conditioning, unconditional_conditioning, image_conditioning)
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
        sigmas = self.get_sigmas(p, steps)
        rest = sigmas[steps - made - 1 :]
        if hasattr(shared.sd_model, "add_noise_to_latent"):
            xi = shared.sd_model.add_noise_to_latent(x, noise, rest[0])
        else:
            xi = x + noise * rest[0]
        xi = sd_samplers_common.add_extra_noise(p, x, noise, xi, 1.0)
        offered = {
            "sigma_min": rest[-2],
            "sigma_max": rest[0],
            "n": len(rest) - 1,
            "sigma_sched": rest,
            "sigmas": rest,
        }
        kwargs = self._function_arguments(p, x, sigmas, offered)
        self.model_wrap_cfg.init_latent = self.last_latent = x
        self.sampler_extra_args = self._extra_args(p, conditioning, unconditional_conditioning, image_conditioning)
        return self._run(made + 1, xi, kwargs)


def _data(label: str, function: Any, aliases: list[str], options: dict) -> sd_samplers_common.SamplerData:
    return sd_samplers_common.SamplerData(label, lambda model: KDiffusionSampler(function, model), aliases, options)


samplers_data_k_diffusion = [_data(*row) for row in samplers_k_diffusion]
k_diffusion_samplers_map = {x.name: x for x in samplers_data_k_diffusion}
k_diffusion_scheduler = {x.name: x.function for x in sd_schedulers.schedulers}
