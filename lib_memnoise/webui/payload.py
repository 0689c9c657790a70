"""Checks memnoise's part of a request to the host's own API, before the host turns it into script arguments.

The host lower-cases titles, drops surplus arguments and fills in the page's values for missing ones, so a request can
silently lose its mitigation. The processing object no longer has the request, so it is checked earlier.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from lib_memnoise.errors import echo
from lib_memnoise.settings import SPECS, SettingError
from lib_memnoise.webui.request import SLOTS, TITLE, Refusal, surplus

PATHS = ("/sdapi/v1/txt2img", "/sdapi/v1/img2img")
FORM = '{"args": [true, {"method": "batch_wise"}]}'


def watch(app: Any) -> None:
    """Make the host's API object check requests before it makes script arguments.

    Only the app's own API object is changed, which is made anew with each app: no class of the host is changed, and no
    body is read twice. An object without the method is left as it is.
    """
    endpoints = (getattr(route, "endpoint", None) for route in app.routes if getattr(route, "path", "") in PATHS)
    owners: list[Any] = [getattr(endpoint, "__self__", None) for endpoint in endpoints]
    for api in {id(owner): owner for owner in owners}.values():
        original = getattr(api, "init_script_args", None)
        if original is not None:
            api.init_script_args = checked(original)


def checked(original: Callable[..., Any]) -> Callable[..., Any]:
    """The host's `init_script_args`, with a check before it."""

    @functools.wraps(original)
    def init_script_args(request: Any, *args: Any, **kwargs: Any) -> Any:
        check(getattr(request, "alwayson_scripts", None))
        return original(request, *args, **kwargs)

    return init_script_args


def check(scripts: Any) -> None:
    """Check a request's `alwayson_scripts`, as far as memnoise is concerned.

    Raises:
        Refusal: memnoise is named twice, or its entry has the wrong form. The settings themselves are validated when a
            generation begins.
    """
    if not isinstance(scripts, Mapping):
        return
    titles = [title for title in scripts if isinstance(title, str) and title.lower() == TITLE.lower()]
    if len(titles) > 1:
        named = " and ".join(echo(title) for title in titles)
        raise Refusal(f"memnoise: alwayson_scripts has {named}, which are one script; it must be there once.")
    for title in titles:
        check_entry(scripts[title])


def check_entry(entry: Any) -> None:
    """Raise `Refusal` unless memnoise's entry has the form of `FORM`."""
    if not isinstance(entry, Mapping):
        raise Refusal(
            f"memnoise: alwayson_scripts.memnoise = {echo(entry)} is not valid; it must be a dict such as {FORM}."
        )
    if "args" not in entry:
        if entry:  # an empty entry means off, like none at all
            raise Refusal(
                f"memnoise: alwayson_scripts.memnoise = {echo(entry)} has no args; it must be a dict such as {FORM}."
            )
        return
    misplaced = [name for name in entry if name in SPECS]
    if misplaced:
        raise Refusal(f"memnoise: {misplaced[0]} stands beside args; settings belong within it, as in {FORM}.")
    args = entry["args"]
    if not isinstance(args, (list, tuple)):
        raise Refusal(f"memnoise: args = {echo(args)} is not valid; it must be a list, as in {FORM}.")
    try:
        check_surplus(args)
    except SettingError as error:
        raise Refusal(str(error)) from None


def check_surplus(args: Any) -> None:
    """Raise `SettingError` if an argument follows a dict of settings, or the last control's value."""
    form = next((number for number, value in enumerate(args[:2]) if isinstance(value, Mapping)), len(SLOTS) - 1)
    for value in args[form + 1 :]:
        if value not in (None, ""):
            raise surplus(value)
