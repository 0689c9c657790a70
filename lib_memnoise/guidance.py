"""When classifier-free guidance is on."""

from __future__ import annotations

TIMESTEP_ROUNDING = 0.01
"""A timestep recovered from a float32 sigma is off by up to about 1e-3, and published values of τ are rounded to
four decimals, while the steps of any sampler's grid lie whole timesteps apart."""


def guidance_off(timestep: float, tau: float) -> bool:
    """Whether guidance is off at this timestep: `t > τ` (Algorithm 1), where t = τ up to rounding is on.

    Both are timesteps of the training schedule, 0…999, whatever the sampler counts in. Off means that the
    unconditional prediction is followed: ε_CFG(x_t, t, y) = ε_θ(x_t, t, y_null).
    """
    return timestep > tau + TIMESTEP_ROUNDING
