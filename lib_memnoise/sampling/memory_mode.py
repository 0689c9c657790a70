"""How much memory a gradient takes: plain, with checkpoints, or one image after the other."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from enum import IntEnum

import torch
from torch import Tensor, nn

from lib_memnoise.core.delta import Delta
from lib_memnoise.methods.batch import BatchContext, Outcome
from lib_memnoise.methods.pipeline import run, run_each
from lib_memnoise.settings import ResolvedSettings
from lib_memnoise.torch_utils.checkpointing import checkpointed
from lib_memnoise.torch_utils.oom import is_out_of_memory


class MemoryMode(IntEnum):
    """Ways to compute the gradient, each with less memory than the one before."""

    PLAIN = 0
    CHECKPOINTED = 1
    """Blocks are evaluated again in the backward pass."""
    ONE_BY_ONE = 2
    """And the images of a batch one after the other."""


WORDS = {MemoryMode.CHECKPOINTED: "checkpointed", MemoryMode.ONE_BY_ONE: "checkpointed, one image at a time"}

KEPT = {MemoryMode.PLAIN: 85_000, MemoryMode.CHECKPOINTED: 20_000}
"""Numbers kept for the backward pass, for each row and each pixel of the latent, in a U-Net of SD 1.4's shape
(`benchmarks/gradient.py kept`; checkpointed: 6,500, and the block that is evaluated again). Others differ; where this
is too low, running out of memory is what tells."""


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


def first_attempt(unet: nn.Module, x: Tensor, rows: int, free: float) -> MemoryMode:
    """The fastest way whose estimated memory is there. x: the latents; rows: network rows evaluated at once."""
    # Weights may be kept in fewer bits than what is computed of them.
    size = max(2, next(unet.parameters()).element_size())
    pixels = x.shape[-1] * x.shape[-2]
    return next((mode for mode, kept in KEPT.items() if kept * size * rows * pixels < free), MemoryMode.ONE_BY_ONE)


def run_from(
    mode: MemoryMode,
    x: Tensor,
    delta: Delta,
    settings: ResolvedSettings,
    context: BatchContext,
    *,
    unet: nn.Module,
    empty: Callable[[], object],
    note: Callable[[str], object],
    check: Callable[[], object] | None = None,
) -> Outcome:
    """`run` in this mode; out of memory, it is tried again in one that takes less.

    Args:
        unet: the network behind Δ, whose blocks are checkpointed.
        empty: gives back memory that is not used, between attempts.
        note: is told of every attempt that there was too little memory for.
        check: is called before the first attempt, in the way of that attempt, until it has returned once.

    What an attempt evaluated stays counted. Raises what the leanest attempt raises.
    """
    last = MemoryMode.ONE_BY_ONE if x.shape[0] > 1 else MemoryMode.CHECKPOINTED
    mode = min(mode, last)
    while True:
        try:
            with checkpointed(unet) if mode else contextlib.nullcontext():
                if check is not None:
                    check()
                    check = None
                way = run_each if mode is MemoryMode.ONE_BY_ONE else run
                outcome = way(x, delta, settings, context)
            if mode:
                outcome.used["gradient"] = WORDS[mode].replace(" ", "_")
            return outcome
        except Exception as error:
            if mode == last or not is_out_of_memory(error):
                raise
        # Out here the failed attempt's tensors are gone.
        empty()
        mode = MemoryMode(mode + 1)
        note(f"out of memory; the noise was adjusted again, {WORDS[mode]}")
