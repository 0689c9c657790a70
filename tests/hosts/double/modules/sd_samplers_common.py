"""What all samplers share."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from modules import _kdiffusion, devices, sd_models, shared
from modules.shared import opts, state
from PIL import Image

_kdiffusion.install()
import k_diffusion.sampling  # noqa: E402


class _SamplerDataTuple(NamedTuple):
    name: str
    constructor: Callable
    aliases: list[str]
    options: dict[str, Any]


class SamplerData(_SamplerDataTuple):
    def total_steps(self, steps: int) -> int:
        return 2 * steps if self.options.get("second_order", False) else steps


class InterruptedException(BaseException):
    pass


def setup_img2img_steps(p: Any, steps: int | None = None) -> tuple[int, int]:
    """The length of the schedule, and how many of its steps are made after the first."""
    strength = min(p.denoising_strength, 0.999)
    if opts.img2img_fix_steps or steps is not None:
        requested = steps or p.steps
        return (int(requested / strength) if p.denoising_strength > 0 else 0), requested - 1
    return p.steps, int(strength * p.steps)


approximation_indexes = {"Full": 0, "Approx NN": 1, "Approx cheap": 2, "TAESD": 3}


def samples_to_images_tensor(sample: torch.Tensor, approximation: Any = None, model: Any = None) -> torch.Tensor:
    with torch.no_grad():
        return (model or shared.sd_model).decode_first_stage(sample)


def single_sample_to_image(sample: torch.Tensor, approximation: Any = None) -> Image.Image:
    pixels = (samples_to_images_tensor(sample[None])[0] * 0.5 + 0.5).clamp(0, 1)
    return Image.fromarray((255 * pixels.permute(1, 2, 0).cpu().numpy()).astype(np.uint8))


def decode_first_stage(model: Any, x: torch.Tensor) -> torch.Tensor:
    return samples_to_images_tensor(x, None, model)


def sample_to_image(samples: torch.Tensor, index: int = 0, approximation: Any = None) -> Image.Image:
    return single_sample_to_image(samples[index], approximation)


def samples_to_image_grid(samples: torch.Tensor, approximation: Any = None) -> Image.Image:
    from modules import images

    return images.image_grid([single_sample_to_image(sample, approximation) for sample in samples])


def images_tensor_to_samples(image: torch.Tensor, approximation: Any = None, model: Any = None) -> torch.Tensor:
    """Pictures from 0 to 1 to latents."""
    model = model or shared.sd_model
    return model.get_first_stage_encoding(model.encode_first_stage(image * 2 - 1))


def store_latent(decoded: torch.Tensor) -> None:
    state.current_latent = decoded


def is_sampler_using_eta_noise_seed_delta(p: Any) -> bool:
    from modules import sd_samplers

    config = sd_samplers.find_sampler_config(p.sampler_name)
    eta = p.eta
    if eta is None and p.sampler is not None:
        eta = p.sampler.eta
    if eta is None and config is not None:
        eta = 0 if config.options.get("default_eta_is_0", False) else 1.0
    return eta != 0 and config.options.get("uses_ensd", False)


def _torchsde_randn(size: Any, dtype: Any, device: Any, seed: int) -> torch.Tensor:
    return devices.randn_local(seed, size).to(device=device, dtype=dtype)  # type: ignore[attr-defined]


def replace_torchsde_browinan() -> None:
    """Brownian noise from the host's generators."""
    import torchsde._brownian.brownian_interval

    torchsde._brownian.brownian_interval._randn = _torchsde_randn


replace_torchsde_browinan()


def apply_refiner(cfg_denoiser: Any, sigma: torch.Tensor | None = None) -> bool:
    """Load the refiner's checkpoint once its part of the schedule begins; True when that happened now."""
    p = cfg_denoiser.p
    if opts.refiner_switch_by_sample_steps or sigma is None:
        done = cfg_denoiser.step / cfg_denoiser.total_steps
        p.extra_generation_params["Refiner switch by sampling steps"] = True
    else:
        try:
            sigmas = cfg_denoiser.inner_model.sigmas
            timestep = torch.argmin((sigmas.to(sigma.device) - sigma.max()).abs())
        except AttributeError:  # samplers without sigmas are given the timestep itself
            timestep = sigma.max().to(dtype=torch.int)
        done = (999 - timestep) / 1000
    info = p.refiner_checkpoint_info
    if p.refiner_switch_at is not None and done < p.refiner_switch_at:
        return False
    if info is None or shared.sd_model.sd_checkpoint_info == info:
        return False
    if getattr(p, "enable_hr", False):
        if opts.hires_fix_refiner_pass == ("first pass" if p.is_hr_pass else "second pass"):
            return False
        if opts.hires_fix_refiner_pass != "second pass":
            p.extra_generation_params["Hires refiner"] = opts.hires_fix_refiner_pass
    p.extra_generation_params["Refiner"] = info.short_title
    p.extra_generation_params["Refiner switch at"] = p.refiner_switch_at
    with sd_models.SkipWritingToConfig():
        sd_models.reload_model_weights(info=info)
    p.setup_conds()
    cfg_denoiser.update_inner_model()
    return True


class TorchHijack:
    """Stands for `torch` in k-diffusion: its random numbers come from each image's own generator."""

    def __init__(self, p: Any) -> None:
        self.rng = p.rng

    def __getattr__(self, item: str) -> Any:
        return getattr(torch, item)

    def randn_like(self, x: torch.Tensor) -> torch.Tensor:
        return self.rng.next()


