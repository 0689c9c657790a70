"""Δ, computed with the network that a host is about to sample with, at the sampler's own first timestep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lib_memnoise.core.delta import magnitude, per_image
from lib_memnoise.core.report import ImageReport
from lib_memnoise.sampling import cond_rows
from lib_memnoise.sampling.backend import Backend, DeltaQuery
from lib_memnoise.sampling.cond_rows import CHUNK, cloned, detached, select_rows, token_length
from lib_memnoise.sampling.output_cache import CachedRow, OutputCache


@dataclass(frozen=True, kw_only=True)
class DeltaPredictor(DeltaQuery):
    """Δ(x, T) of a batch of unit-variance latents `(B, C, H, W)`, in the network's native output (ε or v).

    Where a prompt has parts k of weight w_k (AND), Δ = Σ w_k (out(x, T, y_k) − out(x, T, y_null)), which is the
    direction that guidance would follow. `select` gives the Δ of some of the images.
    """

    backend: Backend
    reports: list[ImageReport]
    cache: OutputCache
    """Receives the outputs that the sampler may need again."""
    length: int = 0
    """Tokens of the prompts, before they are padded to the negative prompt's length."""

    @property
    def rows(self) -> int:
        """The number of network rows in one evaluation."""
        return sum(len(part) + 1 for part in self.parts)

    def select(self, images: list[int]) -> DeltaPredictor:
        """The predictor of some images of the batch."""
        return replace(
            self,
            parts=[self.parts[i] for i in images],
            uncond=select_rows(self.uncond, images),
            image_cond=self.image_cond[images],
            reports=[self.reports[i] for i in images],
            images=[self.images[i] for i in images],
            host_uncond=None,
            calls=(),
            step=self.step.select(images),
        )

    def cloned(self) -> DeltaPredictor:
        """A copy that shares no tensors with this one: those made in inference mode cannot take part in a gradient."""
        return replace(
            self,
            step=self.step.cloned(),
            cond=cloned(self.cond),
            uncond=cloned(self.uncond),
            image_cond=self.image_cond.clone(),
            host_uncond=cloned(self.host_uncond),
        )

    def __call__(self, x: Tensor) -> Tensor:
        self.backend.raise_if_interrupted()
        images = range(x.shape[0])
        owners = [i for i in images for _ in self.parts[i]]
        cond = select_rows(self.cond, [row for part in self.parts for row, _ in part])
        inputs = self.step.network_input(x)

        evaluated = self.backend.evaluate(self, inputs, owners, cond)
        (_, of_prompts), (_, of_nothing) = evaluated[:2]
        out_cond, out_uncond = of_prompts.float(), of_nothing.float()

        delta = torch.zeros_like(out_uncond)
        weights = [weight for part in self.parts for _, weight in part]
        differences = (out_cond - out_uncond[owners]) * per_image(out_uncond.new_tensor(weights))
        delta = delta.index_add(0, torch.tensor(owners, device=delta.device), differences)
        delta = self.backend.native(delta, self.step.at)

        value = magnitude(delta.detach()).tolist()
        kept = self._keep(value, inputs, owners, evaluated)
        for report, measured, rows in zip(self.reports, value, kept):
            report.forward_rows += len(rows) - (self.unconditional is not None)
            report.before = measured if report.before is None else report.before
        if delta.requires_grad:
            delta.register_hook(self._count_backward)
        return delta

    @property
    def vectors(self) -> list[Tensor]:
        """See `lib_memnoise.core.delta.PromptedDelta`."""
        every = cond_rows.vectors(self.cond)
        return [every[[row for row, _ in part]] for part in self.parts]

    @property
    def fixed(self) -> list[int]:
        """The places of the start tokens, one for each chunk, and of the padding to the negative prompt's length."""
        return [place for place in range(token_length(self.cond)) if place % CHUNK == 0 or place >= self.length]

    def conditioned(self, x: Tensor) -> Callable[[list[Tensor], list[int]], Tensor]:
        """See `lib_memnoise.core.delta.PromptedDelta`."""
        known: list[Tensor] = []

        def delta(vectors: list[Tensor], images: list[int]) -> Tensor:
            part = self.select(images)
            rows = [row for own in part.parts for row, _ in own]
            # Rows of the condition are now in the order of the images.
            weights, parts, next_row = [[weight for _, weight in own] for own in part.parts], [], 0
            for own in weights:
                parts.append([(next_row + k, weight) for k, weight in enumerate(own)])
                next_row += len(own)
            learnt = torch.cat(vectors).to(cond_rows.vectors(self.cond).dtype)
            part = replace(part, parts=parts, cond=cond_rows.with_vectors(select_rows(self.cond, rows), learnt))
            if not known:
                with torch.no_grad():
                    known.append(self._unconditional(x))
            return replace(part, unconditional=known[0][images])(x[images])

        return delta

    def _unconditional(self, x: Tensor) -> Tensor:
        for report in self.reports:
            report.forward_rows += 1
        return self.backend.unconditional(self, self.step.network_input(x))

    def _keep(
        self, value: list[float], inputs: Tensor, owners: list[int], evaluated: list[tuple[dict[str, Any], Tensor]]
    ) -> list[list[CachedRow]]:
        """Put the outputs into the cache. Returns the rows that were evaluated for each image."""
        self.cache.state = self.backend.state()
        t = self.step.at[0]
        rows: list[list[CachedRow]] = [[] for _ in value]
        for k, (cond, out) in enumerate(evaluated):
            for row, image in enumerate(range(len(value)) if k else owners):
                condition = detached(select_rows(cond, [row]))
                rows[image].append(CachedRow(inputs[image].detach(), t, condition, out[row].detach()))
        for image, measured, kept in zip(self.images, value, rows):
            self.cache.keep(image, measured, kept)
        return rows

    def _count_backward(self, gradient: Tensor) -> None:
        self.backend.raise_if_interrupted()
        for report, part, norm in zip(self.reports, self.parts, magnitude(gradient).tolist()):
            if norm:
                report.backward_rows += len(part) + (self.unconditional is None)
