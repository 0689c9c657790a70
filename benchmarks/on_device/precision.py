"""Half precision against float32: Δ, the adjusted noise, the number of steps, and no overflow."""

from __future__ import annotations

import contextlib
import copy
import gc
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lib_memnoise.core.delta import Delta, magnitude
from lib_memnoise.methods import batch_wise, per_sample
from on_device.methods import GAMMA, RHO, first_delta
from on_device.run import Run
from on_device.shapes import REFERENCE, Model, make_model, noise

RHOS = (0.5, 2.0, 5.0, 10.0, 25.0, 50.0, 100.0)
"""Of the published 50, at 512 px."""
LENGTH = 0.01
"""How far ‖Δ‖ may be from that of float32."""
ANGLE = {"float16": 20.0}
"""How many degrees the displacement at the published ρ may be from that of float32. None is stated for bfloat16, whose
rounding is as large as what a prompt of this ‖Δ‖ adds to the network's output."""
STEPS = 8
MORE = 4
"""Steps that are waited for the target in half precision."""


@dataclass(frozen=True)
class Case:
    shape: str
    size: int
    batch: int
    descends: bool
    """The number of steps is compared too."""
    seconds: float


CASES = (Case("SD 1.4", 64, 2, True, 10), Case("SD 1.4", 128, 2, False, 20), Case("SDXL", 128, 1, True, 25))
SMALL = (Case("small", 8, 2, True, 10),)


@contextlib.contextmanager
def exact() -> Iterator[None]:
    """Within, float32 is float32, not TF32."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def delta_of(model: Model) -> Delta:
    return first_delta(model)


def angle(first: Tensor, second: Tensor) -> float:
    """The greatest of the images' angles, in degrees."""
    cosine = torch.cosine_similarity(first.flatten(1), second.flatten(1), dim=1).clamp(-1, 1)
    return float(torch.rad2deg(torch.arccos(cosine)).max())


def displaced(model: Model, x: Tensor, rho: float, steps: int = 1) -> Tensor:
    """What batch-wise adds to the noise."""
    scaled = rho * (x[0].numel() / REFERENCE) ** 0.5
    return batch_wise.adjust(x, delta_of(model), gamma=GAMMA, rho=scaled, steps=steps) - x


@torch.no_grad()
def greatest(model: Model, x: Tensor) -> float:
    """The greatest absolute value that any layer gives for these latents."""
    found: list[Tensor] = []

    def see(module: nn.Module, given: Any, out: Any) -> None:
        if isinstance(out, Tensor):
            found.append(out.detach().abs().amax().float())

    handles = [part.register_forward_hook(see) for part in model.unet.modules()]
    try:
        delta_of(model)(x)
    finally:
        for handle in handles:
            handle.remove()
    return float(torch.stack(found).max())


def losses(model: Model, x: Tensor) -> list[Tensor]:
    """‖Δ‖ `(B,)` of each step of a descent."""
    seen: list[Tensor] = []
    delta = delta_of(model)

    def attended(latents: Tensor) -> Tensor:
        prediction = delta(latents)
        seen.append(magnitude(prediction.detach()))
        return prediction

    per_sample.adjust(x, attended, lr=0.01, target=0.0, max_steps=STEPS)
    return seen


def steps_to(model: Model, x: Tensor, target: Tensor) -> list[int]:
    found = per_sample.adjust(x, delta_of(model), lr=0.01, target=lambda _: target, max_steps=STEPS + MORE)
    return [int(value) for value in found.steps]


def measure(run: Run) -> None:
    for case in SMALL if run.small else CASES:
        name = f"{case.shape}, {8 * case.size} px"
        if run.late(case.seconds):
            run.skip("precision", name, "the time for this part was used up")
            continue
        with exact():
            measure_case(run, case, name)
        gc.collect()
        if run.device == "cuda":
            torch.cuda.empty_cache()


def measure_case(run: Run, case: Case, name: str) -> None:
    full = make_model(case.shape, case.size, case.batch, run.device, torch.float32)
    x = noise(case.batch, case.size, run.device)
    with torch.no_grad():
        delta = delta_of(full)(x)
    moved = {rho: displaced(full, x, rho) for rho in (RHOS[5:] if run.small else RHOS)}
    whole = displaced(full, x, RHO, 2)
    target, steps = None, [0]
    if case.descends:
        seen = losses(full, x)
        # Between the fifth step's and the sixth's.
        target = (seen[5] * seen[6]).sqrt()
        steps = steps_to(full, x, target)
    for kind in ("float16",) if run.small else ("float16", "bfloat16"):
        dtype = getattr(torch, kind)
        model = Model(copy.deepcopy(full.unet).to(dtype), dtype, full.cond, full.uncond)
        rows = compare(model, x, kind, delta, moved, whole)
        if target is not None:
            found = steps_to(model, x, target)
            apart = max(abs(a - b) for a, b in zip(found, steps))
            said = f"{found}, float32 {steps}"
            rows.append({"what": "per-sample: steps to a target", "found": said, "bound": 1, "within": apart <= 1})
        fits = f"‖Δ‖ {float(magnitude(delta).mean()):.3g} and ‖x‖ {float(magnitude(x).mean()):.4g} in float32"
        run.record("precision", name, {"rows": rows, "remarks": [fits + "; float32 without TF32."]}, kind)
        del model


def compare(
    model: Model, x: Tensor, kind: str, delta: Tensor, moved: dict[float, Tensor], whole: Tensor
) -> list[dict[str, Any]]:
    with torch.no_grad():
        own = delta_of(model)(x)
    apart = float((magnitude(own) / magnitude(delta) - 1).abs().max())
    rows: list[dict[str, Any]] = [
        {"what": "‖Δ‖, relative difference", "found": apart, "bound": LENGTH, "within": apart <= LENGTH},
        {"what": "Δ, degrees", "found": angle(own, delta)},
    ]
    for rho, other in moved.items():
        mine = displaced(model, x, rho)
        turned, longer = angle(mine, other), float((magnitude(mine) / magnitude(other)).max())
        row: dict[str, Any] = {
            "what": f"displacement at ρ = {rho:g}, degrees; length in float32's",
            "found": f"{turned:.2f}; {longer:.3f}",
        }
        if rho == RHO and kind in ANGLE:
            row |= {"bound": ANGLE[kind], "within": turned <= ANGLE[kind]}
        rows.append(row)
    rows.append(
        {"what": f"displacement, ρ = {RHO:g}, M = 2, degrees", "found": angle(displaced(model, x, RHO, 2), whole)}
    )
    most = greatest(model, x)
    limit = float(torch.finfo(model.dtype).max)
    rows.append({"what": "greatest value of any layer", "found": most, "bound": limit, "within": most < limit})
    return rows
