"""Samplers as AUTOMATIC1111's WebUI walks them.

Timesteps are those of the training schedule, 0…999. Latents are `(B, C, H, W)` with unit variance per element. A
sampler follows a prediction, the network's native output (ε or v), and does not know how it was guided.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lib_memnoise.core.schedule import ALPHAS_CUMPROD
from lib_memnoise.lab import kdiffusion
from lib_memnoise.lab.ddim import Predict, ddim_timesteps, follow


def _k_model(predict: Predict, parameterization: str) -> Any:
    """k-diffusion's wrapper of a network, as the WebUI uses it: timesteps between the trained ones are allowed."""
    external = kdiffusion.load().external
    kind = external.DiscreteVDDPMDenoiser if parameterization == "v" else external.DiscreteEpsDDPMDenoiser

    class Denoiser(kind):  # type: ignore[misc, valid-type]
        def get_eps(self, x: Tensor, t: Tensor) -> Tensor:
            return predict(x, float(t[0]))

        get_v = get_eps

    return Denoiser(None, ALPHAS_CUMPROD.float(), quantize=False)


@torch.no_grad()
def euler(predict: Predict, x: Tensor, steps: int, parameterization: str = "eps") -> Tensor:
    """k-diffusion's Euler on the model's own sigmas, from the initial latents x to the clean ones."""
    model = _k_model(predict, parameterization)
    sigmas = model.get_sigmas(steps)
    result: Tensor = kdiffusion.load().sampling.sample_euler(model, x * sigmas[0], sigmas, disable=True)
    return result


def euler_first(x: Tensor, steps: int) -> tuple[Tensor, float]:
    model = _k_model(lambda x, t: x, "eps")
    sigma = model.get_sigmas(steps)[:1]
    _, c_in = model.get_scalings(sigma)
    return x * sigma * c_in, float(model.sigma_to_t(sigma))


@dataclass(frozen=True)
class Sampler:
    first: Callable[[Tensor, int], tuple[Tensor, float]]
    """`first(x, steps)`: what the network sees first of the initial latents x, and the timestep T."""
    sample: Callable[[Predict, Tensor, int, str], Tensor]
    """`sample(predict, x, steps, parameterization)`: the latents at the end."""


SAMPLERS: dict[str, Sampler] = {
    "DDIM": Sampler(
        first=lambda x, steps: (x, ddim_timesteps(steps)[0]),
        sample=lambda predict, x, steps, kind: follow(predict, x, ddim_timesteps(steps), kind),
    ),
    "Euler": Sampler(first=euler_first, sample=euler),
}
