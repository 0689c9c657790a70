"""The miniature's demo on the device: the same copies and escapes as on the CPU in float32."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from on_device.precision import exact
from on_device.run import Run

if TYPE_CHECKING:
    from lib_memnoise.lab.experiment import Batch, Images

PACKAGES = ("safetensors", "PIL")
IMAGES = 4
BATCH = 4
"""On the CPU, where one process takes a batch."""
RESAMPLES = 4000


def measure(run: Run) -> None:
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        run.skip("miniature", "the demo", f"{' and '.join(missing)} not installed")
        return
    from lib_memnoise.lab import experiment
    from lib_memnoise.lab.comparison import COMPARED
    from lib_memnoise.lab.miniature.model import load_miniature
    from lib_memnoise.lab.processes import Workers

    chosen = experiment.subjects(memorised=True, held_out=True)
    images, methods, processes = IMAGES, dict(COMPARED), max(1, (os.cpu_count() or 1) - 2)
    if run.small:
        chosen, images, methods, processes = chosen[:1], 1, {name: COMPARED[name] for name in ("none", "batch-wise")}, 1
    kinds = [torch.float32] if run.small else [torch.float32, torch.float16]
    began = time.perf_counter()
    with one_thread(), Workers(load_miniature(), processes) as workers:
        # Meanwhile, the GPU is asked from this process.
        waiting = {
            name: [workers.submit(experiment.part, batch) for batch in batches(run, chosen, images, settings, BATCH)]
            for name, settings in methods.items()
        }
        here: dict[torch.dtype, dict[str, Images]] = {}
        for dtype in kinds:
            model = load_miniature().to(run.device, dtype)
            with exact():
                here[dtype] = {
                    name: experiment.collected(
                        chosen,
                        images,
                        [
                            experiment.part(model, batch)
                            for batch in batches(run, chosen, images, settings, len(chosen) * images)
                        ],
                    )
                    for name, settings in methods.items()
                }
            run.say(f"the miniature in {dtype}: {time.perf_counter() - began:.1f} s since the part began")
        reference = {
            name: experiment.collected(chosen, images, [future.result() for future in futures])
            for name, futures in waiting.items()
        }
    run.say(f"the CPU's {processes} process(es): {time.perf_counter() - began:.1f} s since the part began")
    remarks = [
        f"{len(chosen)} prompts, {images} images each, noise drawn on the CPU. Similarity is to the nearest memorised "
        "picture. The interval is of the mean difference in similarity, here less CPU, by a bootstrap over prompts. "
        "Same verdict: images that are copies in both or in neither. The autoencoder is in float32, and float32 is not "
        "TF32."
    ]
    for dtype, found in here.items():
        rows = [row(name, reference[name], found[name]) for name in methods]
        run.record("miniature", "the demo", {"rows": rows, "remarks": remarks}, str(dtype).split(".")[1])


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def batches(run: Run, chosen: Any, images: int, settings: Any, size: int) -> list[Batch]:
    from lib_memnoise.lab import experiment

    every = [(s, i) for s in range(len(chosen)) for i in range(images)]
    steps = 5 if run.small else experiment.STEPS
    return [
        experiment.Batch(
            tuple(chosen[s] for s, _ in part),
            tuple(experiment.seed_of(s, i, 0) for s, i in part),
            settings,
            "DDIM",
            steps,
            False,
            None,
        )
        for part in (every[start : start + size] for start in range(0, len(every), size))
    ]


def row(name: str, cpu: Images, here: Images) -> dict[str, Any]:
    difference: NDArray[Any] = here.similarity - cpu.similarity
    random = np.random.default_rng(0)
    drawn = random.integers(0, len(difference), (RESAMPLES, len(difference)))
    low, high = np.quantile(difference.mean(1)[drawn].mean(1), [0.025, 0.975])
    agree = int((cpu.copied == here.copied).sum())
    return {
        "method": name,
        "copied cpu": float(cpu.copied.mean()),
        "copied": float(here.copied.mean()),
        "similarity cpu": float(cpu.similarity.mean()),
        "similarity": float(here.similarity.mean()),
        "difference": float(difference.mean()),
        "interval": f"{difference.mean():+.3f} [{low:+.3f}, {high:+.3f}], at most {np.abs(difference).max():.3f}",
        "agree": f"{agree} of {difference.size}",
        "rows": f"{float(here.forward.mean()):.1f} + {float(here.backward.mean()):.1f}",
        "rows cpu": f"{float(cpu.forward.mean()):.1f} + {float(cpu.backward.mean()):.1f}",
    }
