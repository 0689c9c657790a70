"""The one schema of settings.

It feeds the accordion, the API's validation, infotext, X/Y/Z axes, the JSON Schema and the documentation.
Nothing here imports torch, gradio or a WebUI.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from lib_memnoise.registry import METHODS
from lib_memnoise.wording import echo, meant


class SettingError(ValueError):
    """A setting that cannot be used. The message is one sentence: name, value and what would be right."""


@dataclass(frozen=True)
class Spec:
    """What is known of one setting beside its name, type and default."""

    label: str
    help: str
    low: float | None = None
    high: float | None = None
    step: float | None = None
    choices: Mapping[str, str] | None = None
    """Accepted values and what people see for them."""
    methods: tuple[str, ...] = ()
    """The methods that use it; empty: all."""
    only: tuple[str, ...] | None = None
    """A setting and the values of which it must take one for this one to be used."""
    preset: bool = False
    """A preset supplies it where it is not given."""
    advanced: bool = False


def _setting(default: Any, **spec: Any) -> Any:
    return field(default=default, metadata={"spec": Spec(**spec)})


PRESETS = {
    "auto": "Automatic (by checkpoint)",
    "sd1": "SD 1.x",
    "sd2_v": "SD 2.x v",
    "calibrated": "Calibrated (this checkpoint's own scores)",
    "custom": "Custom",
}
STARTS = {
    "method": "where the method has it",
    "first": "at the first step",
    "tau": "at timestep τ",
    "transition": "at the image's own transition point",
}
TRACES = {"off": "no", "on": "as sampled", "compare": "as sampled, and of the noise as drawn"}
MITIGATED = {"always": "every image", "flagged": "images that score as memorised"}
RULES = {"adamw": "AdamW", "sphere": "of one length, on the sphere"}
PADDINGS = {
    "both": "token 0, and no end token",
    "pad": "token 0 as padding",
    "end": "no end token",
}
_BATCH, _SAMPLE = ("batch_wise",), ("per_sample",)
_DESCENT = ("per_sample", "prompt_embedding", "sail")
"""Methods that descend until a target is reached."""
_DECAYED = ("per_sample", "prompt_embedding")


@dataclass(frozen=True)
class Settings:
    """Validated settings of one generation. None stands for "as the preset has it"."""

    enabled: bool = _setting(False, label="Memnoise", help="Keep the model from reproducing its training images.")
    method: str = _setting(
        "batch_wise",
        label="Method",
        help="What is changed: the noise, the prompt as the network hears it, or when guidance starts.",
        choices={name: method.label for name, method in METHODS.items()},
    )
    preset: str = _setting(
        "auto",
        label="Preset",
        help="Published values for the kind of checkpoint. Custom: set them yourself.",
        choices=PRESETS,
    )
    when: str = _setting(
        "always",
        label="Mitigate",
        choices=MITIGATED,
        help="By ‖Δ(x_T, T)‖, which is high for memorised prompts. Other images come as they would without memnoise.",
    )
    threshold: float | None = _setting(
        None,
        label="Score threshold",
        low=0,
        high=1000,
        step=0.01,
        only=("when", "flagged"),
        help="An image whose score is above it counts as memorised. At the checkpoint's own image size; scaled. "
        "Not given: the checkpoint's calibration has it, which is made first where there is none.",
    )
    false_positives: float = _setting(
        0.01,
        label="False positives",
        low=0.001,
        high=0.5,
        step=0.001,
        advanced=True,
        only=("when", "flagged"),
        help="Where the checkpoint is calibrated and no threshold is given: the share of ordinary prompts above it.",
    )
    exact_batches: bool = _setting(
        False,
        label="Exact mixed batches",
        advanced=True,
        only=("when", "flagged"),
        help="Images left alone are bit for bit those without memnoise, also beside mitigated ones; costs the rows "
        "that guidance off saves.",
    )
    guidance: str = _setting(
        "method",
        label="Guidance starts",
        choices=STARTS,
        help="Until then the unconditional prediction is followed.",
    )
    gamma: float | None = _setting(
        None,
        label="Adjustment strength γ̃",
        low=0,
        high=10,
        step=0.01,
        methods=_BATCH,
        preset=True,
        help="How far each adjustment moves the noise, per unit of the probed difference.",
    )
    rho: float | None = _setting(
        None,
        label="Sharpness ρ",
        low=0,
        high=1000,
        step=0.1,
        methods=_BATCH,
        preset=True,
        help="Length of the probe, at the checkpoint's own image size; scaled with √(number of latent values).",
    )
    steps: int | None = _setting(
        None,
        label="Adjustments M",
        low=0,
        high=50,
        step=1,
        methods=_BATCH,
        preset=True,
        help="Each costs four network rows an image, forward only.",
    )
    tau: float | None = _setting(
        None,
        label="Guidance starts at timestep τ",
        low=0,
        high=999,
        step=0.1,
        only=("guidance", "tau"),
        preset=True,
        help="Guidance is off at timesteps above τ, whatever the sampler. 999: guidance from the first step. "
        "0: only in a last step at timestep 0, which many schedules have.",
    )
    latest: float | None = _setting(
        None,
        label="Transition at the latest at timestep",
        low=0,
        high=999,
        step=1,
        only=("guidance", "transition"),
        preset=True,
        help="Guidance starts at the first local minimum of the image's ‖Δ‖, or here. Costs a network row an image in "
        "each step before.",
    )
    tau_of: float | None = _setting(
        None,
        label="First timestep that τ belongs to",
        low=0,
        high=999,
        step=1,
        only=("guidance", "tau", "transition"),
        preset=True,
        help="A pass that starts at or below τ (or the latest) would never wait: there guidance starts at as large a "
        "share of the pass's own first timestep as τ is of this one. 0: at τ all the same.",
    )
    opposite: float | None = _setting(
        None,
        label="Opposite guidance s",
        low=0,
        high=20,
        step=0.5,
        only=("guidance", "tau", "transition"),
        preset=True,
        help="Until guidance starts, go away from the prompt: ε_uncond − s·Δ. 0: the unconditional prediction alone. "
        "Costs a network row an image in each step before.",
    )
    lr: float | None = _setting(
        None,
        label="Learning rate",
        low=0.00001,
        high=1,
        step=0.0001,
        methods=_DESCENT,
        preset=True,
        help="AdamW's (SAIL: Adam's), on the noise or the prompt's vectors.",
    )
    target: float | None = _setting(
        None,
        label="Target magnitude",
        low=0,
        high=1000,
        step=0.01,
        methods=_DESCENT,
        preset=True,
        help="Stop when ‖Δ‖ (SAIL: its loss) is below it. Absolute: at the checkpoint's own image size; scaled.",
    )
    target_kind: str | None = _setting(
        None,
        label="Target is",
        methods=_DESCENT,
        preset=True,
        choices={"absolute": "absolute", "fraction": "a fraction of the first ‖Δ‖"},
        help="A fraction suits checkpoints without published numbers.",
    )
    max_steps: int | None = _setting(
        None,
        label="Most optimiser steps",
        low=0,
        high=1000,
        step=1,
        methods=_DESCENT,
        preset=True,
        help="An image that has not reached the target by then, or at its pace will not come near it, keeps the best "
        "it had, and says so. With the target 0 all steps are taken.",
    )
    weight_decay: float = _setting(
        0.01,
        label="Weight decay",
        low=0,
        high=1,
        step=0.005,
        methods=_DECAYED,
        advanced=True,
        help="Keeps what is adjusted near its usual length.",
    )
    rule: str = _setting(
        "adamw",
        label="Steps",
        methods=_SAMPLE,
        advanced=True,
        choices=RULES,
        help="AdamW's, as in the paper; or of one length, learning rate · √d, with the noise's length put back.",
    )
    candidates: int = _setting(
        4,
        label="Noises to choose from",
        low=1,
        high=64,
        step=1,
        methods=("noise_selection",),
        help="The noise as drawn and others from the image's seed; two network rows each.",
    )
    tokens: int = _setting(
        4,
        label="Random tokens",
        low=0,
        high=32,
        step=1,
        methods=("random_tokens",),
        help="How many are inserted.",
    )
    bos_scale: float = _setting(
        1.25,
        label="Start token C",
        low=0.1,
        high=10,
        step=0.05,
        methods=("cross_attention",),
        help="The start token's logits are multiplied by it. 1: as they are.",
    )
    mask_padding: bool = _setting(
        True,
        label="Mask the padding",
        methods=("cross_attention",),
        help="Tokens after the prompt's end get no attention.",
    )
    padding: str = _setting(
        "both",
        label="Padding",
        methods=("padding_fix",),
        choices=PADDINGS,
        help="Token 0 pads prompt and negative prompt; without end token, the prompt's end is zero.",
    )
    alpha: float | None = _setting(
        None,
        label="SAIL α",
        low=0,
        high=10,
        step=0.01,
        methods=("sail",),
        preset=True,
        help="Weight of the noise's length in the loss.",
    )
    redraws: int = _setting(
        3,
        label="Drawn anew at most",
        low=0,
        high=20,
        step=1,
        methods=("sail",),
        help="An image that has not reached its target starts again, from other noise of its seed.",
    )
    eta: float = _setting(
        0.05,
        label="DivIn η",
        low=0,
        high=1,
        step=0.01,
        methods=("divin",),
        help="Length of the Langevin step.",
    )
    temperature: float = _setting(
        0.6,
        label="DivIn τ",
        low=0,
        high=10,
        step=0.05,
        methods=("divin",),
        help="Weight of the gradient. Has nothing to do with the timestep at which guidance starts.",
    )
    reference: str = _setting(
        "empty",
        label="Unconditional branch",
        advanced=True,
        choices={"empty": "empty prompt", "negative": "negative prompt"},
        help="What the prediction is measured against, and what is followed while guidance is off.",
    )
    trace: str = _setting(
        "off",
        label="Trace the magnitude",
        advanced=True,
        choices=TRACES,
        help="‖Δ‖ of every image along the trajectory. Costs nothing in steps with guidance on, a network row an image "
        "in those without; the noise as drawn costs a whole second sampling.",
    )
    hires: bool = _setting(
        False,
        label="Hires second pass too",
        advanced=True,
        help="Also adjust the noise that the hires pass adds. Off: only the first pass.",
    )
    fail_instead: bool = _setting(
        False,
        label="Fail instead of going on without",
        advanced=True,
        help="If the adjustment fails, fail the request; else the image comes unmitigated and says so.",
    )

    def of_method(self) -> dict[str, Any]:
        """The settings that the chosen method uses, by name."""
        values = dataclasses.asdict(self)
        return {name: value for name, value in values.items() if is_used(name, values)}

    @property
    def start(self) -> str:
        """When guidance starts: "first", "tau" or "transition"."""
        return METHODS[self.method].guidance if self.guidance == "method" else self.guidance

    @property
    def is_by_score(self) -> bool:
        """Whether the checkpoint's calibration says which images are mitigated."""
        return self.when == "flagged" and self.threshold is None

    def follows_calibration(self, preset: str) -> bool:
        """Whether all numbers come from the checkpoint's calibration if it has one; `preset` as in `resolved`."""
        return self.preset == "calibrated" or (preset == "relative" and self.preset == "auto")

    def takes_from_calibration(self, preset: str) -> tuple[str, ...]:
        """The numbers that come from the checkpoint's calibration if it has one; `preset` as in `resolved`."""
        if self.method != "sail":  # whose target is one for its own loss
            if self.follows_calibration(preset):
                return ("threshold", "gamma", "target", "target_kind")
            if self.preset == "auto" and preset in ABSOLUTE and self.method in _DESCENT:
                return ("threshold", "target", "target_kind")
        return ("threshold",)

    def resolved(self, preset: str, calibrated: Mapping[str, Any] | None = None) -> Settings:
        """These settings with nothing left to a preset. The threshold stays open without a calibration.

        Args:
            preset: names the numbers for what is not given (a key of `PRESET_VALUES`); ignored where the settings
                name one themselves.
            calibrated: what the checkpoint's calibration says (`Calibration.settings`). Its threshold is always
                taken, its other numbers where the preset is "calibrated" or nothing is published, its target also
                where none is published.
        """
        taken = self.takes_from_calibration(preset)
        if self.preset != "auto":
            preset = {"custom": "sd1", "calibrated": "relative"}.get(self.preset, self.preset)
        values = preset_values(preset, self.method)
        if calibrated is not None:
            values.update({name: value for name, value in calibrated.items() if name in taken})
        # A target means something only together with its kind: a preset never completes half of the pair.
        if self.target is not None:
            values["target_kind"] = "absolute"
        elif self.target_kind not in (None, values["target_kind"]):
            values["target"] = target_of_kind(self.target_kind, preset, self.method)
        # When guidance starts is taken as it is where it was asked for.
        if self.preset == "custom" or self.tau is not None or self.latest is not None:
            values["tau_of"] = 0.0
        missing = {name: value for name, value in values.items() if getattr(self, name) is None}
        return dataclasses.replace(self, **missing)

    def pinned(self, preset: str, calibrated: Mapping[str, Any] | None = None) -> Settings:
        """An equal form that means the same on any checkpoint, for metadata; arguments as in `resolved`.

        Settings that follow a preset throughout stay as they are. Where a value differs from the preset's, all
        of the method's values are spelled out under "custom".
        """
        if self.preset == "calibrated":
            return self  # its numbers are this machine's; what took effect is told apart
        resolved = self.resolved(preset, calibrated)
        if self.preset != "custom":
            nothing: dict[str, Any] = {name: None for name in SPECS if SPECS[name].preset}
            plain = dataclasses.replace(self, **nothing)
            if plain.resolved(preset, calibrated) == resolved:
                return plain
        # Beside a τ in so many words none means 0.
        return dataclasses.replace(resolved, preset="custom", tau_of=resolved.tau_of or None)


