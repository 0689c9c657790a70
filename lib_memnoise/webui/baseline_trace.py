"""Samples the noise as drawn, only to trace ‖Δ‖ along its trajectory."""

from __future__ import annotations

import copy

from modules import rng, sd_samplers, shared

from lib_memnoise.core.guidance import Start
from lib_memnoise.core.report import ImageReport
from lib_memnoise.sampling.delta_predictor import DeltaPredictor
from lib_memnoise.sampling.guider import GuidancePlan
from lib_memnoise.sampling.output_cache import OutputCache
from lib_memnoise.webui import session
from lib_memnoise.webui.failures import fails, raise_if_interrupted
from lib_memnoise.webui.sampler_start import is_second
from lib_memnoise.webui.sampling_pass import SamplingPass


def trace_baseline(current: SamplingPass, predictor: DeltaPredictor, starts: list[Start]) -> None:
    """Sample the unadjusted noise, with guidance held back as it will be for the adjusted noise (Figures 3, 9, 10).

    It has a sampler and random generators of its own, so that the picture's own sampling is not affected. It uses the
    pass's checkpoint throughout, without a refiner. Its network rows count as the image's.

    Args:
        current: the pass; its reports receive the trace (`baseline`) and the rows.
        predictor: the Δ of the pass's first step.
        starts: when guidance starts, for every image.

    Raises:
        Interrupted: the user asked to interrupt or skip.
    """
    p, backend, reports = current.p, current.backend, current.reports
    images, noise = [ImageReport() for _ in reports], current.noise.clone()
    baseline = copy.copy(p)
    baseline.refiner_checkpoint_info = None  # a switch would leave the refiner loaded for the picture
    host_rng = p.rng
    baseline.rng = rng.ImageRNG(
        host_rng.shape,
        host_rng.seeds,
        subseeds=host_rng.subseeds,
        subseed_strength=host_rng.subseed_strength,
        seed_resize_from_h=host_rng.seed_resize_from_h,
        seed_resize_from_w=host_rng.seed_resize_from_w,
    )
    kept = getattr(rng, "nv_rng", None)
    baseline.rng.next()
    baseline.sampler = sd_samplers.create_sampler(p.sampler_name, p.sd_model)
    plan = GuidancePlan(
        reports=images,
        starts=starts,
        tracing=True,
        follows_negative=current.follows_negative,
        negative_is_empty=current.negative_is_empty,
        empty=current.empty,
        expected_t=predictor.step.t,
        cache=OutputCache(),
        fail=lambda error: fails(baseline, error),
        fail_instead=True,
    )
    denoiser = baseline.sampler.model_wrap_cfg
    session.put_guider(denoiser, backend.guider(baseline, denoiser, plan))
    shared.state.textinfo = "Memnoise: sampling the noise as drawn"
    try:
        with backend.left_as_it_was():
            picture = {"image_conditioning": predictor.image_cond}
            if is_second(p):
                baseline.sampler.sample_img2img(baseline, current.x, noise, current.c, current.uc, **picture)
            else:
                baseline.sampler.sample(baseline, noise, current.c, current.uc, **picture)
    finally:
        rng.nv_rng = kept
    raise_if_interrupted()
    for report, image in zip(reports, images):
        report.baseline = image.trace
        report.forward_rows += image.forward_rows
        report.looked_rows += image.forward_rows
