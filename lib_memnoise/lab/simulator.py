"""Generation on the miniature, with its network rows counted: what the demo and the claims run.

The methods and the decision when guidance is on are the very code that the WebUI runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lib_memnoise.core.delta import magnitude
from lib_memnoise.core.guidance import Start
from lib_memnoise.core.report import ImageReport
from lib_memnoise.core.schedule import alpha_bar
from lib_memnoise.lab.miniature.architecture import SHAPE
from lib_memnoise.lab.miniature.text import END, UNKNOWN, token_ids, vocabulary, words
from lib_memnoise.lab.samplers import SAMPLERS
from lib_memnoise.methods.batch import BatchContext, Outcome, Prompt
from lib_memnoise.methods.pipeline import mitigate
from lib_memnoise.settings import Settings
from lib_memnoise.torch_utils.cross_attention import PLAIN, Row, scaled

if TYPE_CHECKING:
    from lib_memnoise.lab.miniature.model import Miniature

CFG = 7.0
STEPS = 50
PRESETS = {"eps": "sd1_like", "v": "sd2_v_like"}
"""The settings' preset for each variant of the miniature, as the WebUI chooses it."""
PER_SAMPLE = Settings(enabled=True, method="per_sample", lr=0.02, target=0.25, target_kind="fraction")
"""Chosen on prompts that are not held out, on the weights before the last 4,000 steps: to half of the first ‖Δ‖ two
thirds of the pictures were still copies of the prompt's own, to a quarter two fifths, at 1.11 times the usual length of
the noise. The paper's target, which is absolute, belongs to SD."""


