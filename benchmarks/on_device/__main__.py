"""Measures memnoise on this machine's GPU. See benchmarks/README.md."""

from __future__ import annotations

import argparse
import contextlib
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from on_device import demo, ladder, precision, syncs, timing
from on_device.run import Run
from on_device.shapes import fused_attention

PARTS: dict[str, tuple[Callable[[Run], None], float]] = {
    "time": (timing.measure, 170),
    "syncs": (syncs.measure, 20),
    "memory": (ladder.measure, 12),
    "precision": (precision.measure, 60),
    "miniature": (demo.measure, 40),
}
"""Each part and the seconds that it plans for."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks/device.sh", description=__doc__)
    parser.add_argument("--only", choices=PARTS, action="append", help="this part, or these; all unless given")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="small networks and few turns: whether it runs at all")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parents[1] / "device", help="where results are written"
    )
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU; --device cpu --small shows that the benchmark runs")
    if arguments.device == "cpu" and not arguments.small:
        parser.error("on a CPU only --small ends within minutes")
    warnings.filterwarnings("ignore", message=".*TF32.*")
    warnings.filterwarnings("ignore", message=".*fp32_precision.*")
    if arguments.device == "cuda":
        # As the WebUI does.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    run = Run(arguments.device, arguments.small, arguments.out)
    run.say(", ".join(f"{name} {value}" for name, value in run.labels.items() if value is not None))
    failed = []
    for name in arguments.only or PARTS:
        measure, share = PARTS[name]
        try:
            # The miniature attends as it does on a CPU.
            attending = contextlib.nullcontext() if name == "miniature" else fused_attention()
            with run.part(name, share), attending:
                measure(run)
        except Exception as error:  # the other parts' results are worth having
            traceback.print_exc()
            run.skip(name, "the rest", f"{type(error).__name__}: {error}")
            failed.append(name)
    run.say(f"written: {run.file} and {run.file.with_suffix('.md')}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
