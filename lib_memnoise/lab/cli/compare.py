"""The command `compare`."""

from __future__ import annotations

from pathlib import Path

import click

from lib_memnoise.lab.cli.command import Command
from lib_memnoise.lab.cli.options import PATH, flag, option


@click.command(cls=Command, extra="evaluate,demo")
@click.argument("run_a", type=PATH)
@click.argument("run_b", type=PATH)
@option("--csv", "table", type=PATH, metavar="FILE", help="Also write the differences here.")
@flag("--json", "as_json", help="Print them as JSON.")
def compare(run_a: Path, run_b: Path, table: Path | None, as_json: bool) -> None:
    """What changed from one evaluation to another, with intervals."""
    from lib_memnoise.lab.evaluation.report import comparison, comparison_text
    from lib_memnoise.lab.evaluation.run import BadRun, Run

    with Run(run_a) as a, Run(run_b) as b:
        data = comparison(a, b)
    if not len(data):
        raise BadRun(f"{run_a} and {run_b} have no measured images of the same settings, prompts and seeds.")
    if table is not None:
        from lib_memnoise.core.files import replacing

        with replacing(table) as partial:
            data.to_csv(partial, index=False)
    if as_json:
        print(data.to_json(orient="records", indent=1, force_ascii=False))
    else:
        print(comparison_text(data, run_a, run_b))
