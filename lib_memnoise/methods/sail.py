"""SAIL: descend on the prediction at the probed noise, and stay near the origin (Jeon et al. 2025)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from lib_memnoise.core.delta import Delta, magnitude, per_image, select, working_precision
from lib_memnoise.core.progress import part_of_progress
from lib_memnoise.methods.batch import BatchContext, Outcome, aimed
from lib_memnoise.methods.descent import PATIENCE, descend
from lib_memnoise.settings import ResolvedSettings


class Adjusted(NamedTuple):
    """The result of SAIL. All fields but `x` are `(B,)`.

    `steps` counts over all noises, `before` and `after` are losses, and `redraws` is the number of the last noise that
    was tried, 0 being the noise as drawn.
    """

    x: Tensor
    steps: Tensor
    before: Tensor
    after: Tensor
    reached: Tensor
    redraws: Tensor


def adjust(
    x: Tensor,
    delta: Delta,
    context: BatchContext,
    *,
    lr: float,
    alpha: float,
    target: float | Callable[[Tensor], Tensor],
    max_steps: int,
    redraws: int,
    patience: int | None = None,
) -> Adjusted:
    """Minimise ‖Δ(x + δ, T)‖ + α‖x‖, δ = Δ/‖Δ‖, with Adam.

    This is the loss of the authors' code, with plain norms; their text has ‖Δ(x + δ) − Δ(x)‖² + α‖x‖². The authors
    compute δ once, from the noise as drawn; here it is computed from x in every step. Δ is in units of ε, whether the
    network predicts ε or v.

    Args:
        x: initial latents x_T, `(B, C, H, W)`, unit variance.
        delta: `delta(x)` returns Δ(x, T) in the shape of x, differentiable in x.
        lr: Adam's learning rate.
        alpha: the weight α of ‖x‖.
        target: an image stops as soon as its loss is below it, as in `descent.descend`.
        max_steps: the most optimiser steps with one noise.
        redraws: how often an image that has not reached the target starts again, from other noise of its seed.
        patience: see `descent.descend`.

    Raises:
        RuntimeError: Δ carries no gradient.

    Cost for each image and step: four network rows forward and four backward.
    """
    start = working_precision(x)
    unit = context.alpha_bar**0.5 if context.parameterization == "v" else 1.0

    def loss_of(images: list[int]) -> Callable[[list[Tensor], list[int]], Tensor]:
        def loss(latents: list[Tensor], running: list[int]) -> Tensor:
            latent = torch.stack(latents)
            network = select(delta, [images[k] for k in running])
            prediction = network(latent).to(start.dtype)
            length = per_image(magnitude(prediction))
            probe = prediction / torch.where(length == 0, torch.ones_like(length), length)
            return unit * magnitude(network(latent + probe).to(start.dtype)) + alpha * magnitude(latent)

        return loss

    result = Adjusted(
        start.clone(),
        torch.zeros(len(start), dtype=torch.long, device=start.device),
        start.new_full((len(start),), float("nan")),
        start.new_full((len(start),), float("inf")),
        torch.zeros(len(start), dtype=torch.bool, device=start.device),
        torch.zeros(len(start), dtype=torch.long, device=start.device),
    )
    left = list(range(len(start)))
    for attempt in range(redraws + 1):
        noise = start if attempt == 0 else torch.stack([context.noise(start, i, attempt) for i in range(len(start))])
        descent = descend(
            [noise[i] for i in left],
            loss_of(left),
            optimiser=lambda latents: torch.optim.Adam(latents, lr=lr),
            target=target,
            max_steps=max_steps,
            on_progress=part_of_progress(
                lambda progress: context.on_progress(replace(progress, what="loss")), attempt, redraws + 1
            ),
            patience=patience,
        )
        for k, image in enumerate(left):
            result.steps[image] += descent.steps[k]
            result.redraws[image] = attempt
            if attempt == 0:
                result.before[image] = descent.before[k]
            if not descent.after[k] >= result.after[image]:
                result.x[image], result.after[image] = descent.best[k], descent.after[k]
            result.reached[image] = descent.reached[k]
        left = [image for image in left if not result.reached[image]]
        if not left:
            break
    return result


def mitigate(x: Tensor, delta: Delta, settings: ResolvedSettings, context: BatchContext) -> Outcome:
    """`adjust` with resolved settings; an absolute target is scaled to the size of the latent."""
    assert settings.lr is not None and settings.alpha is not None and settings.max_steps is not None
    # The loss is ‖Δ(x + δ)‖ + α‖x‖. A target that is a fraction applies to the first term alone: the second stays.
    length = settings.alpha * x[0].numel() ** 0.5
    target, used = aimed(settings, context.factor(x))
    aim = (lambda before: target(before - length) + length) if callable(target) else target
    result = adjust(
        x, delta, context, lr=settings.lr, alpha=settings.alpha, target=aim, max_steps=settings.max_steps,
        redraws=settings.redraws, patience=PATIENCE,
    )  # fmt: skip
    # Without a finite loss there is no adjusted noise either; NaN makes the image fail.
    latents = result.x.masked_fill(~per_image(torch.isfinite(result.after)), float("nan"))
    outcome = Outcome(latents, steps=result.steps, used={"lr": settings.lr, "alpha": settings.alpha, "target": used})
    for image, (reached, redraws) in enumerate(zip(result.reached.tolist(), result.redraws.tolist())):
        if not reached:
            outcome.notes.setdefault(image, []).append(
                f"the target was not reached with {redraws + 1} noises and the best one was kept"
            )
        elif redraws:
            outcome.notes.setdefault(image, []).append(f"noise {redraws} drawn anew reached the target")
    return outcome