@dataclass(frozen=True)
class Network:
    """The miniature under the prompts of a batch. One row is one image under one prompt at one timestep."""

    model: Miniature
    cond: Tensor
    """`(B, 77, width)`."""
    uncond: Tensor
    """`(B, 77, width)`: the empty prompt."""
    image: Tensor
    """`(B,)`: where each image's rows are counted."""
    forward: Tensor
    backward: Tensor
    answers: dict[int, tuple[Tensor, float, Tensor, Tensor, float]]
    """Of each image, the input, timestep and outputs of its smallest Δ, and ‖Δ‖: the sampler's first question."""
    attention: tuple[Row, ...] | None = None
    """How each image's prompt is attended to; None: as usual."""

    def __call__(self, x: Tensor, t: float, conditional: bool, *, counted: bool = True) -> Tensor:
        """The native output under each image's prompt, or under the empty one."""
        if counted:
            self.forward[self.image] += 1
        context, attention = (self.cond, self.attention) if conditional else (self.uncond, None)
        return self._evaluate(x, t, context, attention)

    def delta(self, x: Tensor, t: float, *, counted: bool = True) -> tuple[Tensor, Tensor]:
        """Δ(x, t) and the unconditional output, by two rows an image; none where the answer is known."""
        # A gradient cannot be had of what is known.
        known = [] if x.requires_grad else self._known(x, t)
        new = [row for row in range(len(x)) if row not in known]
        if len(new) < len(x):
            # As in the WebUI, only what differs is evaluated.
            outputs = {row: self.answers[int(self.image[row])][2:4] for row in known}
            if new:
                outputs |= dict(zip(new, zip(*self.of(new).delta(x[new], t, counted=counted))))
            delta, unconditional = (torch.stack(list(part)) for part in zip(*(outputs[row] for row in range(len(x)))))
            return delta, unconditional
        if counted:
            self.forward[self.image] += 2
        attention = None if self.attention is None else (*self.attention, *([PLAIN] * len(x)))
        both = self._evaluate(torch.cat([x, x]), t, torch.cat([self.cond, self.uncond]), attention)
        conditional, unconditional = both.chunk(2)
        return conditional - unconditional, unconditional

    def _evaluate(self, x: Tensor, t: float, context: Tensor, attention: Sequence[Row] | None) -> Tensor:
        with contextlib.nullcontext() if attention is None else scaled(self.model.unet, attention):
            return self.model(x, torch.full((len(x),), t, device=x.device), context)

    def _known(self, x: Tensor, t: float) -> list[int]:
        """The rows whose answers are at hand: of the same input, to the bit."""
        answers = {row: self.answers.get(image) for row, image in enumerate(self.image.tolist())}
        asked = {row: answer[0] for row, answer in answers.items() if answer is not None and answer[1] == t}
        # Compared at once: a GPU is waited for once.
        same = [(x[row] == before).all() for row, before in asked.items()]
        return [row for row, yes in zip(asked, torch.stack(same).tolist() if same else []) if yes]

    def remember(self, x: Tensor, t: float, delta: Tensor, unconditional: Tensor) -> None:
        """Keep the answers, each if it is the image's smallest Δ so far."""
        sizes = magnitude(delta.detach()).tolist()
        for row, (image, size) in enumerate(zip(self.image.tolist(), sizes)):
            if image not in self.answers or size <= self.answers[image][4]:
                self.answers[image] = x[row].detach(), t, delta[row].detach(), unconditional[row].detach(), size

    def of(self, images: list[int]) -> Network:
        if images == list(range(len(self.image))):
            return self
        attention = None if self.attention is None else tuple(self.attention[i] for i in images)
        return replace(
            self, cond=self.cond[images], uncond=self.uncond[images], image=self.image[images], attention=attention
        )

    def conditioned(self, captions: Sequence[str], prompts: Mapping[int, Prompt]) -> Network:
        """The network with other prompts for these images; what was known of them is dropped."""
        if not prompts:
            return self
        cond, uncond = self.cond.clone(), self.uncond.clone()
        attention = [PLAIN] * len(captions)
        for i, prompt in prompts.items():
            if prompt.vectors is not None:
                cond[i] = prompt.vectors[0]  # the answers are to these
                continue
            cond[i] = self._vectors(captions[i], prompt)
            self.answers.pop(int(self.image[i]), None)
            if prompt.pad_zero:
                uncond[i] = self._vectors("", replace(prompt, text=None, zero_end=False))
            if prompt.attention is not None:
                used = len(words(prompt.text or captions[i])) + 2
                kept = tuple(range(used)) if prompt.attention.mask_padding else None
                attention[i] = Row(prompt.attention.scale, (0,), kept)
        attended = any(row != PLAIN for row in attention)
        return replace(self, cond=cond, uncond=uncond, attention=tuple(attention) if attended else None)

    def _vectors(self, caption: str, prompt: Prompt) -> Tensor:
        ids = token_ids([caption if prompt.text is None else prompt.text])
        end = int((ids[0] == END).nonzero()[0])
        if prompt.pad_zero:
            ids[0, end + 1 :] = UNKNOWN  # token 0 is none that the miniature knows
        with torch.no_grad():
            vectors = self.model.text(ids.to(self.cond.device))[0]
        if prompt.zero_end:
            vectors[end] = 0
        return vectors

    def count_backward(self, gradient: Tensor, rows: int = 2) -> None:
        """Rows for each image whose Δ was differentiated."""
        self.backward[self.image] += rows * (magnitude(gradient) > 0).cpu()


def make_network(model: Miniature, captions: Sequence[str]) -> Network:
    """The network for a batch whose images have these captions, with its counts at zero."""
    count = torch.zeros(len(captions), dtype=torch.long)
    cond, uncond = model.encode(captions), model.encode([""]).expand(len(captions), -1, -1)
    return Network(model, cond, uncond, torch.arange(len(captions)), count, count.clone(), {})


def _part(x: Tensor, images: Sequence[int]) -> Tensor:
    """These images of a batch; an index that comes from Python makes a GPU wait."""
    return x if len(images) == len(x) else x[list(images)]


