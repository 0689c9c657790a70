"""What a host that patches a U-Net does otherwise than A1111, put into the A1111 double's `modules`."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from backend.misc.tomesd import TomePatcher
from backend.sampling.sampling_function import sampling_cleanup, sampling_function, sampling_prepare
from modules import (
    lowvram,
    processing,
    prompt_parser,
    script_callbacks,
    sd_models,
    sd_samplers_cfg_denoiser,
    sd_samplers_common,
    sd_samplers_kdiffusion,
    sd_samplers_lcm,
    sd_samplers_timesteps,
    shared,
)
from modules.api import models
from modules.shared import opts, state

from .model import DiffusionEngine

import k_diffusion.external  # isort: skip
import k_diffusion.sampling  # isort: skip

# Checkpoints: the chosen one is loaded when a generation begins, in inference mode, into an object of its own.


@torch.inference_mode()
def forge_model_reload(info: Any = None) -> tuple[Any, bool]:
    info, data = info or sd_models.select_checkpoint(), sd_models.model_data
    if getattr(data.sd_model, "sd_checkpoint_info", None) is info:
        return data.sd_model, False
    data.sd_model = model = DiffusionEngine(info)
    opts.data["sd_checkpoint_hash"] = info.sha256
    script_callbacks.model_loaded_callback(model)
    return model, True


def apply_token_merging(sd_model: Any, token_merging_ratio: float) -> None:
    if token_merging_ratio > 0 and hasattr(sd_model, "forge_objects"):
        sd_model.forge_objects.unet = TomePatcher().patch(sd_model.forge_objects.unet, token_merging_ratio)


def apply_alpha_schedule_override(sd_model: Any, p: Any = None) -> None:
    sigmas = sd_model._sigmas
    if opts.sd_noise_schedule == "Zero Terminal SNR":
        alphas_cumprod = sd_models.rescale_zero_terminal_snr_abar(1 / (sigmas**2 + 1))
        sigmas = ((1 - alphas_cumprod) / alphas_cumprod).sqrt()
        p.extra_generation_params["Noise Schedule"] = opts.sd_noise_schedule
    sd_model.forge_objects.unet.model.predictor.set_sigmas(sigmas)


def apply_circular_forge(model: Any, tiling_enabled: bool = False) -> None:
    model.tiling_enabled = tiling_enabled


# Generations


@contextlib.contextmanager
def sampling(sd_model: Any) -> Iterator[None]:
    with torch.inference_mode():
        yield


def prepare(original: Callable[..., None]) -> Callable[..., None]:
    def function(p: Any) -> None:
        p.sd_model.comments, p.sd_model.extra_generation_params = [], {}
        original(p)
        apply_circular_forge(p.sd_model, p.tiling)

    return function


def sample_batch(original: Callable[..., Any]) -> Callable[..., Any]:
    def function(p: Any, n: int) -> Any:
        p.sd_model.forge_objects = p.sd_model.forge_objects_original.shallow_copy()
        return original(p, n)

    return function


def noise_to_sample(hook: Callable[..., Any]) -> Callable[..., Any]:
    """The network without patches, the hook, and the noise that it left as an attribute."""

    def method(p: Any, x: torch.Tensor, noise: torch.Tensor, c: Any, uc: Any) -> torch.Tensor:
        if p.is_hr_pass:  # with the first pass's network
            hook(p, x, noise, c, uc)
        p.sd_model.forge_objects = p.sd_model.forge_objects_after_applying_lora.shallow_copy()
        apply_token_merging(p.sd_model, p.get_token_merging_ratio(for_hr=p.is_hr_pass))
        hook(p, x, noise, c, uc)
        if p.modified_noise is not None:
            noise, p.modified_noise = p.modified_noise, None
        return noise

    return method


def setup_conds(original: Callable[..., None]) -> Callable[..., None]:
    def method(p: Any) -> None:
        original(p)
        if p.cfg_scale == 1:
            p.uc = None

    return method


def calculate_hr_conds(original: Callable[..., None]) -> Callable[..., None]:
    def method(p: Any) -> None:
        original(p)
        if p.hr_cfg == 1:
            p.hr_uc = None

    return method


def sample_hr_pass(original: Callable[..., Any]) -> Callable[..., Any]:
    def method(p: Any, *args: Any) -> Any:
        if "Use same choices" not in p.hr_additional_modules:
            raise NotImplementedError("the double has no other modules")
        return original(p, *args)

    return method


MORE: dict[str, tuple[type, Any]] = {"hr_cfg": (float, 1.0), "hr_additional_modules": (list, None)}
"""Of txt2img requests."""


def with_more(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def method(p: Any, *args: Any, **kwargs: Any) -> None:
        for name, (_, default) in MORE.items():
            setattr(p, name, kwargs.pop(name, default))
        original(p, *args, **kwargs)

    return method


# Samplers


class ScheduleLinker(torch.nn.Module):
    """What a sampler of k-diffusion asks about the schedule."""

    sigma_to_t = property(lambda self: lambda sigma, quantize=None: self.predictor.timestep(sigma))
    t_to_sigma = property(lambda self: self.predictor.sigma)
    sigmas = property(lambda self: self.predictor.sigmas)
    log_sigmas = property(lambda self: self.predictor.log_sigmas)

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.predictor, self.inner_model = model.forge_objects.unet.model.predictor, model

    def get_sigmas(self, n: int) -> torch.Tensor:
        return k_diffusion.sampling.append_zero(self.t_to_sigma(torch.linspace(len(self.sigmas) - 1, 0, n)))


class TimestepsDenoiser(torch.nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.inner_model = model
        model.alphas_cumprod = 1 / (model.forge_objects.unet.model.predictor.sigmas**2 + 1)


def lcm_linker(model: Any) -> Any:
    predictor = model.forge_objects.unet.model.predictor
    made = sd_samplers_lcm.LCMCompVisDenoiser(SimpleNamespace(alphas_cumprod=1 / (predictor.sigmas**2 + 1)))
    made.inner_model, made.predictor = model, predictor
    return made


def inner_model(make: Callable[[Any], Any]) -> property:
    def function(denoiser: Any) -> Any:
        if denoiser.model_wrap is None:
            denoiser.model_wrap = make(shared.sd_model)
        return denoiser.model_wrap

    return property(function)


def with_network(original: Callable[..., Any]) -> Callable[..., Any]:
    """Of a sampler: it loads the network first."""

    @functools.wraps(original)
    def method(sampler: Any, p: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        unet = sampler.model_wrap.inner_model.forge_objects.unet
        sampling_prepare(unet, x)
        samples = original(sampler, p, x, *args, **kwargs)
        sampling_cleanup(unet)
        return samples

    return method


def apply_refiner(denoiser: Any, x: torch.Tensor) -> bool:
    p, info = denoiser.p, denoiser.p.refiner_checkpoint_info
    if p.refiner_switch_at is not None and denoiser.step / denoiser.total_steps < p.refiner_switch_at:
        return False
    if info is None or shared.sd_model.sd_checkpoint_info == info:
        return False
    others = "first pass" if p.is_hr_pass else "second pass"
    if getattr(p, "enable_hr", False) and opts.hires_fix_refiner_pass == others:
        return False
    p.extra_generation_params |= {"Refiner": info.short_title, "Refiner switch at": p.refiner_switch_at}
    forge_model_reload(info)
    p.setup_conds()
    denoiser.update_inner_model()
    sampling_prepare(shared.sd_model.forge_objects.unet, x)
    return True


def step_scale(denoiser: Any, cond_scale: float, floor: float, sigma: torch.Tensor) -> float:
    """The CFG scale of a step: 1 where "skip early CFG" or NGMS act."""
    p, step = denoiser.p, denoiser.step
    if opts.skip_early_cond > 0 and step / denoiser.total_steps <= opts.skip_early_cond:
        p.extra_generation_params["Skip Early CFG"] = opts.skip_early_cond
        return 1.0
    if (step % 2 or opts.s_min_uncond_all) and floor > 0 and sigma[0] < floor:
        p.extra_generation_params["NGMS"] = floor
        return 1.0
    return p.hr_cfg if p.is_hr_pass else cond_scale


def denoise(
    self: Any,
    x: torch.Tensor,
    sigma: torch.Tensor,
    uncond: Any,
    cond: Any,
    cond_scale: float,
    s_min_uncond: float,
    image_cond: torch.Tensor,
) -> torch.Tensor:
    """The denoiser's `forward`. Samplers that count in timesteps give it these, and get ε."""
    if state.interrupted or state.skipped:
        raise sd_samplers_common.InterruptedException
    if self.counts_in_timesteps:
        alphas_cumprod = self.inner_model.inner_model.alphas_cumprod
        sigma = ((1 - alphas_cumprod) / alphas_cumprod).sqrt()[sigma.round().long()]
        x = x * (sigma**2 + 1).sqrt()[:, None, None, None]
    if sd_samplers_common.apply_refiner(self, x):
        cond, uncond = (self.sampler.sampler_extra_args[name] for name in ("cond", "uncond"))
    composition, cond = prompt_parser.reconstruct_multicond_batch(cond, self.step)
    uncond = None if uncond is None else prompt_parser.reconstruct_cond_batch(uncond, self.step)
    if self.mask is not None:
        predictor = self.inner_model.inner_model.forge_objects.unet.model.predictor
        noise = torch.randn_like(self.init_latent)
        noisy = predictor.noise_scaling(sigma[:, None, None, None], noise, self.init_latent)
        x = x * self.nmask + noisy * self.mask
    params = script_callbacks.CFGDenoiserParams(
        x, image_cond, sigma, state.sampling_step, state.sampling_steps, cond, uncond, self
    )
    script_callbacks.cfg_denoiser_callback(params)
    scale = step_scale(self, cond_scale, s_min_uncond, sigma)
    denoised, _, of_nothing = sampling_function(self, params, scale, composition)
    if self.need_last_noise_uncond:
        self.last_noise_uncond = (x - of_nothing) / sigma[:, None, None, None]
    if self.mask is not None:
        denoised = self._blend(denoised, sigma)
    self.sampler.last_latent = denoised
    sd_samplers_common.store_latent(denoised)
    after = script_callbacks.AfterCFGCallbackParams(denoised, state.sampling_step, state.sampling_steps)
    script_callbacks.cfg_after_cfg_callback(after)
    self.step += 1
    return (x - after.x) / sigma[:, None, None, None] if self.counts_in_timesteps else after.x


