"""Options: their types, what they can say beside click's, and those that several commands have."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click

from lib_memnoise.errors import echo, is_encodable

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class WholeNumber(click.IntRange):
    """A whole number from `low` to `high`."""

    name = "number"

    def __init__(self, low: int, high: int) -> None:
        super().__init__(low, high)
        self._range = f"from {low} to {high}"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter:
            self.fail(f"{echo(value, 40)} is not valid; it must be a whole number {self._range}.", param, ctx)


class Number(click.ParamType):
    """A finite number."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            found = float(value)
        except ValueError:
            found = math.nan
        if not math.isfinite(found):
            self.fail(f"{echo(value, 40)} is not valid; it must be a number.", param, ctx)
        return found


class Text(click.ParamType):
    """Text, as a prompt is. Bytes that are none reach a program as unpaired surrogates."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not is_encodable(value):
            self.fail(f"{echo(value, 40)} is not valid; it must be text in the terminal's encoding.", param, ctx)
        return str(value)


class Names(click.ParamType):
    """Names with commas between them."""

    name = "names"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[str]:
        return [name for name in value.split(",") if name]


NUMBER, TEXT, NAMES = Number(), Text(), Names()
PATH = click.Path(readable=False, path_type=Path)
SEED, COUNT, PROCESSES = WholeNumber(0, 2**32 - 1), WholeNumber(1, 1000), WholeNumber(1, 64)
VARIANT, SAMPLER = click.Choice(("eps", "v")), click.Choice(("DDIM", "Euler"))
PROCESSORS = min(os.cpu_count() or 1, 64)


class Option(click.Option):
    """An option that may have a heading in the help, exclude another, or be one of several that become one argument."""

    def __init__(
        self,
        *args: Any,
        into: str | None = None,
        instead_of: str | None = None,
        heading: str | None = None,
        **attributes: Any,
    ) -> None:
        super().__init__(*args, **attributes)
        self.into, self.instead_of, self.heading = into, instead_of, heading


def name_of(param: click.Parameter) -> str:
    """What a parameter is called on the command line."""
    return "/".join(param.opts) if isinstance(param, click.Option) else param.human_readable_name


def option(*names: str, **attributes: Any) -> Decorator:
    """Declares an `Option` of a command."""
    return click.option(*names, cls=Option, **attributes)


flag = partial(option, is_flag=True)
asked = partial(option, into="request", heading="What the WebUI is asked for, instead of its defaults")


def together(*options: Decorator) -> Decorator:
    """Declares several options, in their order."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for declare in reversed(options):
            function = declare(function)
        return function

    return decorate


def divided(records: str) -> Decorator:
    """Options of what is generated in several processes, and printed as text, Markdown or JSON."""
    return together(
        option(
            "--processes",
            type=PROCESSES,
            default=PROCESSORS,
            show_default="one for each processor",
            help="That generate, whose number changes no result.",
        ),
        option("--threads", type=PROCESSES, default=1, help="Of each process."),
        flag("--markdown", help="Print tables in Markdown."),
        flag("--json", "as_json", instead_of="markdown", help=f"Print {records} as JSON."),
    )


def webui(*more: Decorator, required: bool) -> Decorator:
    """Options of a WebUI, and of what it is asked for, where `more` may be asked for as well."""
    return together(
        option("--url", type=TEXT, required=required, help="Of a WebUI with memnoise, run with --api."),
        option("--auth", "--api-auth", type=TEXT, metavar="USER:PASSWORD", help="Where it runs with --api-auth."),
        asked("--width", type=WholeNumber(64, 2048), help="In pixels."),
        asked("--height", type=WholeNumber(64, 2048), help="In pixels."),
        asked("--sampler", "sampler_name", type=TEXT, metavar="NAME", help="As the WebUI names it."),
        asked("--scheduler", type=TEXT, metavar="NAME", help="Schedule type."),
        asked("--steps", type=WholeNumber(1, 150), help="Of the sampler."),
        asked("--cfg", "cfg_scale", type=NUMBER, metavar="SCALE", help="CFG scale."),
        *more,
        flag("--json", "as_json", help="Print the answer as JSON."),
    )
