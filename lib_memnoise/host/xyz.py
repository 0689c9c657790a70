"""Axes of the X/Y/Z plot, one for each setting."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from modules import scripts

from lib_memnoise.host.arguments import PLOT, SLOTS, Refusal, from_arguments
from lib_memnoise.host.refusals import loses_errors
from lib_memnoise.settings import SPECS, SettingError, deciders, from_text, is_used, misplaced, type_of

PREFIX = "[Memnoise] "
TITLE = "Memnoise"


def label(name: str) -> str:
    return PREFIX + ("Enabled" if name == "enabled" else SPECS[name].label)


def xyz_module() -> Any:
    for data in scripts.scripts_data:
        if data.script_class.__module__ in ("xyz_grid.py", "scripts.xyz_grid", "xyz_grid"):
            return data.module
    return None


def register() -> bool:
    """Add the axes, once; False if the plot script is not loaded (yet)."""
    module = xyz_module()
    if module is None:
        return False
    if not any(option.label.startswith(PREFIX) for option in module.axis_options):
        module.axis_options.extend(axis(module, name) for name in SPECS)
    return True


def axis(module: Any, name: str) -> Any:
    numeric = type_of(name) in (int, float)
    return module.AxisOption(
        label(name),
        type_of(name) if numeric else (lambda text: text),
        set_in_cell(name),
        confirm=confirm(name),
        choices=None if numeric else (lambda: choices(name)),
        prepare=prepare(name) if numeric else None,
    )


def choices(name: str) -> list[str]:
    return list(SPECS[name].choices or ("True", "False"))


def set_in_cell(name: str) -> Callable[[Any, Any, Any], None]:
    def apply(p: Any, value: Any, values: Any) -> None:
        # A new dict each time: cells are shallow copies of one another.
        setattr(p, PLOT, {**getattr(p, PLOT, {}), name: from_text(name, value)})

    return apply


RANGE = re.compile(r"\s*([+-]?[\d.]+)\s*-\s*([+-]?[\d.]+)\s*(?:[(\[].*)?")
"""The plot script's own range syntax, `1-5 (+2)` or `1-5 [3]`: left to it, its values are confirmed after."""


def ends(value: str) -> tuple[str, ...]:
    """Of a range; of anything else itself."""
    found = RANGE.fullmatch(value)
    return found.groups() if found else (value,)


def parts(text: str) -> list[str]:
    return [value.strip() for value in text.split(",") if value.strip()]


def prepare(name: str) -> Callable[[str], list[str]]:
    def split(text: str) -> list[str]:
        values = parts(text)
        for value in values:
            if not RANGE.fullmatch(value):
                refuse_bad_value(name, value)
        return [value if RANGE.fullmatch(value) else format(from_text(name, value)) for value in values]

    return split


def refuse_bad_value(name: str, value: Any) -> None:
    try:
        from_text(name, value)
    except SettingError as error:
        raise Refusal(str(error)) from None


def confirm(name: str) -> Callable[[Any, Any], None]:
    """Checks before the first cell: the values, and that some cell's method uses the setting."""

    def check(p: Any, values: Any) -> None:
        for value in values:
            refuse_bad_value(name, value)
        values_of = page_arguments(p)
        plotted = any(plots_over(p, other) for other in deciders(name))
        if not plotted and not is_used(name, values_of):
            raise Refusal(f"memnoise: the axis {label(name)} {misplaced(name, values_of)}")
        if name != "enabled" and not plots_over(p, "enabled") and not page_enabled(p):
            raise Refusal(f"memnoise: the axis {label(name)} needs memnoise enabled.")

    return check


def refused_axis(p: Any) -> Refusal | None:
    """`setup`: what would be refused of the axes that are asked for, where the host would lose what the plot raises."""
    if not p.script_args or not p.script_args[0] or not loses_errors(p):
        return None
    script = p.scripts.selectable_scripts[p.script_args[0] - 1]
    options = getattr(script, "current_axis_options", None)
    if options is None:
        return None
    args = p.script_args[script.args_from : script.args_to]
    as_text = args[-1]
    try:
        for kind, text, chosen in (args[3 * number : 3 * number + 3] for number in range(3)):
            option = options[kind or 0]
            if option.label.startswith(PREFIX):
                values = parts(text) if option.choices is None or as_text else chosen or []
                option.confirm(p, [end for value in values for end in ends(value)])
    except Refusal as refusal:
        return refusal
    return None


def page_arguments(p: Any) -> dict[str, Any]:
    for script in p.scripts.alwayson_scripts:
        if script.title() == TITLE:
            return from_arguments(p.script_args[script.args_from : script.args_from + len(SLOTS)])
    return {}


def page_enabled(p: Any) -> bool:
    return page_arguments(p).get("enabled", False)


def plots_over(p: Any, name: str) -> bool:
    """Whether one of the plot's axes is this setting."""
    for script in p.scripts.selectable_scripts:
        options = getattr(script, "current_axis_options", None)
        if options is not None:
            first = script.args_from
            types = (p.script_args[first + 3 * axis_number] or 0 for axis_number in range(3))
            return any(options[kind].label == label(name) for kind in types)
    return False
