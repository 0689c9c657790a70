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
    guidance: str
    """When guidance starts unless the settings say otherwise: at the "first" step, or at "tau"."""
    needs_gradient: bool
    """Back-propagates through the network."""


METHODS: dict[str, Method] = {
    "batch_wise": Method(
        label="Batch-wise",
        help="A few forward evaluations move the noise, then guidance stays off until τ. "
        "About 3 % more network evaluations, no extra memory.",
        guidance="tau",
        needs_gradient=False,
    ),
    "per_sample": Method(
        label="Per-sample",
        help="Gradient descent on the conditional prediction of each image until it is below a target; guidance "
        "on from the start. Stronger; needs memory for a backward pass.",
        guidance="first",
        needs_gradient=True,
    ),
    "none": Method(
        label="None",
        help="The noise stays as it is: measures the score; with guidance that starts later, a static or dynamic "
        "transition point.",
        guidance="first",
        needs_gradient=False,
    ),
}
