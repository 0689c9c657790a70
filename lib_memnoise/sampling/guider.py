"""Holds guidance back, image by image: until then the sampler is given the unconditional prediction alone.

And counts what the sampler evaluates, spares it what has been evaluated, and traces ‖Δ‖.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lib_memnoise.core.guidance import Start, transition_point
from lib_memnoise.core.report import ImageReport, TracePoint
from lib_memnoise.sampling.backend import Backend
from lib_memnoise.sampling.cond_rows import Cond, select_rows
from lib_memnoise.sampling.output_cache import OutputCache
from lib_memnoise.torch_utils.cross_attention import PLAIN, Row


@dataclass(frozen=True)
class Step:
    """One step of the host's denoiser, as the host is about to evaluate it."""

    t: float
    """The timestep that the network receives."""
    weights: list[list[float]]
    """Of each image, those of its prompt's parts."""
    known: bool
    """The batch is what the host makes of these prompts."""
    latents: Tensor
    """Of each image."""
    scale: float | None
    """The CFG scale with which the host combines the rows; None where it leaves the unconditional ones out."""

    @property
    def owners(self) -> list[int]:
        """The image of each row: those of the prompts, then the unconditional ones."""
        return [i for i, own in enumerate(self.weights) for _ in own] + list(range(len(self.weights)))


class Override(Protocol):
    """Other conditions than the host's own, for every step of a pass."""

    def text_cond(self, denoiser: Any, cond: Cond) -> Cond:
        """The prompts' rows of a step."""

    def text_uncond(self, denoiser: Any, uncond: Cond) -> Cond:
        """The unconditional rows of a step."""

    def empty(self, empty: Cond, batch: int) -> Cond:
        """The empty prompt's row for every image, from its one row."""

    def rows(self, denoiser: Any) -> list[Row]:
        """How the prompts' rows of a step are attended to."""


@dataclass(frozen=True, kw_only=True)
class GuidancePlan:
    """What one pass is to do with guidance, and what it is to note."""

    reports: list[ImageReport]
    starts: list[Start]
    """When guidance starts, for each image."""
    tracing: bool = False
    """‖Δ‖ of every step is noted."""
    exact: bool = False
    """Rows are evaluated in the host's own batches, also together with images whose guidance is off."""
    follows_negative: bool
    """While guidance is off the host's own unconditional rows are followed, not those of the empty prompt."""
    negative_is_empty: bool
    """The host's unconditional rows are those of the empty prompt."""
    empty: Callable[[], Cond]
    override: Override | None = None
    expected_t: float
    """The timestep that the noise was adjusted for."""
    cache: OutputCache
    fail: Callable[[Exception], object]
    """Told of a failure before it is raised."""
    fail_instead: bool
    """A failure fails the request; else the images come with guidance as it would be, and say so."""
    looks_at_first: bool = False
    """‖Δ‖ of the first step is noted even if nothing is traced."""