SPECS: dict[str, Spec] = {f.name: f.metadata["spec"] for f in fields(Settings)}
DEFAULTS = Settings()
DECIDING = ("method", *dict.fromkeys(spec.only[0] for spec in SPECS.values() if spec.only is not None))
"""The settings by which others are used or not."""

SIGMA_MAX = 14.6146
"""Of SD's noise schedule, t = 999: the scale of the latents that an Euler sampler starts from."""

# `tau_of` is the first timestep of the sampler and steps that τ was published for: DDIM's of 50 steps, and Euler's.
# `latest` is our own.
PRESET_VALUES: dict[str, dict[str, Any]] = {
    # Appendix B, DDIM.
    "sd1": {
        "gamma": 0.7, "rho": 50.0, "steps": 2, "tau": 900.0, "tau_of": 981.0, "latest": 700.0,
        "lr": 0.01, "target": 0.9, "target_kind": "absolute", "max_steps": 100, "opposite": 0.0,
        "alpha": 0.05,
    },
    # Appendix B, Euler. Which space γ̃, ρ and lr act in is not published. γ̃ and lr are divided by σ_max (γ̃ is then 0.7
    # on ε, SD1.4's very value), ρ is not: on the v-prediction miniature ‖Δ‖ then falls to 0.61 of itself and the
    # noise keeps its length, while ρ / σ_max leaves it at 0.92, and γ̃ as published brings it to 0.23 with noise of
    # twice its length (`benchmarks/sd2_units.py`). Targets are in v; the paper sweeps 5…20 and names no default.
    "sd2_v": {
        "gamma": round(0.7 / SIGMA_MAX, 4), "rho": 30.0, "steps": 4, "tau": 917.449, "tau_of": 999.0, "latest": 700.0,
        "lr": round(0.1 / SIGMA_MAX, 5), "target": 10.0, "target_kind": "absolute",
        "max_steps": 100, "opposite": 0.0, "alpha": 0.01,
    },
    # Checkpoints without published numbers (SDXL): SD1.4's, but the target relative to what the image starts from.
    "relative": {
        "gamma": 0.7, "rho": 50.0, "steps": 2, "tau": 900.0, "tau_of": 981.0, "latest": 700.0,
        "lr": 0.01, "target": 0.5, "target_kind": "fraction", "max_steps": 100, "opposite": 0.0,
        "alpha": 0.05,
    },
}  # fmt: skip

