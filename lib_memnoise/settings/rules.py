"""Types and bounds of settings, and the rules of which settings are used together with which others."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from lib_memnoise.errors import SettingError, echo, meant
from lib_memnoise.registry import METHODS
from lib_memnoise.settings.fields import DEFAULTS, SPECS, Settings

_TYPES = {"bool": bool, "int": int, "float": float, "str": str}


def type_of(name: str) -> type:
    """The type of a setting's value where one is given: bool, int, float or str."""
    annotation = str(Settings.__dataclass_fields__[name].type)
    return _TYPES[annotation.removesuffix(" | None")]


def effective(name: str, values: Mapping[str, Any]) -> Any:
    """A setting's effective value among these; missing settings have their defaults."""
    value = values.get(name, getattr(DEFAULTS, name))
    if name == "guidance" and value == "method":
        return METHODS[effective("method", values)].guidance
    return value


def condition(name: str, values: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Another setting, followed by the values of it with which this one is used among these; None: there is none."""
    spec = SPECS[name]
    return spec.only if spec.only_with is None else spec.only_with.get(effective("method", values))


def is_used(name: str, values: Mapping[str, Any]) -> bool:
    """Whether a setting has an effect among these; missing settings have their defaults."""
    spec = SPECS[name]
    if spec.methods and effective("method", values) not in spec.methods:
        return False
    needed = condition(name, values)
    return needed is None or effective(needed[0], values) in needed[1:]


def used_settings(settings: Settings) -> dict[str, Any]:
    """The settings that the chosen method uses, by name."""
    values = dataclasses.asdict(settings)
    return {name: value for name, value in values.items() if is_used(name, values)}


def deciders(name: str) -> tuple[str, ...]:
    """The settings that decide whether this one is used."""
    spec = SPECS[name]
    needed = [*(spec.only_with or {}).values(), *([] if spec.only is None else [spec.only])]
    other = tuple(dict.fromkeys(pair[0] for pair in needed))
    # By default the method decides where guidance starts, so "guidance" depends on "method".
    return ("method", *other) if spec.methods or "guidance" in other else other


def misplaced(name: str, values: Mapping[str, Any]) -> str:
    """Why a setting is not used among these, as the end of a sentence."""
    spec, method = SPECS[name], effective("method", values)
    if spec.methods and method not in spec.methods:
        *others, last = spec.methods
        owners = f"methods {', '.join(others)} and {last}" if others else f"method {last}"
        return f"belongs to the {owners}, but the method is {method}."
    needed = condition(name, values)
    assert needed is not None
    other, *wanted = needed
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
    """The value, converted to the setting's own type.

    Raises:
        SettingError: the name is unknown, or the value has the wrong type, is null, not finite, out of bounds or not
            one of the choices.
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
        # Compared before it is converted: an integer may be too large for a float.
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
    """The error for an unknown name, with the name that was likely meant."""
    hint = meant(name, {known: spec.label for known, spec in SPECS.items()})
    return SettingError(f"memnoise: there is no setting {echo(name)}{hint}; the settings are {', '.join(SPECS)}.")


def from_mapping(given: Mapping[str, Any]) -> Settings:
    """Validated settings from names and values; missing settings have their defaults.

    Raises:
        SettingError: see `check`; or the other settings leave one without an effect.
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
    """A setting's value from its text in infotext or on a plot's axis.

    Raises:
        SettingError: the text is not a valid value.
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
                # A text that is not a finite number is passed on, so that the error shows it as it was written.
                value = float(text) if math.isfinite(float(text)) else text
        except (KeyError, ValueError):
            pass
    return check(name, value)