@dataclass(frozen=True)
class FirstDelta:
    """Δ(x, T) at a sampler's first timestep; a `lib_memnoise.core.delta.SelectableDelta`."""

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

    def select(self, images: list[int]) -> FirstDelta:
        return replace(self, network=self.network.of(images))

    @property
    def vectors(self) -> list[Tensor]:
        return list(self.network.cond[:, None])

    @property
    def fixed(self) -> list[int]:
        return [0]

    def conditioned(self, x: Tensor) -> Callable[[list[Tensor], list[int]], Tensor]:
        """See `lib_memnoise.core.delta.PromptedDelta`."""
        x, t = SAMPLERS[self.sampler].first(x, self.steps)
        known: list[Tensor] = []

        def delta(vectors: list[Tensor], images: list[int]) -> Tensor:
            network = replace(self.network.of(images), cond=torch.cat(vectors))
            if not known:
                with torch.no_grad():
                    known.append(self.network(x, t, False))
            unconditional = known[0][images]
            found = network(x[images], t, True) - unconditional
            network.remember(x[images], t, found, unconditional)
            if found.requires_grad:
                found.register_hook(lambda gradient: network.count_backward(gradient, rows=1))
            return found

        return delta


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
        unconditional_only = [i for i in off if not self.starts[i].evaluates_prompt]
        evaluated = [i for i in images if i not in unconditional_only]
        predictions, sizes = list(x), list(x.new_zeros(len(x)))
        if evaluated:
            delta, unconditional = self._of(evaluated).delta(_part(x, evaluated), t)
            size, guided = magnitude(delta), unconditional + self.cfg * delta
            for k, i in enumerate(evaluated):
                predictions[i], sizes[i] = guided[k], size[k]
                if i in off:
                    self.starts[i].observe(t, float(size[k]))
                if self.starts[i].is_off(t):
                    # ε_θ(x_t, t, y_null) − s · ε̃(x_t, t, y) (opposite guidance, Jain et al. 2025); s = 0: off.
                    predictions[i] = unconditional[k] - self.starts[i].opposite * delta[k]
        if unconditional_only:
            found = self._of(unconditional_only)(_part(x, unconditional_only), t, False)
            if self.looking:
                conditional = self._of(unconditional_only)(_part(x, unconditional_only), t, True, counted=False)
                size = magnitude(conditional - found)
            for k, i in enumerate(unconditional_only):
                predictions[i] = found[k]
                sizes[i] = size[k] if self.looking else sizes[i]
        if self.looking:
            self.trace.append((t, torch.stack(sizes)))
        return torch.stack(predictions)

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
    seeds: Sequence[int] = (),
    sampler: str = "DDIM",
    steps: int = STEPS,
    cfg: float = CFG,
    looking: bool = False,
) -> Generated:
    """Mitigate the initial latents x `(B, 4, 16, 16)` as the settings say, and sample.

    `seeds`, of each image, are what a method draws from; without, their places.
    """
    network = make_network(model, captions)
    look = FirstDelta(network, sampler, steps, counted=False)
    with torch.no_grad():
        before = magnitude(look(x))
    outcome, adjusted = None, x
    starts = [Start() for _ in captions]
    if settings.enabled:
        _, first = SAMPLERS[sampler].first(x, steps)
        context = BatchContext(
            model.parameterization,
            first=first,
            alpha_bar=alpha_bar(round(first)),
            seeds=list(seeds) or list(range(len(x))),
            texts=captions,
            vocabulary=lambda: [word for word in vocabulary() if word.isalpha()],
        )
        mitigated = mitigate(
            x,
            FirstDelta(network, sampler, steps),
            settings.resolved(PRESETS[model.parameterization]),
            context,
            # As in the WebUI, an image whose prompt is empty is left alone.
            reports=[ImageReport(left_alone=not caption.strip()) for caption in captions],
        )
        outcome, starts = mitigated.outcome, mitigated.starts
        adjusted, network = outcome.x, network.conditioned(captions, outcome.prompts)
    guided = Guided(network, starts, cfg, looking)
    latents = SAMPLERS[sampler].sample(guided, adjusted, steps, model.parameterization)
    with torch.no_grad():
        # of the prompt as it was evaluated
        after = magnitude(replace(look, network=network)(adjusted))
    return Generated(adjusted, latents, before, after, network.forward, network.backward, guided.trace, outcome)
