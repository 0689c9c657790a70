"""The table of mitigation methods, each of which is a module of `lib_memnoise.methods`.

To add a method, write its module and add a row here; its own settings are fields of `lib_memnoise.settings`.
The table does not import torch: a method's module is loaded when the method first runs.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """A row of the table: a method's texts on the page, and what a sampler needs to know about it."""

    label: str
    help: str
    guidance: str
    """When guidance starts unless the settings say otherwise: at the "first" step, at "tau" or at the "transition"."""
    needs_gradient: bool = False
    """Whether the method back-propagates through the network."""
    module: str = ""
    """The module of `lib_memnoise.methods`; empty where it has the method's name."""


METHODS: dict[str, Method] = {
    "batch_wise": Method(
        label="Batch-wise",
        help="A few forward evaluations move the noise, then guidance stays off until τ. "
        "About 3 % more network evaluations, no extra memory.",
        guidance="tau",
    ),
    "per_sample": Method(
        label="Per-sample",
        help="Gradient descent on the conditional prediction of each image until it is below a target; guidance "
        "on from the start. Stronger; needs memory for a backward pass.",
        guidance="first",
        needs_gradient=True,
    ),
    "repulsion": Method(
        label="Repulsion",
        help="Moves the noise away from the memory, by one evaluation and without a gradient; its length stays. "
        "This project's own: nothing is published.",
        guidance="first",
    ),
    "static": Method(
        label="Static transition point",
        help="The noise as it is; guidance off until τ. Costs less than no mitigation.",
        guidance="tau",
        module="transition",
    ),
    "dynamic": Method(
        label="Dynamic transition point",
        help="The noise as it is; guidance off until the image's own ‖Δ‖ has its first local minimum.",
        guidance="transition",
        module="transition",
    ),
    "opposite_guidance": Method(
        label="Opposite guidance",
        help="The noise as it is; guidance away from the prompt until the transition point, then towards it.",
        guidance="transition",
        module="transition",
    ),
    "noise_selection": Method(
        label="Noise selection",
        help="The best of several noises from the image's seed; noise stays noise. Two network rows for each.",
        guidance="first",
    ),
    "random_tokens": Method(
        label="Random tokens",
        help="Random tokens between the words of the prompt, from the image's seed. No cost; another prompt.",
        guidance="first",
    ),
    "prompt_embedding": Method(
        label="Prompt embedding",
        help="Gradient descent on the prompt's vectors instead of the noise. Needs memory for a backward pass.",
        guidance="first",
        needs_gradient=True,
    ),
    "cross_attention": Method(
        label="Cross-attention scaling",
        help="The network hears the prompt's start token louder and its padding not at all. Costs nothing.",
        guidance="first",
    ),
    "padding_fix": Method(
        label="Padding fix",
        help="The prompt is padded with another token than its end. For SD 1's text encoder. Costs nothing.",
        guidance="first",
    ),
    "sail": Method(
        label="SAIL",
        help="Gradient descent on the prediction of probed noise. Twice per-sample's cost for a step.",
        guidance="first",
        needs_gradient=True,
    ),
    "divin": Method(
        label="DivIn",
        help="One Langevin step on the noise. One forward and one backward pass.",
        guidance="first",
        needs_gradient=True,
    ),
    "none": Method(
        label="None",
        help="Nothing is changed: measures the score.",
        guidance="first",
    ),
}

USUAL = ("none", "static", "batch_wise", "per_sample")
"""The methods that are compared by default."""
