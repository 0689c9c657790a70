"""The sampler's first evaluation, read off the sampler itself."""

from __future__ import annotations

from typing import Any

import torch
from modules import shared
from torch import Tensor

from lib_memnoise.core.delta import per_image
from lib_memnoise.sampling.backend import FirstStep

UNIPC_FIRST = 999.0
"""UniPC has a continuous schedule of its own, whose first timestep is the last of training."""


def is_second(p: Any) -> bool:
    """Whether this pass samples a picture on: img2img, or the second pass of hires fix."""
    return bool(getattr(p, "is_hr_pass", False)) or hasattr(p, "init_images")


def steps_of(p: Any) -> tuple[int, int]:
    """Steps of the pass's schedule, and how many of them are taken before its end where a picture is sampled on."""
    if not is_second(p):
        return p.steps, 0
    from modules import sd_samplers_common

    steps = (p.hr_second_pass_steps or p.steps) if getattr(p, "is_hr_pass", False) else None
    steps_and_used: tuple[int, int] = sd_samplers_common.setup_img2img_steps(p, steps)
    return steps_and_used


def is_only_step(p: Any) -> bool:
    """Whether the pass has no step but its first. Samplers that count in timesteps stop at the last of them."""
    steps, used = steps_of(p)
    if hasattr(p.sampler, "get_timesteps"):
        return (used if is_second(p) else steps) <= 2
    return (used + 1 if is_second(p) else steps) <= 1


def extra_noise() -> float:
    """The host's option: so much more of the noise is added to a picture that is sampled on."""
    return float(getattr(shared.opts, "img2img_extra_noise", 0.0))


def in_timesteps(
    p: Any, sampler: Any, x: Tensor, alphas_cumprod: Tensor
) -> tuple[float, float | Tensor, Tensor | float]:
    """Of a sampler that counts in timesteps: its first, and scale and base of the noise that it starts from.

    `x` is the clean latent where a picture is sampled on.
    """
    steps, used = steps_of(p)
    timesteps = sampler.get_timesteps(p, steps).to(x.device)
    if not is_second(p):
        return (UNIPC_FIRST if sampler.config.name == "UniPC" else float(timesteps[-1])), 1.0, 0.0
    alpha_bar = alphas_cumprod.to(x.device)[timesteps[used]]
    scale = (1 - alpha_bar).sqrt() + extra_noise() * alpha_bar.sqrt()
    return float(timesteps[max(used - 1, 0)]), scale, x * alpha_bar.sqrt()


def in_sigmas(p: Any, sampler: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor | float]:
    """Of a sampler that counts in sigmas: its first, `(1,)`, and scale and base of the noise that it starts from."""
    steps, used = steps_of(p)
    sigmas = sampler.get_sigmas(p, steps)
    if is_second(p):
        start = sigmas[steps - used - 1].to(x)
        return start.reshape(1), start + extra_noise(), x
    start = sigma = sigmas[0].to(x)
    scale = torch.sqrt(1.0 + start**2.0) if getattr(shared.opts, "sgm_noise_multiplier", False) else start
    if sampler.config.name in ("DPM fast", "DPM adaptive"):
        # These two ignore the schedule and start from the model's own largest sigma.
        largest = torch.tensor(sampler.model_wrap_cfg.inner_model.sigmas[-1].item())
        # They count in −log σ; the way there and back changes σ's last bit.
        sigma = largest.log().exp().to(x)
    return sigma.reshape(1), scale, 0.0


def compvis_first_step(p: Any, sampler: Any, x: Tensor) -> FirstStep:
    """Where the network is asked at timesteps, with inputs scaled by the sampler's own wrapper."""
    if hasattr(sampler, "get_timesteps"):
        t, scale, base = in_timesteps(p, sampler, x, shared.sd_model.alphas_cumprod)
        return FirstStep(t, x.new_full((1,), t), scale, base=base)
    sigma, scale, base = in_sigmas(p, sampler, x)
    inner = sampler.model_wrap_cfg.inner_model
    timestep = inner.sigma_to_t(sigma)
    return FirstStep(
        float(timestep), timestep, scale, per_image(inner.get_scalings(sigma)[-1]), base, sigma=float(sigma)
    )
