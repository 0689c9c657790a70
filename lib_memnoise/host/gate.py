"""Holds guidance back while t > τ: in those steps the sampler is given the unconditional prediction alone.

And counts what the sampler evaluates, and spares it what has been evaluated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lib_memnoise.generation import ImageReport
from lib_memnoise.guidance import guidance_off
from lib_memnoise.host.handover import Answers, Handover
from lib_memnoise.host.predictor import conditioning, follows_negative, pad_unconditional
from lib_memnoise.host.rows import Cond, select_rows


class Gate:
    """Sits on one sampler's network wrapper, which lives as long as one pass does: nothing to take off.

    The host's denoiser evaluates a list of rows at each of its steps, in one call or several: the prompts of
    every image, then the unconditional ones. `begin_step` notes which image each row belongs to; `forward`
    then answers for the network. Rows with guidance on are passed through untouched. Of an image with guidance
    off, only the unconditional prediction is evaluated, once, and given for all of its rows; the host's own
    combination ε_u + w Σ w_k (ε_u − ε_u) is then ε_u exactly, also with AND, CFG++, unequal lengths and where
    the host itself leaves the unconditional rows out (NGMS).
    """

    def __init__(
        self,
        p: Any,
        denoiser: Any,
        *,
        reports: list[ImageReport],
        tau: float | None,
        reference: str,
        empty: Callable[[], Cond],
        expected_t: float,
        answers: Answers,
        fail_instead: bool,
    ) -> None:
        self.p = p
        self.reports = reports
        self.tau = tau
        self.reference = reference
        self.empty = empty
        self.expected_t: float | None = expected_t
        self.answers = answers
        self.fail_instead = fail_instead
        self.steps = 0
        self.inner: Any = None
        self.error: Exception | None = None
        self._owners: list[int] = []
        self._offset = 0
        self._off: set[int] = set()
        self._latents: Any = None
        self._uncond: Cond = None
        self._image_uncond: Any = None
        self._outputs: dict[int, Tensor] = {}
        self.install(denoiser)

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
        self._owners, self._off, self._outputs, self._offset = [], set(), {}, 0
        self.steps += 1
        if self.steps > 1:
            self.answers.of_image.clear()
        if self.error is not None:
            return
        try:
            self._plan(denoiser, params)
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        """Go on with guidance as it would be without memnoise, and say so; or let `forward` fail the request."""
        self.error = error
        self._off = set()
        for report in self.reports:
            report.failed = report.failed or f"guidance could not be held back: {error}"

    def _plan(self, denoiser: Any, params: Any) -> None:
        repeats = [len(parts) for parts in denoiser.sampler.sampler_extra_args["cond"].batch]
        batch = len(repeats)
        self._owners = [i for i, n in enumerate(repeats) for _ in range(n)] + list(range(batch))
        t = timestep_of(denoiser, params.sigma)
        if self.expected_t is not None:
            if abs(t - self.expected_t) > 0.5:
                for report in self.reports:
                    report.note(f"the sampler started at t = {t:g}, the noise was adjusted for {self.expected_t:g}")
            self.expected_t = None
        if self.tau is None or not guidance_off(t, self.tau):
            return
        if params.x.shape[0] != len(self._owners):
            raise RuntimeError("another extension changed the batch")
        self._latents = params.x[-batch:]
        self._image_uncond = params.image_cond[-batch:]
        self._uncond = self._unconditional(denoiser, params, batch)
        self._off = {i for i in range(batch) if self.reports[i].failed is None}

    def _unconditional(self, denoiser: Any, params: Any, batch: int) -> Cond:
        if follows_negative(self.p, self.reference):
            uncond = params.text_uncond
        else:
            uncond = select_rows(self.empty(), [0] * batch)
        return pad_unconditional(denoiser, params.text_cond, uncond)[1]

    def forward(self, x: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        """The network wrapper's `forward`, for the next `len(x)` rows of the step."""
        owners = self._owners[self._offset : self._offset + x.shape[0]]
        self._offset += x.shape[0]
        if self._off and (len(owners) != x.shape[0] or not torch.equal(x, self._latents[owners])):
            self._give_up(RuntimeError("another extension changed the batch"))
        if self.error is not None and self.fail_instead:
            raise self.error
        self._evaluate_off(owners, sigma)
        if not self._off:
            return self._ask(owners, x, sigma, **kwargs)
        on = [row for row, image in enumerate(owners) if image not in self._off]
        guided = iter(self._ask([owners[row] for row in on], x[on], sigma[on], **select_rows(kwargs, on)) if on else ())
        return torch.stack([self._outputs[image] if image in self._off else next(guided) for image in owners])

    def _ask(self, images: list[int], x: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        """The host's own network wrapper, for rows of these images; those that the network sees are counted."""
        out: Tensor = self._forward(x, sigma, **kwargs)
        for image, known in zip(images, self._handover.known):
            self.reports[image].forward_rows += not known
        return out

    def _evaluate_off(self, owners: list[int], sigma: Tensor) -> None:
        images = sorted(self._off.intersection(owners).difference(self._outputs))
        if not images:
            return
        cond = conditioning(select_rows(self._uncond, images), self._image_uncond[images], unconditional=True)
        rows = [owners.index(image) for image in images]
        out = self._ask(images, self._latents[images], sigma[rows], cond=cond)
        self._outputs.update(zip(images, out))


def timestep_of(denoiser: Any, sigma: Tensor) -> float:
    """The timestep (0…999) that the network receives for the denoiser's own sigma."""
    inner = denoiser.inner_model
    return float(inner.sigma_to_t(sigma[:1]) if hasattr(inner, "sigma_to_t") else sigma[0])
