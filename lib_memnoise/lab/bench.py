"""Generation on the miniature, with its network rows counted: what the demo and the claims run.

The methods and the decision when guidance is on are the very code that the WebUI runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lib_memnoise.guidance import Start, make_start
from lib_memnoise.lab.samplers import SAMPLERS
from lib_memnoise.miniature.model import SHAPE, Miniature
from lib_memnoise.mitigations.outcome import Outcome, Scored, choose, run, run_some
from lib_memnoise.prediction import Delta, magnitude
from lib_memnoise.settings import Settings

CFG = 7.0
STEPS = 50
PRESETS = {"eps": "sd1", "v": "sd2_v"}
"""The settings' preset for each variant of the miniature, as the WebUI chooses it."""
PER_SAMPLE = Settings(enabled=True, method="per_sample", lr=0.02, target=0.25, target_kind="fraction")
"""Chosen on prompts that are not held out, on the weights before the last 2,000 steps: to half of the first ‖Δ‖ two
thirds of the pictures were still copies, to a quarter two fifths, at 1.11 times the usual length of the noise. The
paper's target, which is absolute, belongs to SD."""


@dataclass(frozen=True)
class Network:
    """The miniature under the prompts of a batch. One row is one image under one prompt at one timestep."""

    model: Miniature
    cond: Tensor
    """`(B, 77, width)`."""
    uncond: Tensor
    """`(1, 77, width)`: the empty prompt."""
    image: Tensor
    """`(B,)`: where each image's rows are counted."""
    forward: Tensor
    backward: Tensor
    answers: dict[int, tuple[Tensor, float, Tensor, Tensor]]
    """Of each image, the input, timestep and outputs of its smallest Δ: the sampler's first question."""

    def __call__(self, x: Tensor, t: float, conditional: bool, *, counted: bool = True) -> Tensor:
        """The native output under each image's prompt, or under the empty one."""
        if counted:
            self.forward[self.image] += 1
        context = self.cond if conditional else self.uncond.expand(len(x), -1, -1)
        return self.model(x, torch.full((len(x),), t), context)

    def delta(self, x: Tensor, t: float, *, counted: bool = True) -> tuple[Tensor, Tensor]:
        """Δ(x, t) and the unconditional output, by two rows an image; none where the answer is known."""
        new = [row for row in range(len(x)) if not self._is_known(row, x[row], t)]
        if len(new) < len(x):
            # As in the WebUI, only what differs is evaluated.
            outputs = {row: self.answers[int(self.image[row])][2:] for row in range(len(x)) if row not in new}
            if new:
                outputs |= dict(zip(new, zip(*self.of(new).delta(x[new], t, counted=counted))))
            delta, unconditional = (torch.stack(list(part)) for part in zip(*(outputs[row] for row in range(len(x)))))
            return delta, unconditional
        if counted:
            self.forward[self.image] += 2
        both = self.model(
            torch.cat([x, x]),
            torch.full((2 * len(x),), t),
            torch.cat([self.cond, self.uncond.expand(len(x), -1, -1)]),
        )
        conditional, unconditional = both.chunk(2)
        return conditional - unconditional, unconditional

    def _is_known(self, row: int, x: Tensor, t: float) -> bool:
        answer = self.answers.get(int(self.image[row]))
        return answer is not None and answer[1] == t and torch.equal(answer[0], x)

    def remember(self, x: Tensor, t: float, delta: Tensor, unconditional: Tensor) -> None:
        """Keep the answers, each if it is the image's smallest Δ so far."""
        for row, image in enumerate(self.image.tolist()):
            known = self.answers.get(image)
            if known is None or delta[row].norm() <= known[2].norm():
                self.answers[image] = x[row].detach(), t, delta[row].detach(), unconditional[row].detach()

    def of(self, images: list[int]) -> Network:
        return replace(self, cond=self.cond[images], image=self.image[images])

    def count_backward(self, gradient: Tensor) -> None:
        """Two rows for each image whose Δ was differentiated."""
        self.backward[self.image] += 2 * (magnitude(gradient) > 0)


def make_network(model: Miniature, captions: Sequence[str]) -> Network:
    """The network for a batch whose images have these captions, with its counts at zero."""
    count = torch.zeros(len(captions), dtype=torch.long)
    cond, uncond = model.encode(captions), model.encode([""])
    return Network(model, cond, uncond, torch.arange(len(captions)), count, count.clone(), {})


