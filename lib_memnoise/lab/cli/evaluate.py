"""The command `evaluate`."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lib_memnoise.lab.cli.command import Command
from lib_memnoise.lab.cli.options import (
    COUNT,
    NAMES,
    NUMBER,
    PATH,
    PROCESSES,
    PROCESSORS,
    SEED,
    TEXT,
    VARIANT,
    WholeNumber,
    flag,
    option,
)
from lib_memnoise.lab.miniature import OneSentence

if TYPE_CHECKING:
    from lib_memnoise.lab.evaluation.plan import Plan

maker = partial(option, into="makers", heading="What makes the images")
change = partial(option, into="changes", heading="Instead of what the plan says, or without one")
measured = partial(option, into="weights", heading="How they are measured")


@click.command(cls=Command, extra="evaluate,demo")
@click.argument("folder", type=PATH, metavar="RUN")
@option("--plan", "name", metavar="NAME|FILE", help="paper-sd1, paper-sd2, miniature, or a YAML file.")
@flag("--dry-run", help="Say what would be generated, and stop.")
@flag("--json", "as_json", help="Print points and claims as JSON.")
@maker(
    "--url",
    "urls",
    multiple=True,
    type=TEXT,
    help="Of a WebUI with memnoise, run with --api; may be repeated, for each its own GPU.",
)
@maker("--api-auth", "--auth", "auth", type=TEXT, metavar="USER:PASSWORD", help="As the WebUI's --api-auth.")
@maker("--dask", metavar="ADDRESS", help="Of a Dask scheduler, each of whose workers has a WebUI.")
@maker("--attempts", type=COUNT, default=15, help="Of a WebUI that does not answer.")
@maker("--timeout", type=NUMBER, default=1800, metavar="SECONDS", help="Of a request.")
@maker("--variant", type=VARIANT, default="eps", help="Of the miniature.")
@maker("--threads", type=PROCESSES, default=PROCESSORS, show_default="all processors", help="Of the miniature.")
@change("--prompts", metavar="FILE", help="The paper's .csv, .jsonl, or a caption a line.")
@change("--ground-truth", metavar="FOLDER", help="Training pictures, a folder for every Index.")
@change("--first", type=WholeNumber(1, 10**6), metavar="N", help="Only so many prompts.")
@change(
    "--method",
    "curves",
    multiple=True,
    metavar="METHOD:SETTING=VALUE,VALUE",
    help="none, static:tau=780,740 and so on; may be repeated.",
)
@change("--images", type=COUNT, help="Of each prompt at every strength.")
@change("--batch", type=WholeNumber(1, 64), help="Images of one request.")
@change("--seed", type=SEED, help="Of the first image.")
@change("--sampler", type=TEXT, metavar="NAME", help="As the WebUI names it.")
@change("--scheduler", type=TEXT, metavar="NAME", help="Schedule type.")
@change("--steps", type=COUNT, help="Of the sampler.")
@change("--cfg", type=NUMBER, metavar="SCALE", help="CFG scale.")
@change("--width", type=int, help="In pixels.")
@change("--height", type=int, help="In pixels.")
@change("--negative", "negative_prompt", type=TEXT, metavar="PROMPT", help="Negative prompt.")
@change(
    "--metrics",
    type=NAMES,
    metavar="NAME,NAME",
    help="sscd, clip, lpips, imagereward, similarity, diversity.",
)
@measured("--sscd", type=PATH, metavar="FILE", help="sscd_disc_mixup, TorchScript or ONNX.")
@measured("--clip-weights", "clip", metavar="FILE|NAME", show_default="laion2b_s34b_b79k", help="open_clip's.")
@measured(
    "--lpips-weights", "lpips", type=PATH, metavar="FILE", show_default="torchvision's download", help="AlexNet's."
)
@measured("--imagereward-weights", "imagereward", metavar="FILE|NAME", show_default="ImageReward-v1.0")
@measured("--device", default="cpu", help="Where the metrics run.")
def evaluate(
    folder: Path,
    name: str | None,
    dry_run: bool,
    as_json: bool,
    makers: dict[str, Any],
    changes: dict[str, Any],
    weights: dict[str, Any],
) -> None:
    """The paper's evaluation, on a WebUI or the miniature.

    Generates, measures and draws; goes on where it was stopped. RUN is the run's folder: a new one, or one to go on
    with.
    """
    from lib_memnoise.lab.evaluation import metrics, workflow
    from lib_memnoise.lab.evaluation.report import plain, text
    from lib_memnoise.lab.evaluation.run import Run

    plan = workflow.plan_of(folder, name, changes)
    if dry_run:
        print(summary(plan or Run(folder).plan))
        return
    made_by = workflow.GeneratorOptions(**makers)
    if made_by.dask is not None and len(made_by.urls) > 1:
        raise OneSentence(
            "with --dask one --url is enough: each worker's own (MEMNOISE_URL on a worker where it differs)."
        )
    done = workflow.evaluate(folder, plan, made_by, metrics.Options(**weights))
    if as_json:
        document = {"points": records(done.results), "claims": [plain(claim) for claim in done.claims]}
        print(json.dumps(document, indent=1, ensure_ascii=False))
    else:
        print(text(done.results, done.claims))
        print(f"\nThe report is {done.page}.")
    for line in done.told.gone:
        workflow.say(f"Given up on the way: {line}")
    if done.told.aside:
        reasons = sorted(set(done.told.aside.values()))
        count = sum(unit.count for unit in done.told.aside)
        raise OneSentence(f"{count} images could not be made; the same command tries again. {reasons[0]}")


def records(found: Any) -> list[dict[str, Any]]:
    """A record for every point of the methods' and the adjustment's figures; NaN is null."""
    made = []
    for figure in ("adjustment", "methods"):
        for row in found.table(figure).to_dict("records"):
            made.append({"figure": figure, **{name: None if value != value else value for name, value in row.items()}})
    return made


def summary(plan: Plan) -> str:
    """What a plan asks for."""
    lines = [f"{plan.total} images: {len(plan.prompts)} prompts, {len(plan.points)} settings."]
    for curve in plan.curves:
        values = "" if curve.sweep is None else f", {curve.sweep} {', '.join(map(str, curve.strengths))}"
        lines.append(f"  {curve.name}{values} ({', '.join(curve.figures)})")
    return "\n".join(lines)
