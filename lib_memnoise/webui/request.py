"""Turns the script's arguments (page values, an API payload, a plot cell) into validated settings.

An X/Y/Z cell takes precedence over the API's dict, and that over infotext and page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import HTTPException
from modules import errors

from lib_memnoise.errors import echo, printable
from lib_memnoise.settings import (
    DECIDING,
    SPECS,
    SettingError,
    Settings,
    check,
    from_mapping,
    from_shown,
    from_text,
    is_open,
    is_used,
)
from lib_memnoise.webui.failures import loses_errors, named_on_the_page
from lib_memnoise.webui.session import PLOT, REFUSED

TITLE = "Memnoise"
"""The script's title, by which requests and other scripts refer to it."""

CONTROLS = tuple(name for name in SPECS if name != "enabled")
"""The settings that have a control on the page, in order."""

SLOTS = ("enabled", "options", "surplus", *CONTROLS, "unreadable")
"""The script's arguments. `options` takes the API's dict and `surplus` catches an argument too many; both stay empty on
the page. `unreadable` holds the parts of a pasted infotext that could not be read."""


@named_on_the_page
class Refusal(HTTPException):
    """A request is refused, for bad settings: HTTP 422 in the API, and a readable sentence on the page."""

    def __init__(self, message: str, status: int = 422) -> None:
        super().__init__(status_code=status, detail=message)

    def __str__(self) -> str:
        return str(self.detail).removeprefix("memnoise: ")


def requested(p: Any, args: Sequence[Any]) -> Settings | Refusal:
    """The settings of one generation, or the reason why they cannot be used."""
    refused: Refusal | None = getattr(p, REFUSED, None)
    if refused is not None:
        return refused
    try:
        plot: Mapping[str, Any] = getattr(p, PLOT, {})
        merged = {**from_arguments(args), **plot}
        if plot.keys() & DECIDING:
            # In a plot over methods each cell keeps only the settings that its own method uses.
            merged = {name: value for name, value in merged.items() if is_used(name, merged)}
        return from_mapping(merged)
    except SettingError as error:
        return Refusal(str(error))
    except Exception as error:
        # The host would swallow it and make the image without any mitigation.
        errors.report("memnoise: the settings could not be read", exc_info=True)
        return Refusal(f"memnoise: the settings could not be read ({type(error).__name__}).", status=500)


def from_arguments(args: Sequence[Any]) -> dict[str, Any]:
    """Names and values from the script's arguments (see `SLOTS`).

    `[true, {…}]` and `[{"enabled": true, …}]` come from the API; a dict alone means enabled unless it says otherwise.
    All other forms are the page's controls, or the API's infotext written over them.

    Raises:
        SettingError: arguments of another form.
    """
    if len(args) != len(SLOTS):
        raise SettingError(f"memnoise: the script was given {len(args)} arguments instead of {len(SLOTS)}.")
    slots = dict(zip(SLOTS, args))
    first, options = slots["enabled"], slots["options"]
    if isinstance(first, Mapping):
        if options not in (None, ""):
            raise surplus(options)
        return {"enabled": True, **first}
    if not isinstance(first, bool):
        raise SettingError(
            f"memnoise: the first argument = {echo(first)} is not valid; it must be true, false or a dict of settings."
        )
    if isinstance(options, Mapping):
        if slots["surplus"] not in (None, ""):
            raise surplus(slots["surplus"])
        return {"enabled": first, **options}
    if options is not None:
        raise SettingError(
            f"memnoise: the second argument = {echo(options)} is not valid; it must be a dict of settings."
        )
    if slots["surplus"] not in (None, ""):
        raise surplus(slots["surplus"])
    if first and slots["unreadable"]:
        raise SettingError(f"memnoise: the pasted infotext cannot be used: {_complaint(slots['unreadable'])}")
    return {"enabled": first, **from_controls(slots)}


def from_controls(slots: Mapping[str, Any]) -> dict[str, Any]:
    """Names and values from the page's controls: those that the method uses; a preset's values only with Custom."""
    values = {name: from_shown(name, slots[name]) for name in CONTROLS if not (is_open(name) and is_empty(slots[name]))}
    deciding = {name: check(name, values[name]) for name in CONTROLS if name in DECIDING}
    preset = check("preset", values["preset"])
    return {
        name: from_text(name, value) if is_open(name) else value
        for name, value in values.items()
        if is_used(name, deciding) and (preset == "custom" or not SPECS[name].preset)
    }


def is_empty(text: Any) -> bool:
    """Whether a control that may stay empty is empty."""
    return text is None or (isinstance(text, str) and not text.strip())


def surplus(value: Any) -> SettingError:
    """The error for an argument too many."""
    return SettingError(
        f"memnoise: the argument {echo(value)} is one too many; there may be true or false and one dict of settings."
    )


def _complaint(value: Any) -> str:
    """The content of `unreadable`, made safe to repeat: sentences, unless a program put something else there."""
    if not isinstance(value, str):
        return f"{echo(value)}."
    text = "".join(c if c == '"' else printable(c) for c in value[:1000].replace("memnoise: ", ""))
    return text if len(value) <= 1000 else f"{text}..."


def selected_script(p: Any) -> Any:
    """The selectable script that a request runs, such as a plot; None where it runs none."""
    number = p.script_args_value[0] if p.script_args_value else None
    # Generations that do not come from the host's page or API may have something else in its place.
    if not isinstance(number, int) or isinstance(number, bool):
        return None
    selectable = getattr(p.scripts, "selectable_scripts", ())
    return selectable[number - 1] if 0 < number <= len(selectable) else None


class RefusedArguments(tuple):
    """A request's arguments, which raise when they are unpacked for a selectable script.

    X/Y/Z catches errors in its cells, so bad settings would fail every cell in turn. The host unpacks the arguments
    just before it runs such a script, which is the last place where an error fails the whole request.
    """

    refusal: Refusal

    def __iter__(self) -> Any:
        raise self.refusal


def refuse_before_plot(p: Any, refusal: Refusal) -> None:
    """`setup`: make a request that runs a selectable script fail before the script starts."""
    arguments = p.script_args_value
    if selected_script(p) is None:
        return
    if loses_errors(p):  # without the script it is a plain request, which is refused
        p.script_args_value = (0, *arguments[1:])
        setattr(p, REFUSED, refusal)
        return
    refused = RefusedArguments(arguments)
    refused.refusal = refusal
    p.script_args_value = refused
