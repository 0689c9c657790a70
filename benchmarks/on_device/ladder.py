"""Out of memory for real: a gradient under limits that its faster ways do not fit in."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lib_memnoise.core.delta import magnitude
from lib_memnoise.methods.batch import BatchContext, Outcome
from lib_memnoise.sampling.memory_mode import MemoryMode, run_from
from lib_memnoise.torch_utils.oom import is_out_of_memory
from on_device.methods import METHODS, PER_SAMPLE, first_delta, generate
from on_device.run import Run
from on_device.shapes import Model, make_model, noise

WAYS = {
    MemoryMode.PLAIN: "plain",
    MemoryMode.CHECKPOINTED: "checkpointed",
    MemoryMode.ONE_BY_ONE: "one image at a time",
}
STEPS = 2
TOLERANCE = 0.01
"""How far ‖Δ‖ of the adjusted noise may be from what it is without a limit. The noise itself is no measure: AdamW
divides small gradients by their own size, and the order in which a GPU adds up is not the same twice."""


def settle() -> None:
    """Give back what is not used, so that what is allocated can be compared."""
    gc.collect()
    clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
    if clear is not None:
        clear()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def walk(model: Model, x: Tensor, mode: MemoryMode) -> tuple[Outcome, list[str], list[int]]:
    """`run_from` with the product's settings. Also the notes and the rows counted."""
    settings = PER_SAMPLE.resolved("sd1")
    notes: list[str] = []
    delta = first_delta(model)
    outcome = run_from(
        mode,
        x,
        delta,
        replace(settings, max_steps=STEPS),
        BatchContext("eps"),
        unet=model.unet,
        empty=settle,
        note=notes.append,
    )
    return outcome, notes, delta.network.forward.tolist()


def measure(run: Run) -> None:
    name = "per-sample, out of memory"
    if run.device != "cuda":
        run.skip("memory", name, "only a GPU's memory can be limited")
        return
    shape, size, batch = ("small", 32, 4) if run.small else ("SD 1.4", 64, 4)
    model = make_model(shape, size, batch, run.device, torch.float16)
    x = noise(batch, size, run.device)
    generate(model, x, METHODS[2], work=1, calls=1)
    total = torch.cuda.get_device_properties(0).total_memory
    needed: dict[MemoryMode, int] = {}
    found: list[Outcome] = []
    for mode in (MemoryMode.PLAIN, *MemoryMode):
        settle()
        torch.cuda.reset_peak_memory_stats()
        outcome, *_ = walk(model, x, mode)
        needed[mode] = torch.cuda.max_memory_reserved()
        found.append(outcome)
    free, again = found[:2]
    twice = apart(again, free, x)
    del found[:], again, outcome
    settle()
    base = torch.cuda.memory_reserved()
    limits = {
        "checkpointed": (needed[MemoryMode.PLAIN] + needed[MemoryMode.CHECKPOINTED]) // 2,
        "one image at a time": (needed[MemoryMode.CHECKPOINTED] + needed[MemoryMode.ONE_BY_ONE]) // 2,
        "none of them": (base + needed[MemoryMode.ONE_BY_ONE]) // 2,
    }
    rows = [attempt(model, x, free, wanted, limit, total) for wanted, limit in limits.items()]
    remarks = ["Reserved at the peak without a limit, MB: "]
    remarks[0] += ", ".join(f"{WAYS[mode]} {value / 1e6:,.0f}" for mode, value in needed.items())
    remarks.append(f"With the network at rest: {base / 1e6:,.0f} MB.")
    remarks.append(f"Plainly and without a limit twice: displacements {twice:.2f} of their length apart.")
    run.record(
        "memory", f"{shape}, {8 * size} px, batch {batch}, {name}", {"rows": rows, "remarks": remarks}, "float16"
    )


def apart(one: Outcome, other: Outcome, x: Tensor) -> float:
    """The greatest distance between two adjusted noises of an image, in lengths of the second's displacement."""
    return float((magnitude(one.x - other.x) / magnitude(other.x - x)).max())


def attempt(model: Model, x: Tensor, free: Outcome, wanted: str, limit: int, total: int) -> dict[str, Any]:
    settle()
    before = torch.cuda.memory_allocated()
    tried, ended, same = "plain", "", None
    torch.cuda.set_per_process_memory_fraction(limit / total)
    try:
        outcome, notes, rows = walk(model, x, MemoryMode.PLAIN)
        tried = " → ".join(["plain", *(note.split(", ", 1)[1] for note in notes)])
        ended = str(outcome.used.get("gradient", "plain")).replace("_", " ") + f", {rows[0]} rows"
        assert outcome.after is not None and free.after is not None
        worst = float((outcome.after / free.after - 1).abs().max())
        same = worst < TOLERANCE
        ended += f"; ‖Δ‖ {worst:.1e}, displacement {apart(outcome, free, x):.2f} apart"
        del outcome
    except Exception as error:
        known = "" if is_out_of_memory(error) else ", which is not recognised as being out of memory"
        ended = f"raised {type(error).__name__}: {str(error).split(' GPU ')[0]}{known}"
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    settle()
    return {
        "limit": f"{limit / 1e6:,.0f}",
        "wanted": wanted,
        "tried": tried,
        "ended": ended,
        "same": same,
        "before": f"{before:,}",
        "after": f"{torch.cuda.memory_allocated():,}",
    }
