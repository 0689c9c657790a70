"""The mitigation methods: one module each, and this table of them.

To add a method, write its module and add a row here; its own settings are rows of `lib_memnoise.settings`.
The table imports no torch: a method's module is loaded when it first runs.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """A row of the table: what people see of a method, and what a sampler needs to know of it."""

    label: str
    help: str
    holds_guidance: bool
    """Guidance is off until τ."""
    needs_gradient: bool
    """Back-propagates through the network."""


METHODS: dict[str, Method] = {
    "batch_wise": Method(
        label="Batch-wise",
        help="A few forward evaluations move the noise, then guidance stays off until τ. "
        "About 3 % more network evaluations, no extra memory.",
        holds_guidance=True,
        needs_gradient=False,
    ),
    "per_sample": Method(
        label="Per-sample",
        help="Gradient descent on the conditional prediction of each image until it is below a target; guidance "
        "on from the start. Stronger; needs memory for a backward pass.",
        holds_guidance=False,
        needs_gradient=True,
    ),
}
