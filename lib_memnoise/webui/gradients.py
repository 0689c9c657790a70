"""Gradients through the host's network with respect to the noise, within the free memory."""

from __future__ import annotations

from functools import partial

import torch
from modules import devices
from torch import Tensor

from lib_memnoise.core.delta import magnitude, per_image
from lib_memnoise.core.report import note_all
from lib_memnoise.errors import Unsupported
from lib_memnoise.methods.batch import BatchContext, Outcome
from lib_memnoise.methods.descent import NoGradient, gradients
from lib_memnoise.sampling.delta_predictor import DeltaPredictor
from lib_memnoise.sampling.memory_mode import first_attempt, free_memory, run_from
from lib_memnoise.settings import ResolvedSettings
from lib_memnoise.torch_utils.oom import is_out_of_memory

GRADIENT_TOLERANCE = 0.05
"""The relative difference allowed between a difference quotient and the gradient's length; in the tests it is 0.1 %."""


def run_in_memory(x: Tensor, delta: DeltaPredictor, settings: ResolvedSettings, context: BatchContext) -> Outcome:
    """`run` in the fastest mode that memory allows; if memory runs out, it is tried again in the next mode.

    Rows that a failed attempt evaluated stay counted. Raises whatever the last mode's attempt raises, and `Unsupported`
    where another extension's functions have a wrong gradient.
    """
    backend = delta.backend
    with backend.gradients():
        x, delta = x.clone(), delta.cloned()
        return run_from(
            first_attempt(backend.unet, x, delta.rows, free_memory(x.device)),
            x,
            delta,
            settings,
            context,
            unet=backend.unet,
            empty=devices.torch_gc,
            note=partial(note_all, delta.reports),
            check=(lambda: raise_if_wrong(x, delta)) if backend.is_doubtful() else None,
        )


def raise_if_wrong(x: Tensor, delta: DeltaPredictor) -> None:
    """Compare the gradient of ‖Δ‖ with a finite difference along it, of a hundredth of the noise's length each way.

    Raises:
        Unsupported: the two differ, or differentiation fails.
        NoGradient: the network can be evaluated but not differentiated.
    """
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        try:
            (gradient,) = gradients(magnitude(delta(leaf)), [leaf])
        except NoGradient:
            raise
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            # In-place operations, for instance.
            reason = str(error).split(":")[0]
            raise Unsupported(f"another extension's functions in the network have no gradient: {reason}") from error
    steep = magnitude(gradient)
    h = magnitude(x) / 100
    way = gradient * per_image(h / steep.clamp_min(1e-30))
    with torch.no_grad():
        slope = (magnitude(delta(x + way)) - magnitude(delta(x - way))) / (2 * h)
    if not torch.allclose(slope, steep, rtol=GRADIENT_TOLERANCE, atol=0):
        worst = int((slope / steep - 1).abs().argmax())
        raise Unsupported(
            "another extension's functions in the network give a wrong gradient: "
            f"{float(steep[worst]):.3g} where the difference quotient is {float(slope[worst]):.3g}"
        )