HALF = {"target": 0.5, "target_kind": "fraction"}
# An absolute target is one checkpoint's: on others of its kind ‖Δ‖ is of another size.
PRESET_VALUES["sd1_like"] = {**PRESET_VALUES["sd1"], **HALF}
PRESET_VALUES["sd2_v_like"] = {**PRESET_VALUES["sd2_v"], **HALF}

METHOD_VALUES: dict[str, dict[str, dict[str, Any]]] = {
    # Figure 4 sweeps 780…720 with noise as drawn, Figure 5 999…917 (SD 2.0).
    "static": {"sd1": {"tau": 740.0}, "relative": {"tau": 740.0}},
    # Swept: 1, 3, 5, 7, 9.
    "opposite_guidance": {preset: {"opposite": 5.0} for preset in ("sd1", "sd2_v", "relative")},
    # Swept for batches of 10: 3…7 and, in v, 50…90, of one norm over the batch; an image's is divided by √10.
    "prompt_embedding": {
        "sd1": {"lr": 0.05, "max_steps": 10, "target": round(5 / 10**0.5, 3)},
        "sd2_v": {"lr": 0.05, "max_steps": 10, "target": round(70 / 10**0.5, 3)},
        "relative": {"lr": 0.05, "max_steps": 10},
    },
    # The authors' code; it has no target of its own for SD 2.
    "sail": {
        "sd1": {"lr": 0.05, "max_steps": 10, "target": 8.2},
        "sd2_v": {"lr": 0.05, "max_steps": 10, "target": 0.5, "target_kind": "fraction"},
        "relative": {"lr": 0.05, "max_steps": 10},
    },
}
"""What a preset has for one method other than `PRESET_VALUES` does."""
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
"""SHA-256 of the files that a preset's targets were published for."""
ABSOLUTE = {"sd1_like": "sd1", "sd2_v_like": "sd2_v", "relative": "sd1"}
"""Presets without a published target, and the one whose target is taken where an absolute one is asked for."""


