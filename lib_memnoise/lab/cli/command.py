"""What all commands share: their errors are said in one sentence, and their help has headings."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import click

from lib_memnoise.lab.cli.options import Option, name_of
from lib_memnoise.lab.miniature import OneSentence
from lib_memnoise.torch_utils.oom import is_out_of_memory

PROGRAM = "python -m lib_memnoise"


class Command(click.Command):
    """A command; `extra` is what pyproject.toml calls the optional packages that it needs."""

    def __init__(self, *args: Any, extra: str = "demo", **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self.extra = extra

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            rest = super().parse_args(ctx, args)
            self._refuse_both(ctx)
        except click.UsageError as error:
            # Not every error of click's own says which command it is about.
            error.ctx = error.ctx or ctx
            raise
        self._gather(ctx)
        return rest

    def _refuse_both(self, ctx: click.Context) -> None:
        """An option that is given instead of another is not given beside it."""
        given = {param.name: param for param in self.params if ctx.params.get(str(param.name))}
        for param in given.values():
            if isinstance(param, Option) and param.instead_of in given:
                raise click.BadParameter(f"not allowed with argument {name_of(given[param.instead_of])}", ctx, param)

    def _gather(self, ctx: click.Context) -> None:
        """Options that belong together become one argument: of those that were given or have a default."""
        for param in self.params:
            if isinstance(param, Option) and param.into is not None:
                gathered = ctx.params.setdefault(param.into, {})
                value = ctx.params.pop(str(param.name))
                if value is not None and value is not False and value != ():
                    gathered[param.name] = value

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as error:
            hint = f'python -m pip install ".[{self.extra}]" installs what this command needs.'
            raise OneSentence(f"the package {error.name} is missing; {hint}") from None

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx) if isinstance(param, click.Option) else None
            if record is not None:
                heading = param.heading if isinstance(param, Option) else None
                sections.setdefault(heading or "Options", []).append(record)
        for heading, records in sections.items():
            with formatter.section(heading):
                formatter.write_dl(records)


class Commands(click.Group, Command):
    """Several commands, in the order in which they were added."""

    command_class = Command

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


def said(error: click.UsageError) -> str:
    """What is wrong with a command line, without the usage in front."""
    if isinstance(error, click.BadParameter) and not isinstance(error, click.MissingParameter):
        return error.message if error.param is None else f"argument {name_of(error.param)}: {error.message}"
    return error.format_message()


def run(commands: click.Group, argv: Sequence[str]) -> None:
    """Run the command that is asked for; raises SystemExit with one sentence where it cannot be done."""
    try:
        with commands.make_context(PROGRAM, list(argv)) as context:
            commands.invoke(context)
        sys.stdout.flush()
    except click.exceptions.Exit as done:  # of --help and --version
        raise SystemExit(done.exit_code) from None
    except click.UsageError as error:
        print(f"{error.ctx.command_path if error.ctx else PROGRAM}: {said(error)}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except BrokenPipeError:
        # The reader has seen enough (`| head`). Python flushes once more on its way out: into nothing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except OneSentence as error:
        raise SystemExit(f"memnoise: {error}") from None
    except OSError as error:
        named = f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error)
        raise SystemExit(f"memnoise: {named}.") from None
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise SystemExit("memnoise: there is not enough memory.") from None
