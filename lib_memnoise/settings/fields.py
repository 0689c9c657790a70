"""The settings: one field for each, with its texts and bounds for the page, the API and the documentation.

Nothing here imports torch, gradio or a WebUI.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from lib_memnoise.registry import METHODS
from lib_memnoise.settings.presets import ABSOLUTE, preset_values, target_of_kind


@dataclass(frozen=True)
class Spec:
    """The description of one setting, besides its name, type and default."""

    label: str
    help: str
    low: float | None = None
    high: float | None = None
    step: float | None = None
    choices: Mapping[str, str] | None = None
    """Accepted values, and what people see for each."""
    methods: tuple[str, ...] = ()
    """The methods that use it; empty means all."""
    only: tuple[str, ...] | None = None
    """Another setting, followed by the values of that setting with which this one is used."""
    only_with: Mapping[str, tuple[str, ...]] | None = None
    """The same, for some of the methods."""
    preset: bool = False
    """Whether a preset supplies the value where none is given."""
    advanced: bool = False
    """Whether the page shows it under "More"."""


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
RULES = {
    "adamw": "AdamW",
    "sphere": "of one length, on the sphere",
    "forward": "batch-wise's, without a gradient",
}
PADDINGS = {
    "both": "token 0, and no end token",
    "pad": "token 0 as padding",
    "end": "no end token",
}
_BATCH, _SAMPLE, _FORWARD = ("batch_wise",), ("per_sample",), ("batch_wise", "per_sample")
_BY_GRADIENT = {"per_sample": ("rule", "adamw", "sphere")}
_WITHOUT = {"per_sample": ("rule", "forward")}
_DESCENT = ("per_sample", "prompt_embedding", "sail")
"""Methods that descend until a target is reached."""
_DECAYED = ("per_sample", "prompt_embedding")


@dataclass(frozen=True)
class Settings:
    """The validated settings of one generation. None means that the preset supplies the value."""

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
        methods=_FORWARD,
        only_with=_WITHOUT,
        preset=True,
        help="How far each adjustment moves the noise, per unit of the probed difference.",
    )
    rho: float | None = _setting(
        None,
        label="Sharpness ρ",
        low=0,
        high=1000,
        step=0.1,
        methods=_FORWARD,
        only_with=_WITHOUT,
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
    beta: float = _setting(
        0.31,
        label="Repulsion β",
        low=0,
        high=2,
        step=0.01,
        methods=("repulsion",),
        help="How far the noise is moved, in units of its own length.",
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
        only_with=_BY_GRADIENT,
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
        only_with=_BY_GRADIENT,
        advanced=True,
        help="Keeps what is adjusted near its usual length.",
    )
    rule: str = _setting(
        "adamw",
        label="Steps",
        methods=_SAMPLE,
        advanced=True,
        choices=RULES,
        help="AdamW's, as in the paper; of one length, learning rate · √d, with the noise's length put back; or "
        "batch-wise's, repeated until the target is reached: forward only, four network rows each.",
    )
    keep_length: bool = _setting(
        False,
        label="Keep the noise's length",
        methods=_SAMPLE,
        only=("rule", "forward"),
        advanced=True,
        help="Put the noise's length back after every step.",
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

    @property
    def start(self) -> str:
        """When guidance starts: "first", "tau" or "transition"."""
        return METHODS[self.method].guidance if self.guidance == "method" else self.guidance

    @property
    def is_by_score(self) -> bool:
        """Whether the checkpoint's calibration decides which images are mitigated."""
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

    def resolved(self, preset: str, calibrated: Mapping[str, Any] | None = None) -> ResolvedSettings:
        """These settings with every value filled in. Only the threshold stays None without a calibration.

        Args:
            preset: the preset that supplies missing values (a key of `PRESET_VALUES`); ignored where the settings
                name one themselves.
            calibrated: the numbers of the checkpoint's calibration (`Calibration.settings`). Its threshold is always
                used; its target where none is published for the checkpoint; and all of its numbers where the preset
                is "calibrated" or nothing is published.
        """
        taken = self.takes_from_calibration(preset)
        if self.preset != "auto":
            preset = {"custom": "sd1", "calibrated": "relative"}.get(self.preset, self.preset)
        values = preset_values(preset, self.method)
        if calibrated is not None:
            values.update({name: value for name, value in calibrated.items() if name in taken})
        # A target has a meaning only together with its kind, so a preset never supplies one of the two alone.
        if self.target is not None:
            values["target_kind"] = "absolute"
        elif self.target_kind not in (None, values["target_kind"]):
            values["target"] = target_of_kind(self.target_kind, preset, self.method)
        # A start of guidance that was given explicitly is not rescaled.
        if self.preset == "custom" or self.tau is not None or self.latest is not None:
            values["tau_of"] = 0.0
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        missing = {name: value for name, value in values.items() if given[name] is None}
        return ResolvedSettings(**{**given, **missing})

    def pinned(self, preset: str, calibrated: Mapping[str, Any] | None = None) -> Settings:
        """Equivalent settings that mean the same on any checkpoint, for metadata; arguments as in `resolved`.

        Settings that follow a preset throughout are not changed. Where a value differs from the preset's, all of the
        method's values are spelled out under "custom".
        """
        if self.preset == "calibrated":
            return self  # its numbers are this machine's own; the report has those that took effect
        resolved = self.resolved(preset, calibrated)
        if self.preset != "custom":
            nothing: dict[str, Any] = {name: None for name in SPECS if SPECS[name].preset}
            plain = dataclasses.replace(self, **nothing)
            if plain.resolved(preset, calibrated) == resolved:
                return plain
        # Together with an explicit τ, None means 0.
        spelled = {**vars(resolved), "preset": "custom", "tau_of": resolved.tau_of or None}
        return Settings(**spelled)


class ResolvedSettings(Settings):
    """Settings with every value filled in, as methods receive them."""


SPECS: dict[str, Spec] = {f.name: f.metadata["spec"] for f in fields(Settings)}
DEFAULTS = Settings()
DECIDING = ("method", *dict.fromkeys(spec.only[0] for spec in SPECS.values() if spec.only is not None))
"""The settings that decide whether others are used."""


def is_open(name: str) -> bool:
    """Whether a setting may stay empty: neither a default nor a preset supplies a value."""
    return getattr(DEFAULTS, name) is None and not SPECS[name].preset


def shown(name: str, value: Any) -> Any:
    """What people see for a value: the label of a choice, otherwise the value itself."""
    choices = SPECS[name].choices
    return value if choices is None else choices[value]


def from_shown(name: str, label: Any) -> Any:
    """The value that a label stands for. Anything else is returned unchanged, for `check` to judge."""
    choices = SPECS[name].choices or {}
    return next((value for value, text in choices.items() if text == label), label)
