"""Holds guidance back, image by image: until it starts, the sampler gets the unconditional prediction alone.

The guider also counts the rows that the sampler evaluates, spares it rows that are cached, and traces ‖Δ‖.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lib_memnoise.core.guidance import Start, transition_point
from lib_memnoise.core.report import ImageReport, TracePoint, note_all
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
    """For each image, the weights of its prompt's parts."""
    known: bool
    """Whether the batch has the rows that the host makes of these prompts, unchanged by other extensions."""
    latents: Tensor
    """The images' latents, `(B, C, H, W)`."""
    scale: float | None
    """The CFG scale with which the host combines the rows; None where it leaves out the unconditional ones."""

    @property
    def owners(self) -> list[int]:
        """The image that each row belongs to: the prompts' rows first, then the unconditional rows."""
        return [i for i, weights in enumerate(self.weights) for _ in weights] + list(range(len(self.weights)))


class Override(Protocol):
    """Conditions that replace the host's own in every step of a pass."""

    def text_cond(self, denoiser: Any, cond: Cond) -> Cond:
        """The prompts' rows of a step."""

    def text_uncond(self, denoiser: Any, uncond: Cond) -> Cond:
        """The unconditional rows of a step."""

    def empty(self, empty: Cond, batch: int) -> Cond:
        """The empty prompt's rows, one for each of `batch` images, made from its single row."""

    def rows(self, denoiser: Any) -> list[Row]:
        """How the prompts' rows of a step are attended to."""


@dataclass(frozen=True, kw_only=True)
class GuidancePlan:
    """How guidance is handled in one pass, and what is recorded of it."""

    reports: list[ImageReport]
    starts: list[Start]
    """When guidance starts, for each image."""
    tracing: bool = False
    """Whether ‖Δ‖ of every step is recorded."""
    exact: bool = False
    """Whether rows are evaluated in the host's own batches even where the outputs of some are thrown away."""
    follows_negative: bool
    """Whether the host's own unconditional rows are followed while guidance is off, not those of the empty prompt."""
    negative_is_empty: bool
    """Whether the host's unconditional rows are those of the empty prompt."""
    empty: Callable[[], Cond]
    """Encodes the empty prompt."""
    override: Override | None = None
    expected_t: float
    """The timestep that the noise was adjusted for."""
    cache: OutputCache
    fail: Callable[[Exception], object]
    """Called with a failure before it is raised."""
    fail_instead: bool
    """Whether a failure fails the request; otherwise the images are made with ordinary guidance, and say so."""
    looks_at_first: bool = False
    """Whether ‖Δ‖ of the first step is recorded even if nothing is traced."""


