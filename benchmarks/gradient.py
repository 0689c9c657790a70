"""What a gradient with respect to the noise costs in a U-Net of SD 1.4's shape (random weights, no VAE).

    python benchmarks/gradient.py kept                 numbers kept for the backward pass, a row and latent pixel
    python benchmarks/gradient.py time                 forward and backward, in plain forwards
    python benchmarks/gradient.py memory               peak memory of each way, each in a process of its own

`--size 32` is the latent's width and height (64: 512 px), `--dtype float16` and `--device cuda` what they say.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.nn.functional as F
from on_device.shapes import SHAPES, TOKENS, make_unet
from torch import Tensor, nn

from lib_memnoise.core.delta import magnitude
from lib_memnoise.lab.miniature import networks
from lib_memnoise.torch_utils.checkpointing import checkpointed

TEXT = (TOKENS, SHAPES["SD 1.4"]["context_dim"])
WAYS = ("forward", "plain", "checkpointed", "straightforward")
"""No gradient; the gradient of x alone; with checkpointing; and with the weights' gradients, as an optimiser over x
gets them that freezes nothing."""


def make_network(device: str, dtype: torch.dtype) -> nn.Module:
    # The host's attention is torch's own as well, or one that also keeps no square matrices.
    networks.attend = F.scaled_dot_product_attention  # type: ignore[assignment]
    return make_unet("SD 1.4", device, dtype)


def inputs(rows: int, size: int, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    x = torch.randn(rows // 2, 4, size, size, generator=random).to(device)
    context = torch.randn(rows, *TEXT, generator=random).to(device, dtype)
    return x, torch.full((rows,), 981.0, device=device), context


def step(unet: nn.Module, way: str, x: Tensor, t: Tensor, context: Tensor, dtype: torch.dtype) -> Tensor:
    """One evaluation of ‖Δ‖, with its gradient unless the way is "forward"."""
    x = x.detach().requires_grad_(way != "forward")
    with torch.set_grad_enabled(way != "forward"):
        cond, uncond = unet(torch.cat([x, x]).to(dtype), t, context).float().chunk(2)
        value = magnitude(cond - uncond).sum()
    if way != "forward":
        value.backward()
    return value


@contextlib.contextmanager
def prepared(unet: nn.Module, way: str) -> Iterator[None]:
    unet.requires_grad_(way == "straightforward")
    with checkpointed(unet) if way == "checkpointed" else contextlib.nullcontext():
        yield
    unet.requires_grad_(False)
    for weight in unet.parameters():
        weight.grad = None


def kept(arguments: argparse.Namespace, unet: nn.Module, dtype: torch.dtype) -> dict[str, float]:
    """Distinct numbers kept, weights left out, divided by rows and latent pixels."""
    found = {}
    weights = {weight.untyped_storage().data_ptr() for weight in unet.parameters()}
    for way in ("plain", "checkpointed"):
        storages: dict[int, int] = {}

        def keep(tensor: Tensor, storages: dict[int, int] = storages) -> Tensor:
            if (place := tensor.untyped_storage().data_ptr()) not in weights:
                storages[place] = max(storages.get(place, 0), tensor.numel())
            return tensor

        x, t, context = inputs(2, arguments.size, arguments.device, dtype)
        with prepared(unet, way):
            x = x.requires_grad_()
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                out = unet(torch.cat([x, x]).to(dtype), t, context)
        del out
        found[way] = sum(storages.values()) / 2 / arguments.size**2
    return found


def timed(arguments: argparse.Namespace, unet: nn.Module, dtype: torch.dtype) -> dict[str, float]:
    """Seconds of each way, the lowest of several turns taken in rotation."""
    given = inputs(2, arguments.size, arguments.device, dtype)
    seconds: dict[str, float] = {}
    for turn in range(arguments.turns + 1):
        for way in WAYS:
            with prepared(unet, way):
                start = time.perf_counter()
                step(unet, way, *given, dtype)
                if arguments.device == "cuda":
                    torch.cuda.synchronize()
                passed = time.perf_counter() - start
            if turn:
                seconds[way] = min(seconds.get(way, passed), passed)
    found = {way: value / seconds["forward"] for way, value in seconds.items()}
    # n steps are n evaluations with a gradient and a last one without, which is the sampler's first and handed over
    steps = arguments.steps
    return {
        **found,
        "seconds": seconds["forward"],
        f"network time of {steps} steps and DDIM's 49 calls, in those calls": (49 + steps * found["plain"]) / 49,
        "the same, checkpointed": (49 + steps * found["checkpointed"]) / 49,
        "adjustment, the straightforward way in this one": (steps * found["straightforward"] + 1)
        / (steps * found["plain"] + 1),
    }


def memory(arguments: argparse.Namespace) -> dict[str, Any]:
    """Peak megabytes of each way in a fresh process, and as a ratio to no gradient."""
    found: dict[str, Any] = {}
    for way in WAYS:
        command = [sys.executable, __file__, "peak", "--way", way, "--size", str(arguments.size)]
        command += ["--dtype", arguments.dtype, "--device", arguments.device, "--threads", str(arguments.threads)]
        found[way] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    base = found["forward"]
    for entry in found.values():
        entry["ratio"] = entry["peak"] / base["peak"]
    return found


def peak(arguments: argparse.Namespace, unet: nn.Module, dtype: torch.dtype) -> dict[str, float]:
    given = inputs(2, arguments.size, arguments.device, dtype)
    weights = sum(weight.nbytes for weight in unet.parameters()) / 1e6
    if arguments.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with prepared(unet, arguments.way):
        step(unet, arguments.way, *given, dtype)
    if arguments.device == "cuda":
        most = torch.cuda.max_memory_allocated() / 1e6
    else:
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return {"peak": most, "weights": weights, "beside weights": most - weights}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("kept", "time", "memory", "peak"))
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--way", choices=WAYS, default="forward")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="optimiser steps of an image, for `time`")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype)
    if arguments.what == "memory":
        print(json.dumps(memory(arguments), indent=2))
        return
    measured: dict[str, Callable[..., dict[str, float]]] = {"kept": kept, "time": timed, "peak": peak}
    print(json.dumps(measured[arguments.what](arguments, make_network(arguments.device, dtype), dtype), indent=2))


if __name__ == "__main__":
    main()
