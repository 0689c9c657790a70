"""The command `claims`."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import click

from lib_memnoise.lab.cli.command import Command
from lib_memnoise.lab.cli.options import COUNT, SEED, divided, flag, option


@click.command(cls=Command)
@flag("--short", help="Fewer images and points.")
@option("--images", type=COUNT, show_default="18", help="Images a prompt at every point.")
@option("--seed", type=SEED, default=1, help="Of the first image.")
@divided("points and claims")
def claims(
    short: bool, images: int | None, seed: int, processes: int, threads: int, markdown: bool, as_json: bool
) -> None:
    """Measure the paper's claims on the miniature.

    Fails if one does not hold.
    """
    import torch
    from tqdm import tqdm

    from lib_memnoise.lab.claims import SHORT, Plan, judge, markdown_report, measure, report
    from lib_memnoise.lab.miniature.model import load_miniature

    torch.set_num_threads(threads)
    model = load_miniature()
    plan = SHORT if short else Plan()
    if images is not None:
        plan = replace(plan, images=images)
    with tqdm(total=plan.total, unit="image", leave=False) as bar:
        found = measure(model, plan, seed=seed, processes=processes, progress=bar.update)
    judged = judge(found)
    if as_json:
        print(json.dumps({"points": found.points, "claims": [asdict(claim) for claim in judged]}, indent=2))
    else:
        print((markdown_report if markdown else report)(found, judged))
    if not all(claim.holds for claim in judged if claim.required):
        raise SystemExit(1)
