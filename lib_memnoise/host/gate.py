"""Holds guidance back, image by image: until then the sampler is given the unconditional prediction alone.

And counts what the sampler evaluates, spares it what has been evaluated, and traces ‖Δ‖.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from modules import shared
from torch import Tensor

from lib_memnoise.attention import PLAIN, Row
from lib_memnoise.generation import ImageReport, TracePoint
from lib_memnoise.guidance import Start, transition_point
from lib_memnoise.host.handover import Answers, Handover
from lib_memnoise.host.hearing import Hearing
from lib_memnoise.host.predictor import (
    conditioning,
    follows_negative,
    joined,
    leaves_out_unconditional,
    pad_unconditional,
    tokens,
)
from lib_memnoise.host.refusals import fails
from lib_memnoise.host.rows import Cond, select_rows

GATE = "memnoise_gate"
"""Attribute of a denoiser: its gate."""


class Gate:
    """Sits on one sampler's network wrapper, which lives as long as one pass does: nothing to take off.

    The host's denoiser evaluates a list of rows at each of its steps, in one call or several: the prompts of
    every image, then the unconditional ones. `begin_step` notes which image each row belongs to; `forward`
    then answers for the network. Rows with guidance on are passed through untouched. Of an image with guidance
    off, only the unconditional prediction is evaluated, once, and given for all of its rows; the host's own
    combination ε_u + w Σ w_k (ε_u − ε_u) is then ε_u exactly, also with AND, CFG++, unequal lengths and where
    the host itself leaves the unconditional rows out (NGMS). Where ‖Δ‖ decides, or is traced, or with opposite
    guidance, the image's prompts are evaluated beside it.
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
    ) -> None:
        """`exact`: rows are evaluated in the host's own batches also beside images with guidance off."""
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
        self.steps = 0
        self.inner: Any = None
        self.error: Exception | None = None
        self._clear()
        self.install(denoiser)
        setattr(denoiser, GATE, self)  # where `on_cfg_denoiser` looks

    def _clear(self) -> None:
        """What belongs to one step of the host's denoiser."""
        self._t = 0.0
        self._weights: list[list[float]] = []
        """Of each image, those of its prompts."""
        self._owners: list[int] = []
        """The image of each row, in the host's order."""
        self._offset = 0
        self._off: set[int] = set()
        self._decided: set[int] = set()
        self._given: dict[int, Tensor] = {}
        """Outputs of rows that need not be asked for."""
        self._native: dict[int, Tensor] = {}
        self._scale: float | None = None
        """The CFG scale with which the host combines this step's rows; None where it leaves the unconditional out."""
        self._heard: list[Row] = []
        """How the prompts' rows are attended to; empty: as usual."""
        self._latents: Any = None
        self._image_cond: Any = None
        self._cond: Cond = None
        self._uncond: Cond = None

    def install(self, denoiser: Any) -> None:
        """Answer for this denoiser's network wrapper; it is a new one after a refiner switch."""
        self.inner = denoiser.inner_model
        self._forward = self.inner.forward
        self.inner.forward = self.forward
        self._handover = Handover(self.inner.inner_model, self.answers)
        # Beside the module of this name, which stays where it is.
        self.inner.__dict__["inner_model"] = self._handover

    def begin_step(self, params: Any) -> None:
        """Called by the host before each evaluation (`on_cfg_denoiser`)."""
        denoiser = params.denoiser
        if denoiser.inner_model is not self.inner:
            self.install(denoiser)
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
        """Go on with guidance as it would be without memnoise, and say so; or let `forward` fail the request."""
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
        self._weights = [[part.weight for part in parts] for parts in denoiser.sampler.sampler_extra_args["cond"].batch]
        batch = len(self._weights)
        self._owners = [i for i, weights in enumerate(self._weights) for _ in weights] + list(range(batch))
        self._t = t = timestep_of(denoiser, params.sigma)
        if self.expected_t is not None:
            if abs(t - self.expected_t) > 0.5:
                for report in self.reports:
                    report.note(f"the sampler started at t = {t:g}, the noise was adjusted for {self.expected_t:g}")
            self.expected_t = None
        off = {i for i in range(batch) if self.reports[i].failed is None and self.starts[i].is_off(t)}
        if params.x.shape[0] != len(self._owners):
            self._weights = []  # nothing is known of these rows
            if off or self._heard:
                raise RuntimeError("another extension changed the batch")
        if not off:
            return
        self._latents = params.x[-batch:]
        self._image_cond = params.image_cond
        self._cond, self._uncond = self._conditions(denoiser, params, batch)
        skipped = leaves_out_unconditional(self.p, float(params.sigma[0]), denoiser.step, denoiser.total_steps)
        self._scale = None if skipped else self._cfg_scale(denoiser)
        if self._scale == 0 and any(self.starts[i].opposite for i in off):
            raise RuntimeError("opposite guidance needs a CFG scale other than 0")
        self._off = off

    def _cfg_scale(self, denoiser: Any) -> float:
        return float(self.p.cfg_scale) * getattr(denoiser, "cond_scale_miltiplier", 1.0)

    def _conditions(self, denoiser: Any, params: Any, batch: int) -> tuple[Cond, Cond]:
        """The prompts as the host evaluates them, and what is followed while guidance is off."""
        cond, uncond = pad_unconditional(denoiser, params.text_cond, params.text_uncond)
        if not follows_negative(self.p, self.reference):
            empty = self.empty()
            empty = select_rows(empty, [0] * batch) if self.hearing is None else self.hearing.empty(empty, batch)
            uncond = pad_unconditional(denoiser, params.text_cond, empty)[1]
        return cond, uncond

    def forward(self, x: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        """The network wrapper's `forward`, for the next `len(x)` rows of the step."""
        rows = list(range(self._offset, self._offset + x.shape[0]))
        owners = self._owners[self._offset : self._offset + x.shape[0]]
        self._offset += x.shape[0]
        if self._off and (len(owners) != x.shape[0] or not torch.equal(x, self._latents[owners])):
            self._give_up(RuntimeError("another extension changed the batch"))
        if self.error is not None and self.fail_instead:
            fails(self.p, self.error)
            raise self.error
        images = sorted(self._off.intersection(owners).difference(self._decided))
        if images:
            self._decide(images, sigma)
        rest = [k for k, row in enumerate(rows) if row not in self._given]
        if len(rest) == len(rows):
            return self._ask(rows, x, sigma, **kwargs)
        outputs = dict(self._given)
        if rest and self.exact:
            # The rows that are thrown away keep the others' batch as it would be.
            every = self._ask(rows, x, sigma, **kwargs)
            outputs.update((rows[k], every[k]) for k in rest)
        elif rest:
            asked = self._ask([rows[k] for k in rest], x[rest], sigma[rest], **select_rows(kwargs, rest))
            outputs.update((rows[k], out) for k, out in zip(rest, asked))
        return torch.stack([outputs[row] for row in rows])

    def _ask(self, rows: list[int], x: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        """The host's own network wrapper, for these of its rows; those that the network sees are counted."""
        out = self._evaluate(rows, x, sigma, **kwargs)
        if self.tracing and self._weights:
            self._native.update(zip(rows, self._handover.native.detach()))
            self._trace_guided()
        return out

    def _evaluate(self, rows: list[int], x: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        if self._heard:
            self._handover.heard = [self._heard[row] if row < len(self._heard) else PLAIN for row in rows]
        try:
            out: Tensor = self._forward(x, sigma, **kwargs)
        finally:
            self._handover.heard = []
        for row, known in zip(rows, self._handover.known):
            if row < len(self._owners):
                self.reports[self._owners[row]].forward_rows += not known
        return out

    def _rows_of(self, image: int) -> tuple[list[int], int]:
        """The rows of an image's prompts, and its unconditional row."""
        first = sum(len(weights) for weights in self._weights[:image])
        unconditional = len(self._owners) - len(self._weights) + image
        return list(range(first, first + len(self._weights[image]))), unconditional

    def _magnitude(self, image: int, prompts: Sequence[Tensor], unconditional: Tensor) -> float:
        """‖Δ‖ of native outputs: Δ = Σ w_k (out_k − out_u)."""
        base = unconditional.float()
        delta = sum(weight * (out.float() - base) for weight, out in zip(self._weights[image], prompts))
        return float(torch.linalg.vector_norm(delta))  # type: ignore[arg-type]

    def _decide(self, images: list[int], sigma: Tensor) -> None:
        """Evaluate what images without guidance are given, and see whether it starts in this very step."""
        watched = [image for image in images if self.tracing or self.starts[image].hears]
        prompts = [row for image in watched for row in self._rows_of(image)[0]]
        others = [self._rows_of(image)[1] for image in images]
        unconditional = conditioning(
            select_rows(self._uncond, images),
            self._image_cond[others],
            unconditional=True,
        )
        conditional = (
            conditioning(select_rows(self._cond, prompts), self._image_cond[prompts], unconditional=False)
            if prompts
            else {}
        )

        def ask(rows: list[int], cond: dict[str, Any]) -> tuple[Tensor, Tensor]:
            latents = self._latents[[self._owners[row] for row in rows]]
            out = self._evaluate(rows, latents, sigma[:1].expand(len(rows)), cond=cond)
            return out, self._handover.native.detach()

        if prompts and tokens(self._cond) == tokens(self._uncond) and shared.opts.batch_cond_uncond:
            out, native = ask(prompts + others, joined(conditional, unconditional))
            outs, natives = out[: len(prompts)], native[: len(prompts)]
            out, native = out[len(prompts) :], native[len(prompts) :]
        else:
            if prompts:
                outs, natives = ask(prompts, conditional)
            out, native = ask(others, unconditional)

        for k, image in enumerate(images):
            start, (own, last) = self.starts[image], self._rows_of(image)
            self._decided.add(image)
            guided = False
            if image in watched:
                at = [prompts.index(row) for row in own]
                value = self._magnitude(image, natives[at], native[k])  # type: ignore[arg-type]
                start.observe(self._t, value)
                guided = not start.is_off(self._t)
                self._record(image, value, guided, follows_negative(self.p, self.reference))
            if not guided:
                self._given.update((row, out[k]) for row in [*own, last])
                if start.opposite:
                    self._given.update(zip(own, self._opposite(image, outs[at], out[k])))
                continue
            self.reports[image].transition = transition_point(start.curve)
            self._off.discard(image)
            self._given.update(zip(own, outs[at]))
            if follows_negative(self.p, self.reference):
                self._given[last] = out[k]

    def _opposite(self, image: int, prompts: Tensor, unconditional: Tensor) -> list[Tensor]:
        """What the rows of an image's prompts must be for the host to follow ε_u − s Σ w_k (ε_k − ε_u).

        Outputs may be denoised images as well as noise: these are linear in one another.
        """
        s, differences = self.starts[image].opposite, prompts - unconditional
        if self._scale is not None:  # the host has ε_u + w Σ w_k (row_k − ε_u)
            return list(unconditional - s / self._scale * differences)
        # Here the first row stands for the unconditional one, so that they must be what is wanted themselves.
        weights = differences.new_tensor(self._weights[image]).reshape(-1, 1, 1, 1)
        return [unconditional - s * (weights * differences).sum(0)] * len(prompts)

    def _trace_guided(self) -> None:
        """Trace the images all of whose rows have been evaluated; costs nothing."""
        for image in range(len(self._weights)):
            prompts, unconditional = self._rows_of(image)
            rows = [*prompts, unconditional]
            if image not in self._decided and all(row in self._native for row in rows):
                self._decided.add(image)
                value = self._magnitude(image, [self._native[row] for row in prompts], self._native[unconditional])
                self._record(image, value, True, True)

    def _record(self, image: int, value: float, guided: bool, negative: bool) -> None:
        if self.tracing:
            against = "negative" if negative and not follows_negative(self.p, "empty") else "empty"
            self.reports[image].trace.append(TracePoint(self._t, value, guided, against))


def timestep_of(denoiser: Any, sigma: Tensor) -> float:
    """The timestep (0…999) that the network receives for the denoiser's own sigma."""
    inner = denoiser.inner_model
    return float(inner.sigma_to_t(sigma[:1]) if hasattr(inner, "sigma_to_t") else sigma[0])
