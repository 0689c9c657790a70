"""The sampler's first evaluation, read from the sampler itself."""

from __future__ import annotations

from typing import Any

import torch
from modules import shared
from torch import Tensor

from lib_memnoise.core.delta import per_image
from lib_memnoise.sampling.backend import FirstStep
from lib_memnoise.webui import quirks

UNIPC_FIRST = 999.0
"""UniPC has a continuous schedule of its own, whose first timestep is the last of training."""


def is_second(p: Any) -> bool:
    """Whether this pass starts from a picture: img2img, or the second pass of hires fix."""
    return bool(getattr(p, "is_hr_pass", False)) or hasattr(p, "init_images")


def cfg_scale(p: Any) -> float:
    """The CFG scale of this pass; hosts may have one of its own for the hires pass."""
    hires_scale = getattr(p, "is_hr_pass", False) and quirks.has("hires has its own scale", p)
    return float(p.hr_cfg if hires_scale else p.cfg_scale)


def steps_of(p: Any) -> tuple[int, int]:
    """The number of steps in the pass's schedule, and how many of them a pass that starts from a picture uses."""
    if not is_second(p):
        return p.steps, 0
    from modules import sd_samplers_common

    steps = (p.hr_second_pass_steps or p.steps) if getattr(p, "is_hr_pass", False) else None
    steps_and_used: tuple[int, int] = sd_samplers_common.setup_img2img_steps(p, steps)
    return steps_and_used


def is_only_step(p: Any) -> bool:
    """Whether the pass has only one step. Samplers that count in timesteps take one fewer than scheduled."""
    steps, used = steps_of(p)
    if hasattr(p.sampler, "get_timesteps"):
        return (used if is_second(p) else steps) <= 2
    return (used + 1 if is_second(p) else steps) <= 1


def extra_noise() -> float:
    """The host's option for extra noise in a pass that starts from a picture."""
    return float(getattr(shared.opts, "img2img_extra_noise", 0.0))


def in_timesteps(
    p: Any, sampler: Any, x: Tensor, alphas_cumprod: Tensor
) -> tuple[float, float | Tensor, Tensor | float]:
    """The start of a sampler that counts in timesteps: its first timestep, and scale and base as in `FirstStep`.

    Args:
        x: the clean latent where sampling starts from a picture, otherwise the noise, `(B, C, H, W)`.
        alphas_cumprod: ᾱ of every timestep, `(1000,)`.
    """
    steps, used = steps_of(p)
    timesteps = sampler.get_timesteps(p, steps).to(x.device)
    if not is_second(p):
        return (UNIPC_FIRST if sampler.config.name == "UniPC" else float(timesteps[-1])), 1.0, 0.0
    alpha_bar = alphas_cumprod.to(x.device)[timesteps[used]]
    scale = (1 - alpha_bar).sqrt() + extra_noise() * alpha_bar.sqrt()
    return float(timesteps[max(used - 1, 0)]), scale, x * alpha_bar.sqrt()


def in_sigmas(p: Any, sampler: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor | float]:
    """The start of a sampler that counts in sigmas: its first sigma `(1,)`, and scale and base as in `FirstStep`."""
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
        # They count in −log σ, and converting there and back changes the last bit of σ.
        sigma = largest.log().exp().to(x)
    return sigma.reshape(1), scale, 0.0


def compvis_first_step(p: Any, sampler: Any, x: Tensor) -> FirstStep:
    """The first step of a host whose network takes timesteps and whose sampler's wrapper scales the inputs."""
    if hasattr(sampler, "get_timesteps"):
        t, scale, base = in_timesteps(p, sampler, x, shared.sd_model.alphas_cumprod)
        return FirstStep(t, x.new_full((1,), t), scale, base=base)
    sigma, scale, base = in_sigmas(p, sampler, x)
    inner = sampler.model_wrap_cfg.inner_model
    timestep = inner.sigma_to_t(sigma)
    return FirstStep(
        float(timestep), timestep, scale, per_image(inner.get_scalings(sigma)[-1]), base, sigma=float(sigma)
    )