class Sampler:
    """Base of the samplers: bookkeeping around a sampling function."""

    def __init__(self, funcname: Any) -> None:
        self.funcname = self.func = funcname
        self.extra_params: list[str] = []
        self.sampler_noises: Any = None
        self.stop_at: int | None = None
        self.config: SamplerData | None = None
        self.last_latent: Any = None
        self.eta: float | None = None
        self.eta_option_field = "eta_ancestral"
        self.eta_infotext_field = "Eta"
        self.eta_default = 1.0
        self.s_min_uncond: float | None = None
        self.s_churn, self.s_tmin, self.s_tmax, self.s_noise = 0.0, 0.0, float("inf"), 1.0
        self.conditioning_key = getattr(getattr(shared.sd_model, "model", None), "conditioning_key", "crossattn")
        self.p: Any = None
        self.model_wrap_cfg: Any = None
        self.model_wrap: Any = None
        self.sampler_extra_args: dict[str, Any] | None = None
        self.options: dict[str, Any] = {}

    def callback_state(self, d: dict[str, Any]) -> None:
        step = d["i"]
        if self.stop_at is not None and step > self.stop_at:
            raise InterruptedException
        state.sampling_step = step
        shared.total_tqdm.update()

    def launch_sampling(self, steps: int, func: Callable) -> Any:
        assert self.config is not None
        self.model_wrap_cfg.steps = steps
        self.model_wrap_cfg.total_steps = self.config.total_steps(steps)
        state.sampling_steps = steps
        state.sampling_step = 0
        try:
            return func()
        except (RecursionError, InterruptedException):
            return self.last_latent

    def number_of_needed_noises(self, p: Any) -> int:
        return p.steps

    def initialize(self, p: Any) -> dict[str, Any]:
        """Tie the sampler to a generation; returns the sampling function's own options."""
        denoiser = self.model_wrap_cfg
        self.p = denoiser.p = p
        denoiser.mask = getattr(p, "mask", None)
        denoiser.nmask = getattr(p, "nmask", None)
        denoiser.step = 0
        denoiser.image_cfg_scale = getattr(p, "image_cfg_scale", None)
        self.eta = p.eta if p.eta is not None else getattr(opts, self.eta_option_field, 0.0)
        self.s_min_uncond = getattr(p, "s_min_uncond", 0.0)
        k_diffusion.sampling.torch = TorchHijack(p)

        accepted = inspect.signature(self.func).parameters
        kwargs = {name: getattr(p, name) for name in self.extra_params if hasattr(p, name) and name in accepted}
        if "eta" in accepted:
            if self.eta != self.eta_default:
                p.extra_generation_params[self.eta_infotext_field] = self.eta
            kwargs["eta"] = self.eta
        for name, label in (
            ("s_churn", "Sigma churn"),
            ("s_tmin", "Sigma tmin"),
            ("s_tmax", "Sigma tmax"),
            ("s_noise", "Sigma noise"),
        ):
            value = getattr(opts, name)
            if name == "s_tmax":
                value = value or float("inf")
            if name in kwargs and value != getattr(self, name):
                kwargs[name] = value
                setattr(p, name, value)
                p.extra_generation_params[label] = value
        return kwargs

    def _extra_args(self, p: Any, conditioning: Any, unconditional: Any, image_conditioning: Any) -> dict[str, Any]:
        return {
            "cond": conditioning,
            "image_cond": image_conditioning,
            "uncond": unconditional,
            "cond_scale": p.cfg_scale,
            "s_min_uncond": self.s_min_uncond,
        }

    def _run(self, steps: int, x: torch.Tensor, kwargs: dict[str, Any]) -> Any:
        samples = self.launch_sampling(
            steps,
            lambda: self.func(
                self.model_wrap_cfg,
                x,
                extra_args=self.sampler_extra_args,
                disable=True,
                callback=self.callback_state,
                **kwargs,
            ),
        )
        self.add_infotext(self.p)
        return samples

    def create_noise_sampler(self, x: torch.Tensor, sigmas: torch.Tensor, p: Any) -> Any:
        """Brownian noise that does not depend on the batch."""
        if opts.no_dpmpp_sde_batch_determinism:
            return None
        seeds = p.all_seeds[p.iteration * p.batch_size : (p.iteration + 1) * p.batch_size]
        positive = sigmas[sigmas > 0]
        return k_diffusion.sampling.BrownianTreeNoiseSampler(x, positive.min(), sigmas.max(), seed=seeds)

    def sample(
        self,
        p: Any,
        x: Any,
        conditioning: Any,
        unconditional_conditioning: Any,
        steps: int | None = None,
        image_conditioning: Any = None,
    ) -> Any:
        raise NotImplementedError()

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
        raise NotImplementedError()

    def add_infotext(self, p: Any) -> None:
        if self.model_wrap_cfg.padded_cond_uncond:
            p.extra_generation_params["Pad conds"] = True
        if self.model_wrap_cfg.padded_cond_uncond_v0:
            p.extra_generation_params["Pad conds v0"] = True


def add_extra_noise(p: Any, x: torch.Tensor, noise: torch.Tensor, xi: torch.Tensor, scale: Any) -> torch.Tensor:
    """img2img's extra noise, announced to callbacks."""
    from modules.script_callbacks import ExtraNoiseParams, extra_noise_callback

    if opts.img2img_extra_noise <= 0:
        return xi
    p.extra_generation_params["Extra noise"] = opts.img2img_extra_noise
    params = ExtraNoiseParams(noise, x, xi)
    extra_noise_callback(params)
    return xi + params.noise * opts.img2img_extra_noise * scale
