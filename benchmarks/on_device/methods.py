"""The methods measured, what each is documented to cost, and one image's generation by each."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from lib_memnoise.core.delta import Delta, magnitude, per_image, working_precision
from lib_memnoise.core.guidance import Start, make_start
from lib_memnoise.lab import simulator
from lib_memnoise.lab.ddim import ddim_timesteps, follow
from lib_memnoise.methods import batch_wise
from lib_memnoise.methods.batch import BatchContext, Outcome
from lib_memnoise.methods.pipeline import run
from lib_memnoise.settings import Settings
from lib_memnoise.torch_utils.checkpointing import checkpointed
from on_device.shapes import Model

STEPS = 50
CALLS = STEPS - 1
"""The network's evaluations in DDIM with 50 steps, without mitigation."""
BETA = 0.31
GAMMA, RHO = 0.7, 50.0
"""Algorithm 1's on SD 1.4."""

Way = Callable[[Tensor, Delta, BatchContext, int], Outcome]
"""`way(x, delta, initial, work)`: adjust by this many steps."""


@torch.no_grad()
def repulsion(x: Tensor, delta: Delta, context: BatchContext, work: int) -> Outcome:
    """x̃ = ‖x‖ · (x + β√d·Δ/‖Δ‖) / ‖x + β√d·Δ/‖Δ‖‖. A prototype: the product does not have it yet."""
    x = working_precision(x)
    prediction = delta(x).to(x.dtype)
    away = x + BETA * x[0].numel() ** 0.5 * prediction / per_image(magnitude(prediction))
    return Outcome(away * per_image(magnitude(x) / magnitude(away)))


def forward_descent(x: Tensor, delta: Delta, context: BatchContext, work: int) -> Outcome:
    """Algorithm 1's step `work` times, guidance on from the start. A prototype: it has no target yet."""
    return Outcome(batch_wise.adjust(x, delta, gamma=GAMMA, rho=RHO * context.factor(x), steps=work))


def product(settings: Settings, steps: str = "") -> Way:
    """A method of the product; `steps` is the setting that says how many steps it takes."""

    def way(x: Tensor, delta: Delta, context: BatchContext, work: int) -> Outcome:
        asked = settings.resolved("sd1")
        return run(x, delta, replace(asked, **{steps: work}) if steps else asked, context)

    return way


BATCH_WISE = Settings(enabled=True)
PER_SAMPLE = Settings(enabled=True, method="per_sample", preset="custom", lr=0.01, target=0.0, max_steps=8)
"""A target that is never reached, so that all steps are taken."""


@dataclass(frozen=True)
class Method:
    """A method, and what is written of its cost. Rows are an image's of a whole generation."""

    name: str
    way: Way | None = None
    work: int = 0
    """Steps of the adjustment, where these can be chosen."""
    start: Settings = BATCH_WISE
    """By which guidance starts."""
    late: bool = False
    """Guidance is off until τ."""
    mode: bool = False
    """Checkpointed."""
    prototype: bool = False
    time: float | None = None
    """The most that is aimed at, in times of no mitigation."""
    memory: float | None = None
    paper: tuple[float, float] | None = None
    """The paper's, likewise: time and memory."""

    def rows(self, work: int, calls: int) -> tuple[int, int]:
        """Rows forward and backward that an image takes by the documented costs, if `calls` are made of the sampler.

        `calls` include those with guidance off.
        """
        sampler = 2 * calls
        if self.late:
            sampler -= min(calls, OFF)
        if self.name == "batch-wise":
            return sampler + 4 * 2, 0
        if self.name == "repulsion":
            return sampler + 2, 0
        if self.name == "forward descent":
            return sampler + 4 * work, 0
        return sampler + 2 * work, 2 * work


OFF = 5
"""Calls with guidance off at τ = 900."""
NONE = Method("none")
METHODS = (
    NONE,
    Method("batch-wise", product(BATCH_WISE), late=True, time=1.03, memory=1.0, paper=(1.09, 1.0)),
    Method("per-sample", product(PER_SAMPLE, "max_steps"), 8, time=1.40, memory=1.35, paper=(1.51, 2.72)),
    Method(
        "per-sample, checkpointed",
        product(PER_SAMPLE, "max_steps"),
        8,
        mode=True,
        time=1.40,
        memory=1.35,
        paper=(1.51, 2.72),
    ),
    Method("repulsion", repulsion, prototype=True, time=1.005, memory=1.0),
    Method("forward descent", forward_descent, 4, prototype=True, time=1.20, memory=1.0),
)


@dataclass(frozen=True)
class Made:
    latents: Tensor
    noise: Tensor
    forward: list[int]
    """Rows counted, an image."""
    backward: list[int]
    outcome: Outcome | None


def first_delta(model: Model) -> simulator.FirstDelta:
    """Δ at DDIM's first timestep of the model's prompts, with rows counted and answers kept for the sampler."""
    batch = len(model.cond)
    count = torch.zeros(batch, dtype=torch.long)
    asked = cast(Any, model)
    network = simulator.Network(asked, model.cond, model.uncond, torch.arange(batch), count, count.clone(), {})
    return simulator.FirstDelta(network, "DDIM", STEPS)


def generate(model: Model, x: Tensor, method: Method, *, work: int | None = None, calls: int = CALLS) -> Made:
    """Adjust the noise and sample; the sampler stops after `calls` calls of the network."""
    delta = first_delta(model)
    adjusted, outcome = x, None
    if method.way is not None:
        with checkpointed(model.unet) if method.mode else contextlib.nullcontext():
            outcome = method.way(x, delta, BatchContext("eps"), method.work if work is None else work)
        adjusted = outcome.x
    starts = [make_start(BATCH_WISE.resolved("sd1"), 981.0) if method.late else Start() for _ in range(len(x))]
    guided = simulator.Guided(delta.network, starts)
    latents = follow(guided, adjusted, ddim_timesteps(STEPS)[: calls + 1])
    return Made(latents, adjusted, delta.network.forward.tolist(), delta.network.backward.tolist(), outcome)


def guided_calls(model: Model, x: Tensor, calls: int) -> None:
    """Calls of the sampler with guidance on, from where every method has it on."""
    guided = simulator.Guided(first_delta(model).network, [Start() for _ in range(len(x))])
    follow(guided, x, ddim_timesteps(STEPS)[6 : 6 + calls + 1])
