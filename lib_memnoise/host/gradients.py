"""Gradients with respect to the noise in the host's network: nothing else gets one, and as lean as memory asks for."""

from __future__ import annotations

import contextlib
from enum import IntEnum

import torch
from modules import devices
from torch import Tensor

from lib_memnoise.checkpointing import checkpointed
from lib_memnoise.host.network import network
from lib_memnoise.host.predictor import Predictor
from lib_memnoise.host.refusals import Unsupported
from lib_memnoise.memory import is_out_of_memory
from lib_memnoise.mitigations.descent import NoGradient, gradients
from lib_memnoise.mitigations.outcome import Initial, Outcome, run, run_each
from lib_memnoise.prediction import magnitude, per_image
from lib_memnoise.settings import Settings


class Lean(IntEnum):
    """Ways to compute the gradient, each with less memory than the one before."""

    PLAIN = 0
    CHECKPOINTED = 1
    """Blocks are evaluated again in the backward pass."""
    ONE_BY_ONE = 2
    """And the images of a batch one after the other."""


WORDS = {Lean.CHECKPOINTED: "checkpointed", Lean.ONE_BY_ONE: "checkpointed, one image at a time"}

KEPT = {Lean.PLAIN: 85_000, Lean.CHECKPOINTED: 20_000}
"""Numbers kept for the backward pass, for each row and each pixel of the latent, in a U-Net of SD 1.4's shape
(`benchmarks/gradient.py kept`; checkpointed: 6,500, and the block that is evaluated again). Others differ; where this
is too low, running out of memory is what tells."""

GRADIENT_TOLERANCE = 0.05
"""How far a difference quotient may be from the gradient's length; with the tests' checkpoints they are 0.1 % apart."""


def free_memory(device: torch.device) -> float:
    """Bytes that can still be had; infinite where there is no telling."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return float(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    if device.type == "cpu":
        with contextlib.suppress(ImportError):  # the host has it
            import psutil

            return float(psutil.virtual_memory().available)
    return float("inf")


def first_attempt(x: Tensor, rows: int, free: float) -> Lean:
    """The fastest way whose estimated memory is there. x: the latents; rows: network rows evaluated at once."""
    # Weights may be kept in fewer bits than what is computed of them.
    size = max(2, next(network().unet.parameters()).element_size())
    pixels = x.shape[-1] * x.shape[-2]
    return next((lean for lean, kept in KEPT.items() if kept * size * rows * pixels < free), Lean.ONE_BY_ONE)


def run_leanly(x: Tensor, delta: Predictor, settings: Settings, initial: Initial) -> Outcome:
    """`run` in the fastest way that memory allows; out of memory, it is tried again in a leaner one.

    What an attempt evaluated stays counted. Raises what the leanest attempt raises.
    """
    with network().gradients():
        return _run_leanly(x.clone(), delta.cloned(), settings, initial)


def raise_if_wrong(x: Tensor, delta: Predictor) -> None:
    """Compare the gradient of ‖Δ‖ with a finite difference along it, a hundredth of the noise's length each way.

    Raises:
        Unsupported: they differ, or there is no gradient.
        NoGradient: it can only be evaluated.
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
            # Operations in place, for instance.
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


def _run_leanly(x: Tensor, delta: Predictor, settings: Settings, initial: Initial) -> Outcome:
    lean = first_attempt(x, delta.rows, free_memory(x.device))
    last = Lean.ONE_BY_ONE if x.shape[0] > 1 else Lean.CHECKPOINTED
    lean = min(lean, last)
    doubted = network().is_doubtful()
    while True:
        try:
            with checkpointed(network().unet) if lean else contextlib.nullcontext():
                if doubted:
                    raise_if_wrong(x, delta)
                    doubted = False
                way = run_each if lean is Lean.ONE_BY_ONE else run
                outcome = way(x, delta, settings, initial)
            if lean:
                outcome.used["gradient"] = WORDS[lean].replace(" ", "_")
            return outcome
        except Exception as error:
            if lean == last or not is_out_of_memory(error):
                raise
        # Out here the failed attempt's tensors are gone.
        devices.torch_gc()
        lean = Lean(lean + 1)
        for report in delta.reports:
            report.note(f"out of memory; the noise was adjusted again, {WORDS[lean]}")
