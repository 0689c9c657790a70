"""The settings as a JSON Schema document."""

from __future__ import annotations

from typing import Any

from lib_memnoise.settings.fields import DEFAULTS, SPECS
from lib_memnoise.settings.infotext import infotext_key
from lib_memnoise.settings.presets import METHOD_VALUES, PRESET_VALUES
from lib_memnoise.settings.rules import type_of


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
            by_method = {
                method: {preset: numbers[name] for preset, numbers in presets.items() if name in numbers}
                for method, presets in METHOD_VALUES.items()
            }
            entry["x-method-presets"] = {method: numbers for method, numbers in by_method.items() if numbers}
        if spec.methods:
            entry["x-methods"] = list(spec.methods)
        if spec.only is not None:
            entry["x-only"] = {spec.only[0]: list(spec.only[1:])}
        if spec.only_with is not None:
            entry["x-only-with"] = {
                method: {other: list(values)} for method, (other, *values) in spec.only_with.items()
            }
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