class Guider(abc.ABC):
    """Answers for the network during one pass.

    Rows of a step are numbered: the prompts of every image, then the unconditional ones. `begin_step` is told of
    them; a host's subclass hands every call of the network to `outputs_of`, with the numbers of its rows. Rows with
    guidance on are passed through untouched. Of an image with guidance off, only the unconditional prediction is
    evaluated, once, and given for all of its rows; the host's own combination ε_u + w Σ w_k (ε_u − ε_u) is then ε_u
    exactly, also with AND, CFG++, unequal lengths and where the host itself leaves the unconditional rows out (NGMS).
    Where ‖Δ‖ decides, or is traced, or with opposite guidance, the image's prompts are evaluated beside it.
    """

    def __init__(self, backend: Backend, plan: GuidancePlan) -> None:
        self.backend = backend
        self.plan = plan
        self.reports = plan.reports
        self.starts = plan.starts
        self.expected_t: float | None = plan.expected_t
        self.cache = plan.cache
        self.steps = 0
        self.inner: Any = None
        self.retired = False
        self.in_parts = False
        """Another extension asks for parts of rows, so that their native outputs are not known."""
        self.error: Exception | None = None
        self._clear()

    def _clear(self) -> None:
        """What belongs to one step of the host's denoiser."""
        self.step: Step | None = None
        """None: nothing is known of the step's rows."""
        self._off: set[int] = set()
        self._decided: set[int] = set()
        self._given: dict[int, Tensor] = {}
        """Outputs of rows that need not be asked for."""
        self._native: dict[int, Tensor] = {}
        self._looked: set[int] = set()
        """Rows that are asked for only for the sake of ‖Δ‖."""
        self._attention: list[Row] = []
        """How the prompts' rows are attended to; empty: as usual."""
        self.cond: Cond = None
        self.uncond: Cond = None

    # What is a host's own

    @abc.abstractmethod
    def attach(self, denoiser: Any) -> None:
        """Answer for what this denoiser asks; called at every step, for it may ask another network than before."""

    @abc.abstractmethod
    def detach(self) -> None:
        """Answer no longer."""

    @abc.abstractmethod
    def step_of(self, denoiser: Any, params: Any) -> Step:
        """What the host is about to evaluate."""

    @abc.abstractmethod
    def evaluate(self, rows: list[int], x: Tensor, sigma: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Ask for these rows. Returns outputs, and the same as native outputs (up to what rows of an image share)."""

    @abc.abstractmethod
    def conditions(self, text: Cond, rows: list[int], *, unconditional: bool) -> dict[str, Any]:
        """What `evaluate` takes for these rows under other texts than the host's."""

    @abc.abstractmethod
    def join(self, first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any] | None:
        """What `evaluate` takes for the rows of both at once; None: that cannot be."""

    @abc.abstractmethod
    def select(self, kwargs: dict[str, Any], rows: list[int]) -> dict[str, Any]:
        """What `evaluate` takes for some of a call's rows."""

    def unguided(self, image: int, unconditional: Tensor) -> list[Tensor]:
        """What the rows of an image's prompts must be for the host to follow ε_u."""
        assert self.step is not None
        return [unconditional] * len(self.step.weights[image])

    @abc.abstractmethod
    def opposite(self, image: int, prompts: Tensor, unconditional: Tensor, s: float) -> list[Tensor]:
        """What the rows of an image's prompts must be for the host to follow ε_u − s Σ w_k (ε_k − ε_u).

        Outputs may be denoised images as well as noise: these are linear in one another.
        """

    def padded(self, denoiser: Any, cond: Cond, uncond: Cond) -> tuple[Cond, Cond]:
        """Both conditions, of equal lengths where this host evaluates them so."""
        return cond, uncond

    # What all have in common

    def begin_step(self, params: Any) -> None:
        """Called by the host before each evaluation (`on_cfg_denoiser`)."""
        denoiser = params.denoiser
        self.attach(denoiser)
        self._clear()
        self.steps += 1
        if self.steps > 1:
            self.cache.of_image.clear()
        if self.error is not None:
            return
        try:
            if self.plan.override is not None:
                self._hear(self.plan.override, denoiser, params)
            self._plan(denoiser, params)
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        """Go on with guidance as it would be without memnoise, and say so; or let `outputs_of` fail the request."""
        self.error = error
        self._off, self._given, self._attention = set(), {}, []
        what = "guidance could not be held back" if self.plan.override is None else "the prompt could not be changed"
        for report in self.reports:
            if not report.left_alone:
                report.failed = report.failed or f"{what}: {error}"

    def _hear(self, override: Override, denoiser: Any, params: Any) -> None:
        """Other conditions for this step. The host takes them from here; its own objects are not touched."""
        params.text_cond, params.text_uncond, attention = (
            override.text_cond(denoiser, params.text_cond),
            override.text_uncond(denoiser, params.text_uncond),
            override.rows(denoiser),
        )
        self._attention = attention if any(row != PLAIN for row in attention) else []

    def _plan(self, denoiser: Any, params: Any) -> None:
        step = self.step_of(denoiser, params)
        if self.expected_t is not None:
            if abs(step.t - self.expected_t) > 0.5:
                for report in self.reports:
                    report.note(
                        f"the sampler started at t = {step.t:g}, the noise was adjusted for {self.expected_t:g}"
                    )
            self.expected_t = None
        images = range(len(step.weights))
        off = {i for i in images if self.reports[i].failed is None and self.starts[i].is_off(step.t)}
        self.step = step
        if not step.known and (off or self._attention):
            raise RuntimeError("another extension changed the batch")
        if not off:
            return
        self.cond, self.uncond = self._conditions(denoiser, params, len(step.weights))
        if self.in_parts and any(self.starts[i].at_transition for i in off):
            raise RuntimeError(
                "another extension evaluates the network in its own way, and there is no curve to follow"
            )
        if step.scale == 0 and any(self.starts[i].opposite for i in off):
            raise RuntimeError("opposite guidance needs a CFG scale other than 0")
        self._off = off

    def _conditions(self, denoiser: Any, params: Any, batch: int) -> tuple[Cond, Cond]:
        """The prompts as the host evaluates them, and what is followed while guidance is off."""
        if self.plan.follows_negative and params.text_uncond is not None:
            return self.padded(denoiser, params.text_cond, params.text_uncond)
        cond = (
            params.text_cond
            if params.text_uncond is None
            else self.padded(denoiser, params.text_cond, params.text_uncond)[0]
        )
        empty = self.plan.empty()
        empty = (
            select_rows(empty, [0] * batch) if self.plan.override is None else self.plan.override.empty(empty, batch)
        )
        return cond, self.padded(denoiser, params.text_cond, empty)[1]

    def outputs_of(self, rows: list[int], x: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        """What these rows of the step come to; `kwargs` are what the host gives the network beside."""
        step = self.step
        owners = [] if step is None else [step.owners[row] for row in rows if row < len(step.owners)]
        if self._off and (step is None or len(owners) != x.shape[0] or not torch.equal(x, step.latents[owners])):
            self._give_up(RuntimeError("another extension changed the batch"))
        if self.error is not None and self.plan.fail_instead:
            self.plan.fail(self.error)
            raise self.error
        images = sorted(self._off.intersection(owners).difference(self._decided))
        if images:
            self._decide(images, sigma)
        rest = [k for k, row in enumerate(rows) if row not in self._given]
        if len(rest) == len(rows):
            return self._evaluate_and_trace(rows, x, sigma, kwargs)
        outputs = dict(self._given)
        if rest and self.plan.exact:
            # The rows that are thrown away keep the others' batch as it would be.
            every = self._evaluate_and_trace(rows, x, sigma, kwargs)
            outputs.update((rows[k], every[k]) for k in rest)
        elif rest:
            fresh = self._evaluate_and_trace([rows[k] for k in rest], x[rest], sigma[rest], self.select(kwargs, rest))
            outputs.update((rows[k], out) for k, out in zip(rest, fresh))
        return torch.stack([outputs[row] for row in rows])

    def _reads(self) -> bool:
        """Whether ‖Δ‖ is wanted of this step's images."""
        return (self.plan.tracing or (self.plan.looks_at_first and self.steps == 1)) and not self.in_parts

    def _evaluate_and_trace(self, rows: list[int], x: Tensor, sigma: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """The host's own network, for these of its rows."""
        out, native = self.evaluate(rows, x, sigma, kwargs)
        if self._reads() and self.step is not None and self.step.known:
            self._native.update(zip(rows, native))
            self._trace_guided()
        return out

    def attention_of(self, rows: list[int]) -> list[Row]:
        """How these rows are attended to; empty: as usual."""
        return (
            [self._attention[row] if row < len(self._attention) else PLAIN for row in rows] if self._attention else []
        )

    def count(self, rows: list[int], known: Sequence[bool]) -> None:
        """Count the rows that the network sees."""
        if self.step is None:
            return
        owners = self.step.owners
        for row, spared in zip(rows, known):
            if row < len(owners):
                self.reports[owners[row]].forward_rows += not spared
                self.reports[owners[row]].looked_rows += row in self._looked and not spared

    def _rows_of(self, image: int) -> tuple[list[int], int]:
        """The rows of an image's prompts, and its unconditional row."""
        assert self.step is not None
        weights = self.step.weights
        first = sum(len(own) for own in weights[:image])
        return list(range(first, first + len(weights[image]))), len(self.step.owners) - len(weights) + image

    def _magnitude(self, image: int, prompts: Sequence[Tensor], unconditional: Tensor) -> float:
        """‖Δ‖ of native outputs: Δ = Σ w_k (out_k − out_u)."""
        assert self.step is not None
        base = unconditional.float()
        delta = sum(weight * (out.float() - base) for weight, out in zip(self.step.weights[image], prompts))
        return float(torch.linalg.vector_norm(delta))  # type: ignore[arg-type]

    def _decide(self, images: list[int], sigma: Tensor) -> None:
        """Evaluate what images without guidance are given, and see whether it starts in this very step."""
        step = self.step
        assert step is not None
        watched = [image for image in images if self._reads() or self.starts[image].evaluates_prompt]
        # Functions put into the network may count on the rows that the host has in a call, and on their order.
        beside = images if self.backend.is_patched() else watched
        prompts = [row for image in beside for row in self._rows_of(image)[0]]
        if beside is watched:
            self._looked = {
                row for image in beside if not self.starts[image].evaluates_prompt for row in self._rows_of(image)[0]
            }
        others = [self._rows_of(image)[1] for image in images]
        unconditional = self.conditions(select_rows(self.uncond, images), others, unconditional=True)
        conditional = self.conditions(select_rows(self.cond, prompts), prompts, unconditional=False) if prompts else {}

        def ask(rows: list[int], given: dict[str, Any]) -> tuple[Tensor, Tensor]:
            latents = step.latents[[step.owners[row] for row in rows]]
            return self.evaluate(rows, latents, sigma[:1].expand(len(rows)), given)

        both = self.join(conditional, unconditional) if prompts else None
        if both is not None:
            out, native = ask(prompts + others, both)
            outs, natives = out[: len(prompts)], native[: len(prompts)]
            out, native = out[len(prompts) :], native[len(prompts) :]
        else:
            if prompts:
                outs, natives = ask(prompts, conditional)
            out, native = ask(others, unconditional)
        self._looked = set()  # what is asked for from here on, the host asks for

        for k, image in enumerate(images):
            start, (own, last) = self.starts[image], self._rows_of(image)
            self._decided.add(image)
            guided = False
            at = [prompts.index(row) for row in own] if image in beside else []
            if image in watched and not self.in_parts:
                value = self._magnitude(image, natives[at], native[k])  # type: ignore[arg-type]
                start.observe(step.t, value)
                guided = not start.is_off(step.t)
                self._record(image, value, guided, self.plan.follows_negative)
            if not guided:
                self._given[last] = out[k]
                s = start.opposite
                prompt_rows = self.opposite(image, outs[at], out[k], s) if s else self.unguided(image, out[k])
                self._given.update(zip(own, prompt_rows))
                continue
            self.reports[image].transition = transition_point(start.curve)
            self._off.discard(image)
            self._given.update(zip(own, outs[at]))
            if self.plan.follows_negative:
                self._given[last] = out[k]

    def _trace_guided(self) -> None:
        """Trace the images all of whose rows have been evaluated; costs nothing."""
        assert self.step is not None
        for image in range(len(self.step.weights)):
            prompts, unconditional = self._rows_of(image)
            rows = [*prompts, unconditional]
            if image not in self._decided and all(row in self._native for row in rows):
                self._decided.add(image)
                value = self._magnitude(image, [self._native[row] for row in prompts], self._native[unconditional])
                self._record(image, value, True, True)

    def _record(self, image: int, value: float, guided: bool, negative: bool) -> None:
        if self.steps == 1:
            self.reports[image].sampled = value
        if self.plan.tracing:
            assert self.step is not None
            against = "negative" if negative and not self.plan.negative_is_empty else "empty"
            self.reports[image].trace.append(TracePoint(self.step.t, value, guided, against))
