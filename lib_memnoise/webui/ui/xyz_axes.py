"""The axes of the X/Y/Z plot, one for each setting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from modules import scripts

from lib_memnoise.errors import echo
from lib_memnoise.settings import SPECS, SettingError, deciders, from_text, is_used, misplaced, requirement, type_of
from lib_memnoise.settings.axes import axis_values
from lib_memnoise.webui.request import SLOTS, TITLE, Refusal, from_arguments, selected_script
from lib_memnoise.webui.session import PLOT

PREFIX = "[Memnoise] "


def label(name: str) -> str:
    """The label of a setting's axis."""
    return PREFIX + ("Enabled" if name == "enabled" else SPECS[name].label)


def xyz_module() -> Any:
    """The host's module of the plot script; None where it is not loaded."""
    for data in scripts.scripts_data:
        if data.script_class.__module__ in ("xyz_grid.py", "scripts.xyz_grid", "xyz_grid"):
            return data.module
    return None


def register() -> bool:
    """Add the axes, unless they are there. Returns False if the plot script is not loaded (yet)."""
    module = xyz_module()
    if module is None:
        return False
    if not any(option.label.startswith(PREFIX) for option in module.axis_options):
        module.axis_options.extend(axis(module, name) for name in SPECS)
    return True


def axis(module: Any, name: str) -> Any:
    """The plot script's option for a setting."""
    numeric = type_of(name) in (int, float)
    return module.AxisOption(
        label(name),
        type_of(name) if numeric else (lambda text: text),
        set_in_cell(name),
        confirm=confirm(name),
        choices=None if numeric else (lambda: choices(name)),
        prepare=prepare(name),
    )


def choices(name: str) -> list[str]:
    """The values in an axis's dropdown."""
    return list(SPECS[name].choices or ("True", "False"))


def set_in_cell(name: str) -> Callable[[Any, Any, Any], None]:
    """A function that sets the setting for one cell of the plot."""

    def apply(p: Any, value: Any, values: Any) -> None:
        # A new dict each time: cells are shallow copies of one another.
        setattr(p, PLOT, {**getattr(p, PLOT, {}), name: from_text(name, value)})

    return apply


def prepare(name: str) -> Callable[[Any], list[str]]:
    """A function that turns an axis's text into valid values. For some texts the host's own raises or never ends."""

    def split(text: Any) -> list[str]:
        try:
            return axis_values(name, text)
        except SettingError as error:
            raise Refusal(str(error)) from None

    return split


def confirm(name: str) -> Callable[[Any, Any], None]:
    """A check before the first cell: that the values are valid, and that some cell's method uses the setting."""

    def check(p: Any, values: Any) -> None:
        try:
            for value in values:
                from_text(name, value)
        except SettingError as error:
            raise Refusal(str(error)) from None
        if not values:
            raise Refusal(f"memnoise: the axis {label(name)} has no values; each must be {requirement(name)}.")
        values_of = page_arguments(p)
        plotted = any(plots_over(p, other) for other in deciders(name))
        if not plotted and not is_used(name, values_of):
            raise Refusal(f"memnoise: the axis {label(name)} {misplaced(name, values_of)}")
        if name != "enabled" and not plots_over(p, "enabled") and not page_enabled(p):
            raise Refusal(f"memnoise: the axis {label(name)} needs memnoise enabled.")

    return check


def axes_of(p: Any, script: Any) -> list[tuple[Any, Any, Any]]:
    """The plot's three axes: for each its option (None for one that the plot does not know), text and chosen values."""
    options = script.current_axis_options
    args = p.script_args[script.args_from : script.args_to]
    axes = []
    for kind, text, chosen in (args[3 * number : 3 * number + 3] for number in range(3)):
        known = kind is None or (isinstance(kind, int) and -len(options) <= kind < len(options))
        axes.append((options[kind or 0] if known else None, text, chosen))
    return axes


def refused_axis(p: Any) -> Refusal | None:
    """`setup`: the reason to refuse the request's axes; None where they are valid.

    The plot script checks axes as well, but some hosts lose what it raises; it silently makes no picture where there
    are no values; and it fails before our check where the values are not a list.
    """
    script = selected_script(p)
    if not hasattr(script, "current_axis_options"):
        return None
    as_text = p.script_args[script.args_from : script.args_to][-1]
    try:
        for option, text, chosen in axes_of(p, script):
            if option is None or not option.label.startswith(PREFIX):
                continue
            if option.choices is None or as_text:
                option.confirm(p, option.prepare(text))
            else:
                check_chosen(option, text, chosen)
                option.confirm(p, chosen)
    except Refusal as refusal:
        return refusal
    return None


def check_chosen(option: Any, text: Any, chosen: Any) -> None:
    """Raise `Refusal` unless there are values in an axis's dropdown."""
    if chosen not in (None, []) and not isinstance(chosen, (list, tuple)):
        raise Refusal(f"memnoise: {option.label} = {echo(chosen)} is not valid; it must be a list of values.")
    if not chosen:
        elsewhere = (
            f"; the text {echo(text)} is read only where the plot is told to use text inputs instead of dropdowns"
            if text
            else ""
        )
        raise Refusal(f"memnoise: the axis {option.label} has no values{elsewhere}.")


def page_arguments(p: Any) -> dict[str, Any]:
    """The settings in the request's own arguments, by name."""
    for script in p.scripts.alwayson_scripts:
        if script.title() == TITLE:
            return from_arguments(p.script_args[script.args_from : script.args_from + len(SLOTS)])
    return {}


def page_enabled(p: Any) -> bool:
    """Whether the request's own arguments enable memnoise."""
    return page_arguments(p).get("enabled", False)


def plots_over(p: Any, name: str) -> bool:
    """Whether one of the plot's axes is this setting."""
    for script in p.scripts.selectable_scripts:
        if hasattr(script, "current_axis_options"):
            return any(option is not None and option.label == label(name) for option, _, _ in axes_of(p, script))
    return False
