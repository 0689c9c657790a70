"""Holds guidance back, image by image: until then the sampler is given the unconditional prediction alone.

And counts what the sampler evaluates, spares it what has been evaluated, and traces ‖Δ‖.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lib_memnoise.core.guidance import Start, transition_point
from lib_memnoise.core.report import ImageReport, TracePoint
from lib_memnoise.sampling.cond_rows import Cond, select_rows
from lib_memnoise.sampling.delta_predictor import follows_negative
from lib_memnoise.sampling.output_cache import Answers
from lib_memnoise.torch_utils.cross_attention import PLAIN, Row
from lib_memnoise.webui.backends.backend import network
from lib_memnoise.webui.conditioning import Hearing
from lib_memnoise.webui.failures import fails

GATE = "memnoise_gate"
"""Attribute of a denoiser: its gate."""


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


class Gate(abc.ABC):
    """Answers for the network during one pass.

    Rows of a step are numbered: the prompts of every image, then the unconditional ones. `begin_step` is told of
    them; a host's subclass hands every call of the network to `answer`, with the numbers of its rows. Rows with
    guidance on are passed through untouched. Of an image with guidance off, only the unconditional prediction is
    evaluated, once, and given for all of its rows; the host's own combination ε_u + w Σ w_k (ε_u − ε_u) is then ε_u
    exactly, also with AND, CFG++, unequal lengths and where the host itself leaves the unconditional rows out (NGMS).
    Where ‖Δ‖ decides, or is traced, or with opposite guidance, the image's prompts are evaluated beside it.
    """

    def __init__(
        self,
        p: Any,
        denoiser: Any,
        *,
        reports: list[ImageReport],
        starts: list[Start],
        tracing: bool,
        exact: bool,
        reference: str,
        empty: Callable[[], Cond],
        hearing: Hearing | None = None,
        expected_t: float,
        answers: Answers,
        fail_instead: bool,
        looks_at_first: bool = False,
    ) -> None:
        """`exact`: rows are evaluated in the host's own batches also beside images with guidance off.

        `looks_at_first`: ‖Δ‖ is read in the first step also if nothing is traced.
        """
        self.p = p
        self.reports = reports
        self.starts = starts
        self.tracing = tracing
        self.exact = exact
        self.reference = reference
        self.empty = empty
        self.hearing = hearing
        self.expected_t: float | None = expected_t
        self.answers = answers
        self.fail_instead = fail_instead
        self.looks_at_first = looks_at_first
        self.steps = 0
        self.inner: Any = None
        self.retired = False
        self.in_parts = False
        """Another extension asks for parts of rows, so that their native outputs are not known."""
        self.error: Exception | None = None
        self._clear()
        remove(denoiser)
        setattr(denoiser, GATE, self)  # where `on_cfg_denoiser` looks

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
        self._heard: list[Row] = []
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

    # What all have in common

    def begin_step(self, params: Any) -> None:
        """Called by the host before each evaluation (`on_cfg_denoiser`)."""
        denoiser = params.denoiser
        self.attach(denoiser)
        self._clear()
        self.steps += 1
        if self.steps > 1:
            self.answers.of_image.clear()
        if self.error is not None:
            return
        try:
            if self.hearing is not None:
                self._hear(self.hearing, denoiser, params)
            self._plan(denoiser, params)
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        """Go on with guidance as it would be without memnoise, and say so; or let `answer` fail the request."""
        self.error = error
        self._off, self._given, self._heard = set(), {}, []
        what = "guidance could not be held back" if self.hearing is None else "the prompt could not be changed"
        for report in self.reports:
            if not report.left_alone:
                report.failed = report.failed or f"{what}: {error}"

    def _hear(self, hearing: Hearing, denoiser: Any, params: Any) -> None:
        """Other conditions for this step. The host takes them from here; its own objects are not touched."""
        params.text_cond, params.text_uncond, heard = (
            hearing.text_cond(denoiser, params.text_cond),
            hearing.text_uncond(denoiser, params.text_uncond),
            hearing.rows(denoiser),
        )
        self._heard = heard if any(row != PLAIN for row in heard) else []

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
        if not step.known and (off or self._heard):
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
        padded = network().padded
        if follows_negative(self.p, self.reference) and params.text_uncond is not None:
            return padded(denoiser, params.text_cond, params.text_uncond)
        cond = (
            params.text_cond
            if params.text_uncond is None
            else padded(denoiser, params.text_cond, params.text_uncond)[0]
        )
        empty = self.empty()
        empty = select_rows(empty, [0] * batch) if self.hearing is None else self.hearing.empty(empty, batch)
        return cond, padded(denoiser, params.text_cond, empty)[1]

    def answer(self, rows: list[int], x: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        """What these rows of the step come to; `kwargs` are what the host gives the network beside."""
        step = self.step
        owners = [] if step is None else [step.owners[row] for row in rows if row < len(step.owners)]
        if self._off and (step is None or len(owners) != x.shape[0] or not torch.equal(x, step.latents[owners])):
            self._give_up(RuntimeError("another extension changed the batch"))
        if self.error is not None and self.fail_instead:
            fails(self.p, self.error)
            raise self.error
        images = sorted(self._off.intersection(owners).difference(self._decided))
        if images:
            self._decide(images, sigma)
        rest = [k for k, row in enumerate(rows) if row not in self._given]
        if len(rest) == len(rows):
            return self._ask(rows, x, sigma, kwargs)
        outputs = dict(self._given)
        if rest and self.exact:
            # The rows that are thrown away keep the others' batch as it would be.
            every = self._ask(rows, x, sigma, kwargs)
            outputs.update((rows[k], every[k]) for k in rest)
        elif rest:
            asked = self._ask([rows[k] for k in rest], x[rest], sigma[rest], self.select(kwargs, rest))
            outputs.update((rows[k], out) for k, out in zip(rest, asked))
        return torch.stack([outputs[row] for row in rows])

    def _reads(self) -> bool:
        """Whether ‖Δ‖ is wanted of this step's images."""
        return (self.tracing or (self.looks_at_first and self.steps == 1)) and not self.in_parts

    def _ask(self, rows: list[int], x: Tensor, sigma: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """The host's own network, for these of its rows."""
        out, native = self.evaluate(rows, x, sigma, kwargs)
        if self._reads() and self.step is not None and self.step.known:
            self._native.update(zip(rows, native))
            self._trace_guided()
        return out

    def heard_by(self, rows: list[int]) -> list[Row]:
        """How these rows are attended to; empty: as usual."""
        return [self._heard[row] if row < len(self._heard) else PLAIN for row in rows] if self._heard else []

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
        watched = [image for image in images if self._reads() or self.starts[image].hears]
        # Functions put into the network may count on the rows that the host has in a call, and on their order.
        beside = images if network().is_patched() else watched
        prompts = [row for image in beside for row in self._rows_of(image)[0]]
        if beside is watched:
            self._looked = {row for image in beside if not self.starts[image].hears for row in self._rows_of(image)[0]}
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
                self._record(image, value, guided, follows_negative(self.p, self.reference))
            if not guided:
                self._given[last] = out[k]
                s = start.opposite
                found = self.opposite(image, outs[at], out[k], s) if s else self.unguided(image, out[k])
                self._given.update(zip(own, found))
                continue
            self.reports[image].transition = transition_point(start.curve)
            self._off.discard(image)
            self._given.update(zip(own, outs[at]))
            if follows_negative(self.p, self.reference):
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
        if self.tracing:
            assert self.step is not None
            against = "negative" if negative and not follows_negative(self.p, "empty") else "empty"
            self.reports[image].trace.append(TracePoint(self.step.t, value, guided, against))


def remove(denoiser: Any) -> None:
    """Take the gate of an earlier pass off a denoiser that is used again."""
    gate: Gate | None = getattr(denoiser, GATE, None)
    if gate is not None:
        gate.detach()
        delattr(denoiser, GATE)
