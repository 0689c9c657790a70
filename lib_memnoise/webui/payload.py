"""What a request of the host's own API says to memnoise, seen before the host makes script arguments of it.

The host lower-cases titles, drops arguments that are too many, and leaves the page's values where there are none: a
request can lose its mitigation on the way without a word. The processing object knows nothing of the request any more,
so that it has to be looked at before.
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
    """Have the host's API object look before it makes script arguments.

    The object is the app's own, made anew with it: nothing of the host's classes is changed, no body is read twice,
    and what the object cannot do is left alone.
    """
    endpoints = (getattr(route, "endpoint", None) for route in app.routes if getattr(route, "path", "") in PATHS)
    owners: list[Any] = [getattr(endpoint, "__self__", None) for endpoint in endpoints]
    for api in {id(owner): owner for owner in owners}.values():
        original = getattr(api, "init_script_args", None)
        if original is not None:
            api.init_script_args = looking(original)


def looking(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def init_script_args(request: Any, *args: Any, **kwargs: Any) -> Any:
        check(getattr(request, "alwayson_scripts", None))
        return original(request, *args, **kwargs)

    return init_script_args


def check(scripts: Any) -> None:
    """Raise what is wrong with a request's `alwayson_scripts`, as far as memnoise is concerned.

    Raises:
        Refusal: see below; the settings themselves are judged when a generation begins.
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
    if not isinstance(entry, Mapping):
        raise Refusal(
            f"memnoise: alwayson_scripts.memnoise = {echo(entry)} is not valid; it must be a dict such as {FORM}."
        )
    if "args" not in entry:
        if entry:  # with nothing at all it is off, as where it is not there
            raise Refusal(
                f"memnoise: alwayson_scripts.memnoise = {echo(entry)} has no args; it must be a dict such as {FORM}."
            )
        return
    beside = [name for name in entry if name in SPECS]
    if beside:
        raise Refusal(f"memnoise: {beside[0]} stands beside args; settings belong within it, as in {FORM}.")
    args = entry["args"]
    if not isinstance(args, (list, tuple)):
        raise Refusal(f"memnoise: args = {echo(args)} is not valid; it must be a list, as in {FORM}.")
    try:
        check_surplus(args)
    except SettingError as error:
        raise Refusal(str(error)) from None


def check_surplus(args: Any) -> None:
    """Nothing may stand behind a dict of settings, nor behind the last control's value."""
    form = next((number for number, value in enumerate(args[:2]) if isinstance(value, Mapping)), len(SLOTS) - 1)
    for value in args[form + 1 :]:
        if value not in (None, ""):
            raise surplus(value)
