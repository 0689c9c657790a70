"""Network time and peak memory of an image, in those of no mitigation."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lib_memnoise.torch_utils.oom import is_out_of_memory
from on_device.methods import CALLS, METHODS, NONE, OFF, Made, Method, generate, guided_calls
from on_device.run import Run
from on_device.shapes import make_model, noise

TAIL = 6
"""Guided calls that are timed for all those that no method changes."""


@dataclass(frozen=True)
class Cell:
    shape: str
    size: int
    """Of the latent."""
    dtype: str
    batch: int
    whole: bool = False
    """All 49 calls of the sampler are made by every method. Else those that are guided in every method are timed once
    for all."""
    share: int = 1
    """Only one in so many steps of an adjustment is taken, and its time multiplied."""
    turns: int = 1
    seconds: float = 20.0
    """No further turn is begun that would end later."""

    @property
    def name(self) -> str:
        name = f"{self.shape}, {8 * self.size} px, {self.dtype}, batch {self.batch}"
        return name + (", every call" if self.whole else "")

    def calls(self, method: Method) -> int:
        """Calls of the sampler that are made: those with guidance off, and one with it on."""
        return CALLS if self.whole else 1 + OFF * method.late


CELLS = (
    Cell("SD 1.4", 64, "float16", 1, whole=True, turns=3, seconds=38),
    Cell("SD 1.4", 64, "float16", 1, turns=7, seconds=12),
    Cell("SD 1.4", 64, "float16", 4, turns=5, seconds=13),
    Cell("SDXL", 128, "float16", 1, turns=3, seconds=15),
    Cell("SDXL", 128, "float16", 4, share=4, turns=2, seconds=18),
    Cell("SD 1.4", 64, "bfloat16", 1, turns=5, seconds=8),
    Cell("SD 1.4", 64, "bfloat16", 4, turns=3, seconds=9),
    Cell("SD 1.4", 64, "float32", 1, turns=3, seconds=8),
    Cell("SD 1.4", 64, "float32", 4, share=2, turns=2, seconds=10),
    Cell("SDXL", 128, "bfloat16", 1, turns=2, seconds=10),
    Cell("SDXL", 128, "bfloat16", 4, share=4, turns=1, seconds=12),
    Cell("SDXL", 128, "float32", 1, share=2, turns=1, seconds=10),
    Cell("SDXL", 128, "float32", 4, share=4, turns=1, seconds=28),
)
"""The most telling first: what there is no time for is not measured."""
SMALL = (
    Cell("small", 8, "float32", 1, whole=True, turns=1),
    Cell("small", 8, "float32", 2, share=4, turns=2),
)


def seconds(run: Run, work: Callable[[], object]) -> float:
    """How long the device was at it."""
    if run.device != "cuda":
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begun.record()
    work()
    ended.record()
    torch.cuda.synchronize()
    return begun.elapsed_time(ended) / 1000


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def measure(run: Run) -> None:
    for cell in SMALL if run.small else CELLS:
        if run.late(cell.seconds):
            run.skip("time", cell.name, "the time for this part was used up")
            continue
        try:
            run.record("time", cell.name, measure_cell(run, cell), cell.dtype)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            run.skip("time", cell.name, f"out of memory without mitigation: {str(error).splitlines()[0]}")
        gc.collect()
        if run.device == "cuda":
            torch.cuda.empty_cache()


def measure_cell(run: Run, cell: Cell) -> dict[str, Any]:
    started = time.perf_counter()
    model = make_model(cell.shape, cell.size, cell.batch, run.device, getattr(torch, cell.dtype))
    x = noise(cell.batch, cell.size, run.device)
    memory, methods, failed = peaks(run, model, x)
    turns: list[tuple[dict[str, float], float]] = []
    made: dict[str, Made] = {}
    took = 0.0
    for turn in range(cell.turns):
        if turn and time.perf_counter() - started + took > cell.seconds:
            break
        begun = time.perf_counter()
        heads = {}
        for method in methods[turn % len(methods) :] + methods[: turn % len(methods)]:
            work = method.work // cell.share

            def head(method: Method = method, work: int = work) -> None:
                made[method.name] = generate(model, x, method, work=work, calls=cell.calls(method))

            heads[method.name] = seconds(run, head)
        call = 0.0 if cell.whole else seconds(run, lambda: guided_calls(model, x, TAIL)) / TAIL
        turns.append((heads, call))
        took = time.perf_counter() - begun
    return {
        "turns": len(turns),
        "seconds of none": spread([total(cell, NONE, *turn) for turn in turns]),
        "weights, MB": model.weights / 1e6,
        "methods": {method.name: figures(method, cell, turns, memory, made[method.name]) for method in methods}
        | failed,
    }


def total(cell: Cell, method: Method, heads: dict[str, float], call: float) -> float:
    """Seconds of an image, or a batch of them. `call`: those of a guided call of the sampler."""
    seconds = heads[method.name] + (CALLS - cell.calls(method)) * call
    if method.work:
        # Of the adjustment only a part was done.
        seconds += (cell.share - 1) * (heads[method.name] - heads["none"])
    return seconds


def figures(
    method: Method,
    cell: Cell,
    turns: list[tuple[dict[str, float], float]],
    memory: dict[str, float],
    made: Made,
) -> dict[str, Any]:
    ratios = [total(cell, method, *turn) / total(cell, NONE, *turn) for turn in turns]
    forward, backward = method.rows(method.work // cell.share, cell.calls(method))
    whole = method.rows(method.work, CALLS)
    return {
        "time": spread(ratios),
        "memory": memory[method.name] / memory["none"] if memory else None,
        "peak, MB": memory[method.name] if memory else None,
        "rows": whole[0],
        "backward rows": whole[1],
        "rows counted": made.forward,
        "rows documented": forward,
        "backward rows counted": made.backward,
        "backward rows documented": backward,
        "finite": bool(torch.isfinite(made.latents).all()),
        "one in so many steps taken": cell.share if method.work else 1,
        "target": {"time": method.time, "memory": method.memory},
        "paper": method.paper,
        "prototype": method.prototype,
    }


def peaks(run: Run, model: Any, x: Tensor) -> tuple[dict[str, float], list[Method], dict[str, Any]]:
    """Megabytes, by method, of one step of each, which is the warm-up too; those there is enough memory for.

    Without a GPU there are no such figures: the process's own peak cannot be taken back between methods.
    """
    memory: dict[str, float] = {}
    methods, failed = [], {}
    generate(model, x, NONE, calls=1)
    # A first backward pass leaves libraries' own memory behind.
    generate(model, x, METHODS[3], work=1, calls=1)
    for method in METHODS:
        if run.device == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            generate(model, x, method, work=min(method.work, 1), calls=2 if method.late else 1)
        except Exception as error:
            if not is_out_of_memory(error) or method is NONE:
                raise
            failed[method.name] = {"not run": "out of memory"}
            continue
        methods.append(method)
        if run.device == "cuda":
            memory[method.name] = torch.cuda.max_memory_allocated() / 1e6
    return memory, methods, failed
