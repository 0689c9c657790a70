"""Modes of computing a gradient that trade time for memory: plain, checkpointed, one image at a time."""

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
    """Ways to compute a gradient, each with less memory than the one before."""

    PLAIN = 0
    CHECKPOINTED = 1
    """Blocks are evaluated again in the backward pass."""
    ONE_BY_ONE = 2
    """Checkpointed, and with the images of a batch one after another."""


WORDS = {MemoryMode.CHECKPOINTED: "checkpointed", MemoryMode.ONE_BY_ONE: "checkpointed, one image at a time"}

KEPT = {MemoryMode.PLAIN: 85_000, MemoryMode.CHECKPOINTED: 20_000}
"""Numbers kept for the backward pass for each row and each pixel of the latent, in a U-Net of SD 1.4's shape
(`benchmarks/gradient.py kept`; checkpointed: 6,500, plus the block that is evaluated again). Other networks differ;
where the estimate is too low, the attempt runs out of memory and the next mode is tried."""


def free_memory(device: torch.device) -> float:
    """Bytes of free memory on the device; infinite where that is not known."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return float(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    if device.type == "cpu":
        with contextlib.suppress(ImportError):  # the host has it
            import psutil

            return float(psutil.virtual_memory().available)
    return float("inf")


def first_attempt(unet: nn.Module, x: Tensor, rows: int, free: float) -> MemoryMode:
    """The fastest mode whose estimated memory fits into `free` bytes.

    Args:
        x: the latents, `(B, C, H, W)`.
        rows: network rows that are evaluated at once.
    """
    # Weights may be stored in fewer bits than activations.
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
    """`run` in this mode; if memory runs out, it is tried again in the next mode.

    Args:
        unet: the network behind Δ, whose blocks are checkpointed.
        empty: frees unused memory between attempts.
        note: called with a sentence about every attempt that ran out of memory.
        check: called before an attempt, in the mode of that attempt, until it has returned once.

    Rows that a failed attempt evaluated stay counted. Raises whatever the last mode's attempt raises.
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
