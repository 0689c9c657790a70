"""What a mitigation did to a batch of initial latents, and the one way to run it."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lib_memnoise.prediction import NORM_BOUND, Delta, norm_ratio, select
from lib_memnoise.settings import Settings, size_factor


@dataclass
class Outcome:
    """Adjusted latents `x` `(B, C, H, W)` and, where a method knows them, what it measured, `(B,)` each."""

    x: Tensor
    before: Tensor | None = None
    after: Tensor | None = None
    steps: Tensor | None = None
    norm: Tensor | None = None
    """‖x̃_T‖/√d."""
    used: dict[str, object] = field(default_factory=dict)
    """The values that took effect, after presets and scaling."""
    notes: dict[int, list[str]] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    """Images whose latent could not be adjusted and is as it was."""


def run(x: Tensor, delta: Delta, settings: Settings, *, parameterization: str) -> Outcome:
    """Adjust initial latents by the chosen method; what every host and the command line call.

    Args:
        x: initial latents x_T, `(B, C, H, W)`, unit variance.
        delta: Δ(x, T); see the methods' own `adjust` for what they ask of it.
        settings: resolved settings (`Settings.resolved`).
        parameterization: "eps" or "v": the network's native output, in which Δ is measured.
    """
    module = importlib.import_module(f"lib_memnoise.mitigations.{settings.method}")
    outcome: Outcome = module.mitigate(x, delta, settings, size_factor(x[0].numel(), parameterization))

    finite = torch.isfinite(outcome.x).flatten(1).all(1)
    if outcome.before is not None:
        finite &= torch.isfinite(outcome.before)
    outcome.x = torch.where(finite.reshape(-1, 1, 1, 1), outcome.x, x.to(outcome.x.dtype))
    outcome.norm = norm_ratio(outcome.x)
    for image, (ok, norm) in enumerate(zip(finite.tolist(), outcome.norm.tolist())):
        if not ok:
            outcome.failed[image] = "the network returned values that are not finite"
            outcome.notes.pop(image, None)
        elif abs(norm - 1) > NORM_BOUND:
            outcome.notes.setdefault(image, []).append(
                f"the adjusted noise has {norm:.3f} times its usual length and may look wrong"
            )
    return outcome


def run_each(x: Tensor, delta: Delta, settings: Settings, *, parameterization: str) -> Outcome:
    """`run`, one image at a time: the least memory. Every image is on its own in any case."""
    images = [run(x[i : i + 1], select(delta, [i]), settings, parameterization=parameterization) for i in range(len(x))]

    def joined(name: str) -> Tensor | None:
        values = [getattr(image, name) for image in images]
        return None if any(value is None for value in values) else torch.cat(values)

    latents = joined("x")
    assert latents is not None
    return Outcome(
        latents,
        before=joined("before"),
        after=joined("after"),
        steps=joined("steps"),
        norm=joined("norm"),
        used=images[0].used,
        notes={i: image.notes[0] for i, image in enumerate(images) if image.notes},
        failed={i: image.failed[0] for i, image in enumerate(images) if image.failed},
    )
