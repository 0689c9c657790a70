"""How often the host waits for the device, and where in memnoise."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from on_device.methods import METHODS, Method, generate
from on_device.run import Run
from on_device.shapes import Model, make_model, noise

ROOT = Path(__file__).parents[2]
PRODUCT = str(ROOT / "lib_memnoise")
WAITING = {
    "item", "tolist", "equal", "allclose", "nonzero", "numpy", "cpu", "masked_select", "__bool__", "__float__",
    "__int__", "__index__",
}  # fmt: skip
"""Calls that hand a tensor's values to Python."""


def place(frame: FrameType | None) -> str:
    """The innermost of the product's own frames."""
    while frame is not None:
        if frame.f_code.co_filename.startswith(PRODUCT):
            name = Path(frame.f_code.co_filename).relative_to(ROOT)
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


class Waiting(TorchFunctionMode):
    """Counts calls that would wait for a GPU, on any device: those of `WAITING`, and indices that come from Python."""

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        indexed = name in ("__getitem__", "__setitem__") and any(
            isinstance(index, list) or (isinstance(index, Tensor) and index.dtype == torch.bool)
            for index in (args[1] if isinstance(args[1], tuple) else (args[1],))
        )
        # Counts of rows are kept on the CPU: nothing is waited for.
        if name in WAITING or indexed:
            where = place(sys._getframe(1))
            self.found[where] += not ("lab/simulator" in where and args[0].dtype == torch.int64)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def counted(device: str) -> Iterator[Counter[str]]:
    """Within, places where the host waited, and how often: by torch's own warnings on a GPU."""
    found: Counter[str] = Counter()
    if device != "cuda":
        with Waiting(found):
            yield found
        return

    def show(message: Any, *_: Any, **__: Any) -> None:
        if "called a synchronizing" in str(message):
            found[place(sys._getframe(1))] += 1

    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")


def count(run: Run, model: Model, x: Tensor, method: Method, *, work: int, calls: int) -> Counter[str]:
    with counted(run.device) as found:
        generate(model, x, method, work=work, calls=calls)
    return found


def minus(more: Counter[str], less: Counter[str], by: int) -> dict[str, float]:
    """Of each place, what so many steps more came to, a step."""
    return {where: (more[where] - less[where]) / by for where in more if more[where] != less[where]}


def measure(run: Run) -> None:
    shape, size = ("small", 8) if run.small else ("SD 1.4", 64)
    dtype = torch.float32 if run.small else torch.float16
    batch = 2
    model = make_model(shape, size, batch, run.device, dtype)
    x = noise(batch, size, run.device)
    generate(model, x, METHODS[2], work=1, calls=1)
    rows: list[dict[str, Any]] = []
    for method in METHODS:
        base = count(run, model, x, method, work=1, calls=6)
        # Past the calls with guidance off, or all of these.
        sampler = minus(count(run, model, x, method, work=1, calls=8), base, 2)
        off = minus(count(run, model, x, method, work=1, calls=4), count(run, model, x, method, work=1, calls=3), 1)
        steps = minus(count(run, model, x, method, work=3, calls=6), base, 2) if method.work else {}
        kind = "optimiser" if "sample" in method.name else "adjustment"
        rows.append(
            {
                "method": method.name,
                "sampler": sum(sampler.values()),
                kind: sum(steps.values()) if method.work else None,
                "place": f"whole generation of 6 calls: {sum(base.values())}",
            }
        )
        for name, places in (("sampler", sampler), (kind, steps)):
            rows += [{"method": "", name: value, "place": where} for where, value in sorted(places.items())]
        if method.late:
            rows.append({"method": "", "sampler": sum(off.values()), "place": "with guidance off"})
            rows += [{"method": "", "sampler": value, "place": where} for where, value in sorted(off.items())]
    how = "torch.cuda.set_sync_debug_mode" if run.device == "cuda" else "calls that would wait for a GPU"
    figures = {"rows": rows, "remarks": [f"Batch of {batch}; counted by {how}."]}
    run.record("syncs", f"{shape}, waits of the host", figures, str(dtype).split(".")[1])
