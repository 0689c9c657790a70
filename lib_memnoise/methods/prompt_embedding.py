"""Prompt embedding adjustment: descend on ‖Δ‖ over the prompt's vectors; the noise stays (Wen et al. 2024)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lib_memnoise.core.delta import Delta, PromptedDelta, magnitude, working_precision
from lib_memnoise.core.progress import OnProgress, ignore_progress
from lib_memnoise.methods.batch import BatchContext, Outcome, Prompt, aimed, missed_targets
from lib_memnoise.methods.descent import PATIENCE, descend
from lib_memnoise.methods.pipeline import Scored
from lib_memnoise.settings import ResolvedSettings


class Adjusted(NamedTuple):
    """The result of prompt embedding adjustment. All fields but `vectors` are `(B,)`."""

    vectors: list[Tensor]
    steps: Tensor
    before: Tensor
    after: Tensor
    reached: Tensor
    hopeless: Tensor


def adjust(
    x: Tensor,
    delta: PromptedDelta,
    *,
    lr: float,
    target: float | Callable[[Tensor], Tensor],
    max_steps: int,
    weight_decay: float = 0.01,
    fixed: Sequence[int] = (0,),
    on_progress: OnProgress = ignore_progress,
    patience: int | None = None,
) -> Adjusted:
    """Minimise ‖Δ(x_T, T)‖ of every image over its prompt's vectors, with AdamW.

    Args:
        x: initial latents x_T, `(B, C, H, W)`, which are not changed.
        delta: Δ(x, T) whose prompts' vectors can be replaced, differentiable in them.
        lr: AdamW's learning rate.
        target: an image stops as soon as its ‖Δ‖ is below it. The authors' target is for one norm over a batch of B
            images; an image's own target is that divided by √B.
        max_steps: the most optimiser steps an image takes.
        weight_decay: AdamW's default, as in the authors' code.
        fixed: the places of start tokens, whose gradient is set to zero.
        on_progress: called after every evaluation.
        patience: see `descent.descend`.

    Raises:
        RuntimeError: Δ carries no gradient.

    Cost for each image: one unconditional row, a row for each part of its prompt in every loss, and as many backward
    in every step.
    """
    x = working_precision(x)
    delta_of = delta.conditioned(x)

    def loss(vectors: list[Tensor], images: list[int]) -> Tensor:
        held = [_held(value, fixed) for value in vectors]
        return magnitude(delta_of(held, images).to(x.dtype))

    descent = descend(
        [value.to(x.dtype) for value in delta.vectors],
        loss,
        optimiser=lambda vectors: torch.optim.AdamW(vectors, lr=lr, weight_decay=weight_decay),
        target=target,
        max_steps=max_steps,
        on_progress=on_progress,
        patience=patience,
    )
    return Adjusted(descent.best, descent.steps, descent.before, descent.after, descent.reached, descent.hopeless)


def _held(vectors: Tensor, fixed: Sequence[int]) -> Tensor:
    """The same vectors, with no gradient through those at `fixed`."""
    held = torch.zeros(vectors.shape[-2], 1, dtype=torch.bool, device=vectors.device)
    held[list(fixed)] = True
    return torch.where(held, vectors.detach(), vectors)


def mitigate(x: Tensor, delta: Delta, settings: ResolvedSettings, context: BatchContext) -> Outcome:
    """`adjust` with resolved settings; an absolute target is scaled to the size of the latent."""
    assert settings.lr is not None and settings.max_steps is not None
    if not isinstance(delta.inner if isinstance(delta, Scored) else delta, PromptedDelta):
        raise RuntimeError("the prompt's vectors cannot be reached")
    target, used = aimed(settings, context.factor(x))
    if settings.max_steps == 0:
        with torch.no_grad():
            before = magnitude(delta(x).float())
        reached = before < (target(before) if callable(target) else target)
        steps = torch.zeros(len(x), dtype=torch.long)
        result = Adjusted([], steps, before, before, reached, torch.zeros_like(reached))
    else:
        assert isinstance(delta, PromptedDelta)
        result = adjust(
            x, delta, lr=settings.lr, target=target, max_steps=settings.max_steps, weight_decay=settings.weight_decay,
            fixed=delta.fixed, on_progress=context.on_progress, patience=PATIENCE,
        )  # fmt: skip
    return Outcome(
        working_precision(x),
        before=result.before,
        after=result.after,
        steps=result.steps,
        used={"lr": settings.lr, "target": used},
        notes=missed_targets(result, "vectors", settings.max_steps),
        prompts={
            image: Prompt(vectors=result.vectors[image]) for image, steps in enumerate(result.steps.tolist()) if steps
        },
    )
