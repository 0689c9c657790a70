"""The trajectory of the noise as it was drawn, sampled for its trace alone."""

from __future__ import annotations

import copy
from typing import Any

from modules import rng, sd_samplers, shared
from torch import Tensor

from lib_memnoise.core.guidance import Start
from lib_memnoise.core.report import ImageReport
from lib_memnoise.sampling.delta_predictor import Predictor
from lib_memnoise.sampling.output_cache import Answers
from lib_memnoise.webui.backends.backend import network
from lib_memnoise.webui.failures import raise_if_interrupted
from lib_memnoise.webui.sampler_start import is_second


def trace_as_drawn(
    p: Any,
    x: Tensor,
    noise: Tensor,
    c: Any,
    uc: Any,
    *,
    predictor: Predictor,
    starts: list[Start],
    reference: str,
    empty: Any,
    reports: list[ImageReport],
) -> None:
    """Sample unadjusted noise with guidance held back as it will be for the adjusted one (Figures 3, 9, 10).

    A sampler and random generators of its own: the picture's sampling finds everything as it would be. It follows
    the checkpoint throughout, without a refiner. Its rows count as the image's.

    Args:
        x: the clean latent where a picture is sampled on, `(B, C, H, W)`; else the noise.
        noise: the noise as drawn, `(B, C, H, W)`.
        reports: take the trace (`drawn`) and the rows.

    Raises:
        Interrupted: the user asked to interrupt or skip.
    """
    images = [ImageReport() for _ in reports]
    own = copy.copy(p)
    own.refiner_checkpoint_info = None  # a switch would leave the refiner loaded for the picture
    drawn = p.rng
    own.rng = rng.ImageRNG(
        drawn.shape,
        drawn.seeds,
        subseeds=drawn.subseeds,
        subseed_strength=drawn.subseed_strength,
        seed_resize_from_h=drawn.seed_resize_from_h,
        seed_resize_from_w=drawn.seed_resize_from_w,
    )
    kept = getattr(rng, "nv_rng", None)
    own.rng.next()
    own.sampler = sd_samplers.create_sampler(p.sampler_name, p.sd_model)
    network().gate(
        own,
        own.sampler.model_wrap_cfg,
        reports=images,
        starts=starts,
        tracing=True,
        exact=False,
        reference=reference,
        empty=empty,
        expected_t=predictor.step.t,
        answers=Answers(),
        fail_instead=True,
    )
    shared.state.textinfo = "Memnoise: sampling the noise as drawn"
    try:
        with network().left_as_it_was():
            if is_second(p):
                own.sampler.sample_img2img(own, x, noise.clone(), c, uc, image_conditioning=predictor.image_cond)
            else:
                own.sampler.sample(own, noise.clone(), c, uc, image_conditioning=predictor.image_cond)
    finally:
        rng.nv_rng = kept
    raise_if_interrupted()
    for report, image in zip(reports, images):
        report.drawn = image.trace
        report.forward_rows += image.forward_rows
        report.looked_rows += image.forward_rows