def preset_values(preset: str, method: str) -> dict[str, Any]:
    """The numbers of a preset (a key of `PRESET_VALUES`) for a method."""
    return {**PRESET_VALUES[preset], **METHOD_VALUES.get(method, {}).get(preset, {})}


def target_of_kind(kind: str, preset: str, method: str) -> Any:
    """The target to take where a preset's own is of the other kind."""
    others = ("relative",) if kind == "fraction" else (ABSOLUTE.get(preset, "sd1"), "sd1")
    found = (preset_values(other, method) for other in others)
    return next(values["target"] for values in found if values["target_kind"] == kind)


REFERENCE_SIZE = {"eps": 4 * 64 * 64, "v": 4 * 96 * 96}
"""d = C·H·W of the latents that the published values belong to: SD1 at 512 px, SD2 v at 768 px."""


def preset_for(*, parameterization: str, family: str, sha256: str | None = None) -> str:
    """The preset that "auto" stands for (a key of `PRESET_VALUES`).

    Args:
        family: "sd1", "sd2" or anything else.
        sha256: the checkpoint file's, where it is known.
    """
    if parameterization != "v" and family not in ("sd1", "sd2"):
        return "relative"
    preset = "sd2_v" if parameterization == "v" else "sd1"
    return preset if sha256 in PUBLISHED[preset] else f"{preset}_like"


