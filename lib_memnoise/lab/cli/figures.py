"""The command `figures`."""

from __future__ import annotations

from pathlib import Path

import click

from lib_memnoise.lab.cli.command import Command
from lib_memnoise.lab.cli.options import PATH


@click.command(cls=Command, extra="evaluate,demo")
@click.argument("folder", type=PATH, metavar="RUN")
def figures(folder: Path) -> None:
    """Draw an evaluation's figures and report from its records."""
    from lib_memnoise.lab.evaluation.report import report, text
    from lib_memnoise.lab.evaluation.run import Run
    from lib_memnoise.lab.evaluation.workflow import writing

    with Run(folder) as run, writing(folder):
        found, judged, page = report(run)
    print(text(found, judged))
    print(f"\nThe report is {page}.")
