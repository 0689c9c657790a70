"""The command line, `python -m lib_memnoise`: a file for each command, which declares its options and runs it.

What a command needs is imported when it runs, so that the others need no torch.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence

import click

from lib_memnoise import __version__
from lib_memnoise.lab.cli import calibrate, claims, compare, demo, evaluate, figures, miniature, schema, score
from lib_memnoise.lab.cli.command import Commands, run


@click.group(
    cls=Commands,
    no_args_is_help=False,
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True},
)
@click.version_option(__version__, prog_name="memnoise", message="%(prog)s %(version)s")
def commands() -> None:
    """memnoise: adjusts initial noise so that text-to-image models do not copy training images."""


commands.add_command(schema.schema)
commands.add_command(demo.demo)
commands.add_command(claims.claims)
commands.add_command(score.score)
commands.add_command(calibrate.calibrate)
commands.add_command(evaluate.evaluate)
commands.add_command(figures.figures)
commands.add_command(compare.compare)
commands.add_command(miniature.miniature)


def main(argv: Sequence[str] | None = None) -> None:
    for stream in (sys.stdout, sys.stderr):
        # γ̃ and ‖Δ‖ are in the output, and a redirected stream on Windows has no UTF-8 of its own.
        if isinstance(stream, io.TextIOWrapper):
            # What no encoding has, such as a file's name that is no text, is escaped.
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    run(commands, sys.argv[1:] if argv is None else argv)