def size_factor(d: int, parameterization: str) -> float:
    """√(d/d_ref), by which ρ and an absolute target scale: ‖Δ‖ and ‖x‖ both grow with √d."""
    return math.sqrt(d / REFERENCE_SIZE["v" if parameterization == "v" else "eps"])


def is_open(name: str) -> bool:
    """Whether a setting that is not given stays so: neither a default nor a preset has a number for it."""
    return getattr(DEFAULTS, name) is None and not SPECS[name].preset


def shown(name: str, value: Any) -> Any:
    """What people see of a value: the label of a choice, else the value itself."""
    choices = SPECS[name].choices
    return value if choices is None else choices[value]


def from_shown(name: str, label: Any) -> Any:
    """The value that a label stands for; what is no label is returned as it is, for `check` to judge."""
    choices = SPECS[name].choices or {}
    return next((value for value, text in choices.items() if text == label), label)


# Types and validation

_TYPES = {"bool": bool, "int": int, "float": float, "str": str}


def type_of(name: str) -> type:
    """bool, int, float or str: the type of a setting's value where one is given."""
    annotation = str(Settings.__dataclass_fields__[name].type)
    return _TYPES[annotation.removesuffix(" | None")]


def effective(name: str, values: Mapping[str, Any]) -> Any:
    """What a setting comes to among these (defaults where they are missing)."""
    value = values.get(name, getattr(DEFAULTS, name))
    if name == "guidance" and value == "method":
        return METHODS[effective("method", values)].guidance
    return value