@dataclass(frozen=True)
class FirstDelta:
    """Δ(x, T) at a sampler's first timestep; a `lib_memnoise.prediction.SelectableDelta`."""

    network: Network
    sampler: str
    steps: int = STEPS
    counted: bool = True

    def __call__(self, x: Tensor) -> Tensor:
        x, t = SAMPLERS[self.sampler].first(x, self.steps)
        delta, unconditional = self.network.delta(x, t, counted=self.counted)
        if self.counted:
            self.network.remember(x, t, delta, unconditional)
        if self.counted and delta.requires_grad:
            delta.register_hook(self.network.count_backward)
        return delta

    def select(self, images: list[int]) -> Delta:
        return replace(self, network=self.network.of(images))


@dataclass
class Guided:
    """Classifier-free guidance held back image by image (Algorithm 1, second loop): the prediction a sampler follows.

    With `looking`, ‖Δ‖ is read at every step; rows evaluated for that alone are not counted.
    """

    network: Network
    starts: list[Start]
    """When guidance starts, for every image."""
    cfg: float = CFG
    looking: bool = False
    trace: list[tuple[float, Tensor]] = field(default_factory=list)
    """Timestep and ‖Δ‖ `(B,)` of every step looked at."""

    def __call__(self, x: Tensor, t: float) -> Tensor:
        images = range(len(self.starts))
        off = [i for i in images if self.starts[i].is_off(t)]
        unheard = [i for i in off if not self.starts[i].hears]
        heard = [i for i in images if i not in unheard]
        prediction, size = torch.empty_like(x), x.new_zeros(len(x))
        if heard:
            delta, unconditional = self._of(heard).delta(x[heard], t)
            size[heard] = magnitude(delta)
            guided = unconditional + self.cfg * delta
            for k, i in enumerate(heard):
                if i in off:
                    self.starts[i].observe(t, float(size[i]))
                if self.starts[i].is_off(t):
                    # ε_θ(x_t, t, y_null) − s · ε̃(x_t, t, y) (opposite guidance, Jain et al. 2025); s = 0: off.
                    prediction[i] = unconditional[k] - self.starts[i].opposite * delta[k]
                else:
                    prediction[i] = guided[k]
        if unheard:
            prediction[unheard] = self._of(unheard)(x[unheard], t, False)
            if self.looking:
                conditional = self._of(unheard)(x[unheard], t, True, counted=False)
                size[unheard] = magnitude(conditional - prediction[unheard])
        if self.looking:
            self.trace.append((t, size))
        return prediction

    def _of(self, images: list[int]) -> Network:
        return self.network if len(images) == len(self.starts) else self.network.of(images)


@dataclass(frozen=True)
class Generated:
    """Images of one batch. Everything but the latents and the trace is `(B,)`."""

    noise: Tensor
    """x̃_T."""
    latents: Tensor
    before: Tensor
    """‖Δ(x_T, T)‖."""
    after: Tensor
    """‖Δ(x̃_T, T)‖."""
    forward: Tensor
    backward: Tensor
    trace: list[tuple[float, Tensor]]
    outcome: Outcome | None


def noises(seeds: Sequence[int]) -> Tensor:
    """Initial latents `(B, 4, 16, 16)`, one generator a seed, as a WebUI with CPU noise draws them."""
    return torch.stack([torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def generate(
    model: Miniature,
    captions: Sequence[str],
    x: Tensor,
    settings: Settings,
    *,
    sampler: str = "DDIM",
    steps: int = STEPS,
    looking: bool = False,
) -> Generated:
    """Adjust the initial latents x `(B, 4, 16, 16)` as the settings say, and sample."""
    network = make_network(model, captions)
    look = FirstDelta(network, sampler, steps, counted=False)
    with torch.no_grad():
        before = magnitude(look(x))
    outcome, adjusted = None, x
    starts = [Start() for _ in captions]
    if settings.enabled:
        settings = settings.resolved(PRESETS[model.parameterization])
        delta = FirstDelta(network, sampler, steps)
        flagged = list(range(len(x)))

        def way(x: Tensor, delta: Delta) -> Outcome:
            return run(x, delta, settings, parameterization=model.parameterization)

        if settings.when == "flagged":
            choice = choose(x, delta, settings, parameterization=model.parameterization)
            flagged = choice.images
            outcome = run_some(flagged, x, Scored(delta, choice.known), way)
        else:
            outcome = way(x, delta)
        adjusted = outcome.x
        starts = [make_start(settings) if i in flagged else Start() for i in range(len(x))]
    guided = Guided(network, starts, looking=looking)
    latents = SAMPLERS[sampler].sample(guided, adjusted, steps, model.parameterization)
    with torch.no_grad():
        after = magnitude(look(adjusted))
    return Generated(adjusted, latents, before, after, network.forward, network.backward, guided.trace, outcome)
