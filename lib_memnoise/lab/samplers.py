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

from lib_memnoise.lab import kdiffusion
from lib_memnoise.lab.sampling import ALPHAS_CUMPROD, TRAINING_STEPS, Predict, alpha_bar, ddim_timesteps, follow


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


@dataclass(frozen=True)
class Sampler:
    first_timestep: Callable[[int], float]
    """T, of a number of steps."""
    first_input: Callable[[Tensor], Tensor]
    """What the network sees at T of the initial latents."""
    sample: Callable[[Predict, Tensor, int, str], Tensor]
    """`sample(predict, x, steps, parameterization)`: the latents at the end."""


def _euler_input(x: Tensor) -> Tensor:
    # The noise is multiplied by σ and what is seen divided by √(σ² + 1): 0.998 of it.
    return x * (1 - alpha_bar(TRAINING_STEPS - 1)) ** 0.5


SAMPLERS: dict[str, Sampler] = {
    "DDIM": Sampler(
        first_timestep=lambda steps: ddim_timesteps(steps)[0],
        first_input=lambda x: x,
        sample=lambda predict, x, steps, kind: follow(predict, x, ddim_timesteps(steps), kind),
    ),
    "Euler": Sampler(
        first_timestep=lambda steps: TRAINING_STEPS - 1,
        first_input=_euler_input,
        sample=euler,
    ),
}