def is_used(name: str, values: Mapping[str, Any]) -> bool:
    """Whether a setting means anything among these (defaults where they are missing)."""
    spec = SPECS[name]
    if spec.methods and effective("method", values) not in spec.methods:
        return False
    return spec.only is None or effective(spec.only[0], values) in spec.only[1:]


def deciders(name: str) -> tuple[str, ...]:
    """The settings by which this one is used or not."""
    spec = SPECS[name]
    other = () if spec.only is None else (spec.only[0],)
    # Where guidance starts unless the settings say otherwise is the method's.
    return ("method", *other) if spec.methods or "guidance" in other else other


def misplaced(name: str, values: Mapping[str, Any]) -> str:
    """Why a setting is not used among these, as the end of a sentence."""
    spec, method = SPECS[name], effective("method", values)
    if spec.methods and method not in spec.methods:
        *others, last = spec.methods
        owners = f"methods {', '.join(others)} and {last}" if others else f"method {last}"
        return f"belongs to the {owners}, but the method is {method}."
    assert spec.only is not None
    other, *wanted = spec.only
    return f"is used only where {other} is {' or '.join(wanted)}, but it is {effective(other, values)}."


def requirement(name: str) -> str:
    """What a value of this setting must be, in words."""
    spec, kind = SPECS[name], type_of(name)
    if spec.choices is not None:
        return "one of " + ", ".join(spec.choices)
    if kind is bool:
        return "true or false"
    return f"{'a whole number' if kind is int else 'a number'} from {spec.low:g} to {spec.high:g}"


def check(name: str, value: Any) -> Any:
    """The value in the setting's own type.

    Raises:
        SettingError: unknown name, wrong type, null, not finite, out of bounds, unknown choice.
    """
    if name not in SPECS:
        raise unknown(name)
    spec, kind = SPECS[name], type_of(name)
    ok: bool
    if spec.choices is not None:
        ok = isinstance(value, str) and value in spec.choices
    elif kind is bool:
        ok = isinstance(value, bool)
    else:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        # No conversion before: an integer may be too large for a float.
        ok = number and spec.low is not None and spec.high is not None and spec.low <= value <= spec.high
        if ok and kind is int:
            ok = float(value).is_integer()
        if ok:
            value = kind(value)
    if not ok:
        hint = meant(value, spec.choices or {})
        raise SettingError(f"memnoise: {name} = {echo(value)} is not valid{hint}; it must be {requirement(name)}.")
    return value


def unknown(name: Any) -> SettingError:
    """That there is no setting of this name, and which one was likely meant."""
    hint = meant(name, {known: spec.label for known, spec in SPECS.items()})
    return SettingError(f"memnoise: there is no setting {echo(name)}{hint}; the settings are {', '.join(SPECS)}.")


