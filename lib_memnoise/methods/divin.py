"""DivIn: one Langevin step on the initial noise (ICML 2026).

Implemented from a description, since the authors' code is not available.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lib_memnoise.core.delta import Delta, magnitude, per_image, working_precision
from lib_memnoise.methods.batch import BatchContext, Outcome
from lib_memnoise.methods.descent import gradients
from lib_memnoise.settings import ResolvedSettings


def adjust(
    x: Tensor, delta: Delta, context: BatchContext, *, eta: float, temperature: float
) -> tuple[Tensor, Tensor | None]:
    """x ← x − η (τ ∇U(x) + x) + √(2η) ξ with U = ‖x̂_0(y) − x̂_0(y_null)‖², ξ Gaussian from the image's seed.

    Args:
        x: initial latents x_T, `(B, C, H, W)`, unit variance.
        delta: `delta(x)` returns Δ(x, T) in the shape of x, differentiable in x. x̂_0 is linear in the network's
            output, so U = s² ‖Δ‖², where s² is (1 − ᾱ)/ᾱ in ε and 1 − ᾱ in v.
        eta: the step size η.
        temperature: the weight τ of the gradient, which has nothing to do with the timestep τ of guidance.

    Returns:
        The latents, and ‖Δ(x_T, T)‖ `(B,)`; None where it was not measured.

    Raises:
        RuntimeError: ᾱ is 0 and the network predicts ε, which then does not determine x̂_0; or Δ has no gradient.

    The variance of the noise becomes (1 − η)² + 2η = 1 + η². Cost for each image: two network rows forward and two
    backward; none where τ is 0, and forward only where η is 0.
    """
    start = working_precision(x)
    if eta == 0:
        with torch.no_grad():
            return start, magnitude(delta(start).to(start.dtype))
    noise = torch.stack([context.noise(start, image, 0) for image in range(len(start))])
    if temperature == 0:
        return start - eta * start + (2 * eta) ** 0.5 * noise, None
    a = context.alpha_bar
    if a == 0 and context.parameterization != "v":
        raise RuntimeError(
            "DivIn needs a first timestep at which something is left of the picture, and here nothing is"
        )
    scale = 1 - a if context.parameterization == "v" else (1 - a) / a
    latent = start.clone().requires_grad_()
    with torch.enable_grad():
        value = magnitude(delta(latent).to(start.dtype))
    # ∇‖Δ‖² = 2 ‖Δ‖ ∇‖Δ‖
    (gradient,) = gradients(value, [latent])
    value = value.detach()
    gradient = 2 * scale * per_image(value) * gradient
    return start - eta * (temperature * gradient + start) + (2 * eta) ** 0.5 * noise, value


def mitigate(x: Tensor, delta: Delta, settings: ResolvedSettings, context: BatchContext) -> Outcome:
    """`adjust` with resolved settings."""
    latents, before = adjust(x, delta, context, eta=settings.eta, temperature=settings.temperature)
    return Outcome(latents, before=before, used={"eta": settings.eta, "temperature": settings.temperature})
