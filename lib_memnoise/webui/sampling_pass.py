"""One sampling pass of a generation, with everything that belongs to it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from modules import prompt_parser
from torch import Tensor

from lib_memnoise.core.report import ImageReport
from lib_memnoise.methods.batch import BatchContext
from lib_memnoise.sampling.cond_rows import Cond, select_rows, token_length
from lib_memnoise.sampling.delta_predictor import DeltaPredictor
from lib_memnoise.sampling.output_cache import OutputCache
from lib_memnoise.webui import tokens
from lib_memnoise.webui.backends.base import WebuiBackend
from lib_memnoise.webui.checkpoint import checkpoint_preset
from lib_memnoise.webui.host_conditions import follows_negative, image_conditioning
from lib_memnoise.webui.sampler_start import cfg_scale


@dataclass(frozen=True)
class SamplingPass:
    """A pass as the host is about to sample it.

    A generation with hires fix has two passes, each with its own checkpoint, prompts, schedule and reports.
    """

    p: Any
    """The host's processing object."""
    x: Tensor
    """The clean latent where sampling starts from a picture, otherwise the noise, `(B, C, H, W)`."""
    noise: Tensor
    """The noise as drawn, `(B, C, H, W)`."""
    c: Any
    """The host's conditions of the prompts, for all steps and parts."""
    uc: Any
    """The conditions of the negative prompts; None in hosts that leave them out without guidance."""
    backend: WebuiBackend
    reports: list[ImageReport]
    empty: Callable[[], Cond]
    """Encodes the empty prompt."""
    reference: str = "empty"
    """What Δ is measured against: "empty" or "negative"."""

    @property
    def is_hires(self) -> bool:
        return bool(getattr(self.p, "is_hr_pass", False))

    @property
    def texts(self) -> list[str]:
        """The images' prompts."""
        return list(self.p.hr_prompts if self.is_hires else self.p.prompts)

    @functools.cached_property
    def preset(self) -> str:
        """The preset that "auto" stands for on the checkpoint of this pass."""
        return checkpoint_preset(self.backend)

    @property
    def cfg_scale(self) -> float:
        """The CFG scale of this pass."""
        return cfg_scale(self.p)

    @property
    def follows_negative(self) -> bool:
        """Whether Δ is measured against the host's own unconditional rows."""
        return follows_negative(self.p, self.reference)

    @property
    def negative_is_empty(self) -> bool:
        """Whether all negative prompts are empty."""
        return follows_negative(self.p, "empty")

    def predictor(self, *, as_host: bool = False) -> DeltaPredictor:
        """The Δ of the pass, under the conditions of its first step.

        Args:
            as_host: whether rows that the host will need are evaluated in its own calls, with its unconditional rows.
        """
        p, x, backend, denoiser = self.p, self.x, self.backend, self.p.sampler.model_wrap_cfg
        parts, given = prompt_parser.reconstruct_multicond_batch(self.c, 0)
        parts = backend.composition(parts)
        # A host may leave out the negative prompt where the CFG scale means no guidance.
        negative = None if self.uc is None else prompt_parser.reconstruct_cond_batch(self.uc, 0)
        same = self.follows_negative and negative is not None
        uncond = negative if same else select_rows(self.empty(), [0] * len(parts))
        cond, uncond = backend.padded(denoiser, given, uncond)
        host_uncond = None
        if as_host and negative is not None:
            host_cond, negative = backend.padded(denoiser, given, negative)
            if not same:
                cond, host_uncond = host_cond, negative
        step = backend.first_step(p, p.sampler, x)
        calls: tuple[tuple[int, int], ...] = ()
        if as_host and negative is not None:
            rows = sum(len(part) for part in parts)
            equal = token_length(cond) == token_length(negative)
            calls = backend.first_calls(p, rows, len(parts), equal=equal, sigma=step.sigma)
        image_cond = image_conditioning(p, x)
        backend.load(x)  # after everything is encoded, since a text encoder may displace the network
        return DeltaPredictor(
            backend=backend,
            step=step,
            parts=parts,
            cond=cond,
            uncond=uncond,
            image_cond=image_cond,
            length=token_length(given),
            reports=self.reports,
            images=list(range(len(parts))),
            cache=OutputCache(),
            host_uncond=host_uncond,
            calls=calls,
        )

    def context(self, predictor: DeltaPredictor) -> BatchContext:
        """What a method may use of the batch besides its noise and Δ."""
        t = predictor.step.t
        return BatchContext(
            self.backend.kind,
            first=t,
            alpha_bar=self.backend.alpha_bar(t),
            seeds=list(self.p.seeds),
            texts=self.texts,
            vocabulary=tokens.Vocabulary,
            tokens=lambda text: tokens.token_count(text, self.p.steps),
        )