def from_mapping(given: Mapping[str, Any]) -> Settings:
    """Validated settings from names and values; missing names take the defaults.

    Raises:
        SettingError: see `check`; also a setting that the others leave without meaning.
    """
    for name in given:
        if not isinstance(name, str):
            raise unknown(name)
    settings = Settings(**{name: check(name, value) for name, value in given.items()})
    if METHODS[settings.method].module == "transition" and settings.start == "first":
        raise SettingError(
            f'memnoise: guidance = "first" leaves the method {settings.method} nothing to do; with it, guidance must '
            'start at "tau" or "transition".'
        )
    for name in given:
        if not is_used(name, given):
            raise SettingError(f"memnoise: {name} = {echo(given[name])} {misplaced(name, given)}")
    return settings


def from_text(name: str, text: Any) -> Any:
    """A setting's value from the text that infotext or a plot axis holds.

    Raises:
        SettingError: the text is no valid value.
    """
    kind = type_of(name) if name in SPECS else str
    value: Any = text
    if isinstance(text, str):
        text = text.strip()
        value = text
        try:
            if kind is bool:
                value = {"true": True, "false": False}[text.lower()]
            elif kind in (int, float):
                # What is no finite number is refused as it was written.
                value = float(text) if math.isfinite(float(text)) else text
        except (KeyError, ValueError):
            pass
    return check(name, value)


# Infotext

INFOTEXT = "Memnoise"
"""The key whose presence says that an image was made with memnoise; its value is the method."""


def infotext_key(name: str) -> str:
    return INFOTEXT if name == "method" else f"{INFOTEXT} {name.replace('_', ' ')}"


def to_infotext(settings: Settings) -> dict[str, Any]:
    """Infotext of enabled settings: the method, and what differs from the defaults."""
    text: dict[str, Any] = {INFOTEXT: settings.method}
    for name, value in settings.of_method().items():
        if name not in ("enabled", "method") and value != getattr(DEFAULTS, name):
            text[infotext_key(name)] = value
    return text


def from_infotext(params: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Settings that a picture's infotext names, and a sentence for each that cannot be read.

    An infotext without memnoise gives `{"enabled": False}`.
    """
    if INFOTEXT not in params:
        return {"enabled": False}, []
    given: dict[str, Any] = {"enabled": True}
    problems = []
    for name in SPECS:
        key = infotext_key(name)
        if name == "enabled" or key not in params:
            continue
        try:
            given[name] = from_text(name, params[key])
        except SettingError as error:
            problems.append(str(error))
    return given, problems


# JSON Schema


def json_schema() -> dict[str, Any]:
    """The settings as a JSON Schema document (draft 2020-12)."""
    kinds = {bool: "boolean", int: "integer", float: "number", str: "string"}
    properties: dict[str, Any] = {}
    for name, spec in SPECS.items():
        entry: dict[str, Any] = {"type": kinds[type_of(name)], "title": spec.label, "description": spec.help}
        if spec.choices is not None:
            entry["enum"] = list(spec.choices)
        if spec.low is not None:
            entry |= {"minimum": spec.low, "maximum": spec.high}
        if getattr(DEFAULTS, name) is not None:
            entry["default"] = getattr(DEFAULTS, name)
        if spec.preset:
            entry["x-presets"] = {preset: values[name] for preset, values in PRESET_VALUES.items()}
            own = {
                method: {preset: numbers[name] for preset, numbers in presets.items() if name in numbers}
                for method, presets in METHOD_VALUES.items()
            }
            entry["x-method-presets"] = {method: numbers for method, numbers in own.items() if numbers}
        if spec.methods:
            entry["x-methods"] = list(spec.methods)
        if spec.only is not None:
            entry["x-only"] = {spec.only[0]: list(spec.only[1:])}
        entry["x-infotext"] = infotext_key(name)
        properties[name] = entry
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "memnoise settings",
        "description": "Second element of alwayson_scripts.memnoise.args, after the enabled flag. A setting "
        "without a default takes its value from the preset (x-presets), or, the threshold, from the calibration.",
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
    }
