"""Settings in a picture's infotext."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lib_memnoise.errors import SettingError
from lib_memnoise.settings.fields import DEFAULTS, SPECS, Settings
from lib_memnoise.settings.rules import from_text, used_settings

INFOTEXT = "Memnoise"
"""The key that marks an image as made with memnoise; its value is the method."""


def infotext_key(name: str) -> str:
    """The infotext key of a setting."""
    return INFOTEXT if name == "method" else f"{INFOTEXT} {name.replace('_', ' ')}"


def to_infotext(settings: Settings) -> dict[str, Any]:
    """The infotext of enabled settings: the method, and every used setting that differs from its default."""
    text: dict[str, Any] = {INFOTEXT: settings.method}
    for name, value in used_settings(settings).items():
        if name not in ("enabled", "method") and value != getattr(DEFAULTS, name):
            text[infotext_key(name)] = value
    return text


def from_infotext(params: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The settings in a picture's infotext, and a sentence for each that cannot be read.

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
