"""Per-sample mitigation: descend on ‖Δ‖ until it is below a target, guidance on from the start (Figure 7)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lib_memnoise.core.delta import Delta, magnitude, select, working_precision
from lib_memnoise.core.progress import OnProgress, ignore_progress
from lib_memnoise.methods.batch import BatchContext, Outcome, aimed, missed_targets
from lib_memnoise.methods.descent import PATIENCE, Descent, descend
from lib_memnoise.methods.forward_descent import descend_forward
from lib_memnoise.settings import ResolvedSettings


class Adjusted(NamedTuple):
    """The result of per-sample adjustment. All fields but `x` are `(B,)`.

    `before` is NaN where the network's first output was not finite; `after` is ‖Δ‖ of the latent in `x`.
    """

    x: Tensor
    steps: Tensor
    before: Tensor
    after: Tensor
    reached: Tensor
    hopeless: Tensor


class SphereSteps(torch.optim.Optimizer):
    """Steps of a fixed length along the gradient, with each variable rescaled to its own norm after every step.

    This rule is not from the paper. On the miniature it needs a sixth of AdamW's evaluations, and noise keeps its
    length (`benchmarks/step_rules.py`).
    """

    def __init__(self, variables: Iterable[Tensor], lr: float) -> None:
        """
        Args:
            lr: the length of a step divided by √d. AdamW's first step has the length lr·√d as well.
        """
        super().__init__(variables, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for x in group["params"]:
                if x.grad is None:
                    continue
                size, norm = torch.linalg.vector_norm(x.grad), torch.linalg.vector_norm(x)
                # No step where the gradient is zero. A branch on that would wait for the device.
                size = torch.where(size > 0, size, torch.inf)
                x -= group["lr"] * x.numel() ** 0.5 / size * x.grad
                x *= norm / torch.linalg.vector_norm(x)


def adjust(
    x: Tensor,
    delta: Delta,
    *,
    lr: float,
    target: float | Callable[[Tensor], Tensor],
    max_steps: int,
    weight_decay: float = 0.01,
    rule: str = "adamw",
    on_progress: OnProgress = ignore_progress,
    patience: int | None = None,
) -> Adjusted:
    """Minimise ‖Δ(x, T)‖₂ of every image over its initial latent, with AdamW (Figure 7).

    Args:
        x: initial latents x_T, `(B, C, H, W)`, unit variance.
        delta: `delta(x)` returns Δ(x, T) in the shape of x, differentiable in x. It receives only the images
            that are still running; a Δ that needs to know which these are has a method `select(images)`
            (`lib_memnoise.core.delta.SelectableDelta`).
        lr: AdamW's learning rate, in units of x.
        target: l_target, in the units of Δ: an image stops as soon as ‖Δ‖ < target. A function receives the
            first magnitudes `(B,)` and returns a target for each image.
        max_steps: the most optimiser steps an image takes.
        weight_decay: AdamW's, 0.01 as in the paper; it keeps ‖x̃_T‖ near √d (Appendix C).
        rule: "adamw", or "sphere" for `SphereSteps`, which ignores the weight decay.
        on_progress: called after every evaluation.
        patience: see `descent.descend`. None, as in the paper: an image that misses its target takes all steps.

    Returns:
        `Adjusted`: the latents (float32, float64 if x is) and, for each image, the steps taken, the magnitude
        before and after, and whether the target was reached. Where it was not, the latent is the best one seen.

    Raises:
        RuntimeError: Δ carries no gradient (for instance an inference-only network).

    Every image has its own optimiser state and its own stop, so its result does not depend on the rest of the
    batch; the images still running are evaluated together. Cost for each image: (steps + 1) evaluations of Δ
    forward, of two network rows each, and `steps` backward, with respect to x alone.
    """
    start = working_precision(x)

    def loss(latents: list[Tensor], images: list[int]) -> Tensor:
        # ‖ε̃_θ(x_T, T, y)‖₂
        return magnitude(select(delta, images)(torch.stack(latents)).to(start.dtype))

    descent = descend(
        list(start),
        loss,
        optimiser=lambda latents: (
            SphereSteps(latents, lr)
            if rule == "sphere"
            else torch.optim.AdamW(latents, lr=lr, weight_decay=weight_decay)
        ),
        target=target,
        max_steps=max_steps,
        on_progress=on_progress,
        patience=patience,
    )
    return _adjusted(descent)


def _adjusted(descent: Descent) -> Adjusted:
    return Adjusted(torch.stack(descent.best), *descent[1:])


def mitigate(x: Tensor, delta: Delta, settings: ResolvedSettings, context: BatchContext) -> Outcome:
    """`adjust`, or `descend_forward`, with resolved settings.

    An absolute target and ρ are scaled to the size of the latent.
    """
    assert settings.max_steps is not None
    target, shown = aimed(settings, context.factor(x))
    used: dict[str, object]
    if settings.rule == "forward":
        assert settings.gamma is not None and settings.rho is not None
        used = {"gamma": settings.gamma, "rho": settings.rho * context.factor(x)}
        result = _adjusted(
            descend_forward(
                x, delta, gamma=settings.gamma, rho=settings.rho * context.factor(x), target=target,
                max_steps=settings.max_steps, keep_length=settings.keep_length, on_progress=context.on_progress,
                patience=PATIENCE,
            )
        )  # fmt: skip
    else:
        assert settings.lr is not None
        used = {"lr": settings.lr}
        result = adjust(
            x, delta, lr=settings.lr, target=target, max_steps=settings.max_steps, weight_decay=settings.weight_decay,
            rule=settings.rule, on_progress=context.on_progress, patience=PATIENCE,
        )  # fmt: skip
    return Outcome(
        result.x,
        before=result.before,
        after=result.after,
        steps=result.steps,
        used={"rule": settings.rule, **used, "target": shown},
        notes=missed_targets(result, "noise", settings.max_steps),
    )
