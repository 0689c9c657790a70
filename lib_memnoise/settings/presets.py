"""The numbers that presets supply, and the choice of a checkpoint's preset."""

from __future__ import annotations

import math
from typing import Any

SIGMA_MAX = 14.6146
"""The sigma of SD's noise schedule at t = 999: the scale of the latents that an Euler sampler starts from."""

# `tau_of` is the first timestep of the sampler that τ was published for: 50 steps of DDIM, or Euler.
# `latest` is not published; it is our own choice.
PRESET_VALUES: dict[str, dict[str, Any]] = {
    # Appendix B, DDIM.
    "sd1": {
        "gamma": 0.7, "rho": 50.0, "steps": 2, "tau": 900.0, "tau_of": 981.0, "latest": 700.0,
        "lr": 0.01, "target": 0.9, "target_kind": "absolute", "max_steps": 100, "opposite": 0.0,
        "alpha": 0.05,
    },
    # Appendix B, Euler. The space in which γ̃, ρ and lr act is not published. γ̃ and lr are divided by σ_max (γ̃ is then
    # 0.7 on ε, exactly SD 1.4's value), ρ is not. With these values ‖Δ‖ on the v-prediction miniature falls to 0.61 of
    # itself and the noise keeps its length; with ρ / σ_max it falls only to 0.92, and with γ̃ as published it falls to
    # 0.23 but the noise doubles its length (`benchmarks/sd2_units.py`). Targets are in v; the paper sweeps 5…20 and
    # names no default.
    "sd2_v": {
        "gamma": round(0.7 / SIGMA_MAX, 4), "rho": 30.0, "steps": 4, "tau": 917.449, "tau_of": 999.0, "latest": 700.0,
        "lr": round(0.1 / SIGMA_MAX, 5), "target": 10.0, "target_kind": "absolute",
        "max_steps": 100, "opposite": 0.0, "alpha": 0.01,
    },
    # Checkpoints without published numbers (SDXL): SD 1.4's values, but the target is a fraction of the first ‖Δ‖.
    "relative": {
        "gamma": 0.7, "rho": 50.0, "steps": 2, "tau": 900.0, "tau_of": 981.0, "latest": 700.0,
        "lr": 0.01, "target": 0.5, "target_kind": "fraction", "max_steps": 100, "opposite": 0.0,
        "alpha": 0.05,
    },
}  # fmt: skip

HALF = {"target": 0.5, "target_kind": "fraction"}
# An absolute target belongs to one checkpoint: on others of its kind ‖Δ‖ has another magnitude.
PRESET_VALUES["sd1_like"] = {**PRESET_VALUES["sd1"], **HALF}
PRESET_VALUES["sd2_v_like"] = {**PRESET_VALUES["sd2_v"], **HALF}

METHOD_VALUES: dict[str, dict[str, dict[str, Any]]] = {
    # Figure 4 sweeps 780…720 with noise as drawn, Figure 5 999…917 (SD 2.0).
    "static": {"sd1": {"tau": 740.0}, "relative": {"tau": 740.0}},
    # Swept: 1, 3, 5, 7, 9.
    "opposite_guidance": {preset: {"opposite": 5.0} for preset in ("sd1", "sd2_v", "relative")},
    # Swept for batches of 10: 3…7 and, in v, 50…90, for one norm over the batch; an image's target is that over √10.
    "prompt_embedding": {
        "sd1": {"lr": 0.05, "max_steps": 10, "target": round(5 / 10**0.5, 3)},
        "sd2_v": {"lr": 0.05, "max_steps": 10, "target": round(70 / 10**0.5, 3)},
        "relative": {"lr": 0.05, "max_steps": 10},
    },
    # From the authors' code, which has no target for SD 2.
    "sail": {
        "sd1": {"lr": 0.05, "max_steps": 10, "target": 8.2},
        "sd2_v": {"lr": 0.05, "max_steps": 10, "target": 0.5, "target_kind": "fraction"},
        "relative": {"lr": 0.05, "max_steps": 10},
    },
}
"""For each method, the values of a preset that differ from `PRESET_VALUES`."""
for _numbers in METHOD_VALUES.values():
    for _preset in ("sd1", "sd2_v"):
        if _preset in _numbers:
            _numbers[f"{_preset}_like"] = {**_numbers[_preset], **(HALF if "target" in _numbers[_preset] else {})}

PUBLISHED = {
    "sd1": (
        "fe4efff1e174c627256e44ec2991ba279b3816e364b49f9be2abc0b3ff3f8556",  # sd-v1-4.ckpt
        "14749efc0ae8ef0329391ad4436feb781b402f4fece4883c7ad8d10556d8a36a",  # sd-v1-4-full-ema.ckpt
    ),
    "sd2_v": ("bfcaf0755797b0c30eb00a3787e8b423eb1f5decd8de76c4d824ac2dd27e139f",),  # 768-v-ema.ckpt, of SD 2.0
}
"""The SHA-256 of the checkpoint files that a preset's targets were published for."""
ABSOLUTE = {"sd1_like": "sd1", "sd2_v_like": "sd2_v", "relative": "sd1"}
"""Presets without a published target, and the preset whose target is used where an absolute one is wanted."""


def preset_values(preset: str, method: str) -> dict[str, Any]:
    """The numbers of a preset (a key of `PRESET_VALUES`) for a method."""
    return {**PRESET_VALUES[preset], **METHOD_VALUES.get(method, {}).get(preset, {})}


def target_of_kind(kind: str, preset: str, method: str) -> Any:
    """The target of this kind ("absolute" or "fraction") where the preset's own is of the other kind."""
    others = ("relative",) if kind == "fraction" else (ABSOLUTE.get(preset, "sd1"), "sd1")
    candidates = (preset_values(other, method) for other in others)
    return next(values["target"] for values in candidates if values["target_kind"] == kind)


REFERENCE_SIZE = {"eps": 4 * 64 * 64, "v": 4 * 96 * 96}
"""d = C·H·W of the latents that the published values belong to: SD 1 at 512 px, SD 2 v at 768 px."""


def preset_for(*, parameterization: str, family: str, sha256: str | None = None) -> str:
    """The preset that "auto" stands for (a key of `PRESET_VALUES`).

    Args:
        parameterization: the checkpoint's native output, "v" or anything else.
        family: "sd1", "sd2" or anything else.
        sha256: the checkpoint file's hash, where it is known.
    """
    if parameterization != "v" and family not in ("sd1", "sd2"):
        return "relative"
    preset = "sd2_v" if parameterization == "v" else "sd1"
    return preset if sha256 in PUBLISHED[preset] else f"{preset}_like"


def size_factor(d: int, parameterization: str) -> float:
    """√(d/d_ref), the factor by which ρ and an absolute target scale, since ‖Δ‖ and ‖x‖ both grow with √d.

    Args:
        d: the number of values in a latent, C·H·W.
        parameterization: "eps" or "v".
    """
    return math.sqrt(d / REFERENCE_SIZE["v" if parameterization == "v" else "eps"])