def make(patch: pytest.MonkeyPatch) -> None:
    """Make all these changes; the patch undoes them."""

    def put(owner: Any, name: str, value: Any) -> None:
        patch.setattr(owner, name, value, raising=False)

    def wrap(owner: Any, name: str, wrapper: Callable[[Any], Any]) -> None:
        put(owner, name, wrapper(getattr(owner, name)))

    put(lowvram, "is_enabled", lambda sd_model: False)
    put(sd_models, "forge_model_reload", forge_model_reload)
    put(sd_models, "reload_model_weights", lambda *args, **kwargs: None)
    # Until a generation begins there is none.
    put(sd_models.SdModelData, "get_sd_model", lambda data: data.sd_model or SimpleNamespace(cond_stage_model=None))
    put(sd_models, "apply_token_merging", lambda sd_model, ratio: None)
    put(sd_models, "apply_alpha_schedule_override", apply_alpha_schedule_override)

    first, txt2img = processing.StableDiffusionProcessing, processing.StableDiffusionProcessingTxt2Img
    put(processing, "_load_checkpoint", forge_model_reload)
    put(processing, "_sampling", sampling)
    put(processing, "_sees_picture", lambda sd_model: sd_model.is_inpaint)
    put(processing, "apply_circular_forge", apply_circular_forge)
    wrap(processing, "_prepare", prepare)
    wrap(processing, "_sample_batch", sample_batch)
    put(first, "modified_noise", None)
    wrap(first, "_noise_to_sample", noise_to_sample)
    wrap(first, "setup_conds", setup_conds)
    wrap(txt2img, "__init__", with_more)
    wrap(txt2img, "calculate_hr_conds", calculate_hr_conds)
    wrap(txt2img, "sample_hr_pass", sample_hr_pass)
    request = models._request_model("Txt2Img", txt2img, {**models._COMMON, **MORE})
    put(models, "StableDiffusionTxt2ImgProcessingAPI", request)
    indexed = lambda cond, rows: type(cond)({key: value[rows] for key, value in cond.items()})  # noqa: E731
    put(prompt_parser.DictWithShape, "advanced_indexing", indexed)

    denoiser, timesteps = sd_samplers_cfg_denoiser.CFGDenoiser, sd_samplers_timesteps.CFGDenoiserTimesteps
    put(denoiser, "forward", denoise)
    put(denoiser, "counts_in_timesteps", False)
    put(timesteps, "counts_in_timesteps", True)
    put(timesteps, "__init__", denoiser.__init__)
    put(timesteps, "inner_model", inner_model(TimestepsDenoiser))
    put(sd_samplers_kdiffusion.CFGDenoiserKDiffusion, "inner_model", inner_model(ScheduleLinker))
    put(sd_samplers_lcm.CFGDenoiserLCM, "inner_model", inner_model(lcm_linker))
    put(sd_samplers_common, "apply_refiner", apply_refiner)
    for sampler in (sd_samplers_kdiffusion.KDiffusionSampler, sd_samplers_timesteps.CompVisSampler):
        wrap(sampler, "sample", with_network)
        wrap(sampler, "sample_img2img", with_network)
