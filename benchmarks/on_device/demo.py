"""The miniature's demo on the device: the same copies and escapes as on the CPU in float32."""

from __future__ import annotations

import importlib.util
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from on_device.precision import exact
from on_device.run import Run

PACKAGES = ("safetensors", "PIL")
BATCH = 32
RESAMPLES = 4000


@dataclass(frozen=True)
class Found:
    similarity: NDArray[np.float32]
    """`(subjects, images)`."""
    copied: NDArray[np.bool_]
    seconds: float


def measure(run: Run) -> None:
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        run.skip("miniature", "the demo", f"{' and '.join(missing)} not installed")
        return
    from lib_memnoise.lab.comparison import COMPARED
    from lib_memnoise.lab.study import subjects

    chosen = subjects(memorised=True, held_out=True)
    images, methods = 2, dict(COMPARED)
    if run.small:
        chosen, images, methods = chosen[:1], 1, {name: COMPARED[name] for name in ("none", "batch-wise")}
    kinds = [torch.float32] if run.small else [torch.float32, torch.float16]
    rows: dict[torch.dtype, list[dict[str, Any]]] = {dtype: [] for dtype in kinds}
    took = 0.0
    for name, settings in methods.items():
        if run.late(took):
            run.skip("miniature", f"the demo, {name}", "the time for this part was used up")
            continue
        begun = run.elapsed
        with exact():
            reference = study(run, chosen, settings, images, "cpu", torch.float32)
            for dtype in kinds:
                rows[dtype].append(row(name, reference, study(run, chosen, settings, images, run.device, dtype)))
        took = run.elapsed - begun
        run.say(f"{name}: {reference.seconds:.1f} s on the CPU, {took - reference.seconds:.1f} s here")
    for dtype in kinds:
        remarks = [
            f"{len(chosen)} prompts, {images} images each, noise drawn on the CPU. The interval is of the mean "
            "difference in similarity, here less CPU, by a bootstrap over prompts. Same verdict: images that are "
            "copies in both or in neither. The autoencoder is in float32."
        ]
        run.record("miniature", "the demo", {"rows": rows[dtype], "remarks": remarks}, str(dtype).split(".")[1])


def row(name: str, cpu: Found, here: Found) -> dict[str, Any]:
    difference = here.similarity - cpu.similarity
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
        "seconds cpu": cpu.seconds,
        "seconds": here.seconds,
    }


def study(run: Run, chosen: Any, settings: Any, images: int, device: str, dtype: torch.dtype) -> Found:
    """As `lab.study.study`, on a device: every image's similarity to the nearest memorised picture."""
    from lib_memnoise.lab import bench
    from lib_memnoise.lab.study import likeness, seed_of
    from lib_memnoise.miniature.model import load_miniature
    from lib_memnoise.miniature.yardsticks import COPIED

    started = time.perf_counter()
    model = load_miniature().to(device, dtype)
    every = [(s, i) for s in range(len(chosen)) for i in range(images)]
    found = []
    for start in range(0, len(every), BATCH):
        part = every[start : start + BATCH]
        seeds = [seed_of(s, i, 0) for s, i in part]
        captions = [chosen[s].caption for s, _ in part]
        steps = 5 if run.small else bench.STEPS
        made = bench.generate(model, captions, bench.noises(seeds).to(device), settings, seeds=seeds, steps=steps)
        found += likeness(model.decode(made.latents).cpu()).amax(1).tolist()
    alike = np.array(found, dtype=np.float32).reshape(len(chosen), images)
    return Found(alike, alike > COPIED, time.perf_counter() - started)
