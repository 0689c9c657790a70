"""Models that other extensions ask for, with random weights; run with the WebUI's Python, as `checkpoints.py` is.

A ControlNet for the checkpoint `sd1-wide`, and a detector for ADetailer that finds something in every picture.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path


def make(kind: str, file: Path, python: Path, *sources: Path) -> Path:
    """Make one of the models, `control` or `detector`, where it is missing."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        env = {**os.environ, "OMP_NUM_THREADS": "1", "YOLO_CONFIG_DIR": str(file.parent)}
        env.pop("PYTHONPATH", None)
        command = [str(python), str(Path(__file__).resolve()), kind, str(file), *map(str, sources)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode:
            raise RuntimeError(f"making {file.name} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return file


# From here on: run with the WebUI's Python.


def control(file: str, checkpoint: str) -> None:
    """The checkpoint's own encoder, with convolutions of noise where a new ControlNet has zeros."""
    from itertools import pairwise

    import torch
    from safetensors.torch import load_file, save_file

    prefix, parts = "model.diffusion_model.", ("time_embed", "input_blocks", "middle_block")
    every = {name.removeprefix(prefix): value for name, value in load_file(checkpoint).items()}
    weights = {name: value for name, value in every.items() if name.startswith(parts)}
    generator = torch.Generator().manual_seed(0)

    def convolution(name: str, inputs: int, outputs: int, size: int, gain: float = 1.0) -> None:
        weight = torch.randn(outputs, inputs, size, size, generator=generator) * gain / math.sqrt(inputs * size**2)
        weights[f"{name}.weight"], weights[f"{name}.bias"] = weight.half(), torch.zeros(outputs).half()

    hint = (3, 16, 16, 32, 32, 96, 96, 256, 320)
    for number, (inputs, outputs) in enumerate(pairwise(hint)):
        convolution(f"input_hint_block.{2 * number}", inputs, outputs, 3, 1.5)
    for number, width in enumerate([320] * 4 + [640] * 3 + [1280] * 5):
        convolution(f"zero_convs.{number}.0", width, width, 1)
    convolution("middle_block_out.0", 1280, 1280, 1)
    save_file({f"control_model.{name}": value.contiguous() for name, value in weights.items()}, file)


def detector(file: str) -> None:
    import torch
    from ultralytics import YOLO

    torch.manual_seed(0)
    model = YOLO("yolov8n.yaml")
    for branch in model.model.model[-1].cv3:
        branch[-1].bias.data.zero_()  # every box is as likely as not
    model.save(file)


if __name__ == "__main__":
    {"control": control, "detector": detector}[sys.argv[1]](*sys.argv[2:])