class Guider(abc.ABC):
    """Stands in for the network during one pass.

    The rows of a step are numbered: first the prompts of every image, then the unconditional rows. The host announces
    each step to `begin_step`; its subclass hands every call of the network to `outputs_of`, with the numbers of its
    rows. Rows with guidance on pass through untouched. For an image with guidance off, only the unconditional
    prediction is evaluated, once, and stands for all of the image's rows. The host's own combination
    ε_u + w Σ w_k (ε_u − ε_u) is then exactly ε_u; this holds with AND, CFG++ and unequal lengths as well, and where the
    host leaves out the unconditional rows (NGMS). Where ‖Δ‖ decides or is traced, and with opposite guidance, the
    image's prompts are evaluated besides.
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
        """Whether another extension evaluates parts of rows, so that their native outputs are not known."""
        self.error: Exception | None = None
        self._clear()

    def _clear(self) -> None:
        """Forget the last step of the host's denoiser."""
        self.step: Step | None = None
        """None while nothing is known of the step's rows."""
        self._off: set[int] = set()
        self._decided: set[int] = set()
        self._given: dict[int, Tensor] = {}
        """Outputs of rows that the host's network need not evaluate."""
        self._native: dict[int, Tensor] = {}
        self._looked: set[int] = set()
        """Rows that are evaluated only to measure ‖Δ‖."""
        self._attention: list[Row] = []
        """How the prompts' rows are attended to; empty means as usual."""
        self.cond: Cond = None
        self.uncond: Cond = None

    # For each host to implement

    @abc.abstractmethod
    def attach(self, denoiser: Any) -> None:
        """Stand in for the network of this denoiser. Called at every step, since the network may have changed."""

    @abc.abstractmethod
    def detach(self) -> None:
        """Stop standing in for the network."""

    @abc.abstractmethod
    def step_of(self, denoiser: Any, params: Any) -> Step:
        """The step that the host is about to evaluate."""

    @abc.abstractmethod
    def evaluate(self, rows: list[int], x: Tensor, sigma: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Evaluate these rows. Returns the outputs, and native outputs up to a term that an image's rows share.

        Args:
            rows: their numbers in the step.
            x, sigma: latents `(rows, C, H, W)` and time `(rows,)`, in the host's units.
            kwargs: the host's other inputs for these rows (`conditions`, `select`).
        """

    @abc.abstractmethod
    def conditions(self, text: Cond, rows: list[int], *, unconditional: bool) -> dict[str, Any]:
        """The `kwargs` of `evaluate` for these rows, with `text` in place of the host's conditions."""

    @abc.abstractmethod
    def join(self, first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any] | None:
        """The `kwargs` of `evaluate` for the rows of both; None where they cannot be evaluated in one call."""

    @abc.abstractmethod
    def select(self, kwargs: dict[str, Any], rows: list[int]) -> dict[str, Any]:
        """The `kwargs` of `evaluate` for some of a call's rows."""

    def unguided(self, image: int, unconditional: Tensor) -> list[Tensor]:
        """Outputs for the rows of an image's prompts that make the host follow ε_u."""
        assert self.step is not None
        return [unconditional] * len(self.step.weights[image])

    @abc.abstractmethod
    def opposite(self, image: int, prompts: Tensor, unconditional: Tensor, s: float) -> list[Tensor]:
        """Outputs for the rows of an image's prompts that make the host follow ε_u − s Σ w_k (ε_k − ε_u).

        Outputs may be denoised images as well as noise, since each is linear in the other.
        """

    # Common to all hosts

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
                self._override_conditions(self.plan.override, denoiser, params)
            self._plan(denoiser, params)
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        """Go on with ordinary guidance and say so in the reports, or let `outputs_of` fail the request."""
        self.error = error
        self._off, self._given, self._attention = set(), {}, []
        what = "guidance could not be held back" if self.plan.override is None else "the prompt could not be changed"
        for report in self.reports:
            if not report.left_alone:
                report.failed = report.failed or f"{what}: {error}"

    def _override_conditions(self, override: Override, denoiser: Any, params: Any) -> None:
        """Replace the conditions of this step. The host reads them from `params`; its own objects are not changed."""
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
                note_all(
                    self.reports,
                    f"the sampler started at t = {step.t:g}, the noise was adjusted for {self.expected_t:g}",
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
        """The prompts' conditions as the host evaluates them, and those that are followed while guidance is off."""
        padded = self.backend.padded
        if self.plan.follows_negative and params.text_uncond is not None:
            return padded(denoiser, params.text_cond, params.text_uncond)
        cond = (
            params.text_cond
            if params.text_uncond is None
            else padded(denoiser, params.text_cond, params.text_uncond)[0]
        )
        empty = self.plan.empty()
        empty = (
            select_rows(empty, [0] * batch) if self.plan.override is None else self.plan.override.empty(empty, batch)
        )
        return cond, padded(denoiser, params.text_cond, empty)[1]

    def outputs_of(self, rows: list[int], x: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        """The outputs for these rows of the step.

        Args:
            rows: their numbers in the step.
            x, sigma: latents `(rows, C, H, W)` and time `(rows,)`, in the host's units.
            kwargs: the host's other inputs of the network.

        Raises:
            RuntimeError: guidance could not be held back, and the request asked to fail in that case.
        """
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
            # Outputs that are thrown away are evaluated all the same, so that the others' batch stays the host's.
            every = self._evaluate_and_trace(rows, x, sigma, kwargs)
            outputs.update((rows[k], every[k]) for k in rest)
        elif rest:
            fresh = self._evaluate_and_trace([rows[k] for k in rest], x[rest], sigma[rest], self.select(kwargs, rest))
            outputs.update((rows[k], out) for k, out in zip(rest, fresh))
        return torch.stack([outputs[row] for row in rows])

    def _reads(self) -> bool:
        """Whether ‖Δ‖ of this step's images is to be recorded."""
        return (self.plan.tracing or (self.plan.looks_at_first and self.steps == 1)) and not self.in_parts

    def _evaluate_and_trace(self, rows: list[int], x: Tensor, sigma: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Evaluate these rows with the host's own network, and trace the images that are complete."""
        out, native = self.evaluate(rows, x, sigma, kwargs)
        if self._reads() and self.step is not None and self.step.known:
            self._native.update(zip(rows, native))
            self._trace_guided()
        return out

    def attention_of(self, rows: list[int]) -> list[Row]:
        """How these rows are attended to; empty means as usual."""
        return (
            [self._attention[row] if row < len(self._attention) else PLAIN for row in rows] if self._attention else []
        )

    def count(self, rows: list[int], known: Sequence[bool]) -> None:
        """Count the rows that the network evaluates, leaving out those that were `known`."""
        if self.step is None:
            return
        owners = self.step.owners
        for row, spared in zip(rows, known):
            if row < len(owners):
                self.reports[owners[row]].forward_rows += not spared
                self.reports[owners[row]].looked_rows += row in self._looked and not spared

    def _rows_of(self, image: int) -> tuple[list[int], int]:
        """The numbers of an image's prompts' rows, and that of its unconditional row."""
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
        """Evaluate the images whose guidance is off, and decide whether it starts in this very step."""
        step = self.step
        assert step is not None
        watched = [image for image in images if self._reads() or self.starts[image].evaluates_prompt]
        # Functions put into the network may rely on the rows that the host has in a call, and on their order.
        prompted = images if self.backend.is_patched() else watched
        prompts = [row for image in prompted for row in self._rows_of(image)[0]]
        if prompted is watched:
            self._looked = {
                row for image in prompted if not self.starts[image].evaluates_prompt for row in self._rows_of(image)[0]
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
        self._looked = set()  # from here on, rows are evaluated because the host asks for them

        for k, image in enumerate(images):
            start, (prompt_numbers, uncond_number) = self.starts[image], self._rows_of(image)
            self._decided.add(image)
            guided = False
            at = [prompts.index(row) for row in prompt_numbers] if image in prompted else []
            if image in watched and not self.in_parts:
                value = self._magnitude(image, natives[at], native[k])  # type: ignore[arg-type]
                start.observe(step.t, value)
                guided = not start.is_off(step.t)
                self._record(image, value, guided, self.plan.follows_negative)
            if not guided:
                self._given[uncond_number] = out[k]
                s = start.opposite
                prompt_rows = self.opposite(image, outs[at], out[k], s) if s else self.unguided(image, out[k])
                self._given.update(zip(prompt_numbers, prompt_rows))
                continue
            self.reports[image].transition = transition_point(start.curve)
            self._off.discard(image)
            self._given.update(zip(prompt_numbers, outs[at]))
            if self.plan.follows_negative:
                self._given[uncond_number] = out[k]

    def _trace_guided(self) -> None:
        """Record ‖Δ‖ of images whose rows have all been evaluated. Evaluates nothing."""
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
