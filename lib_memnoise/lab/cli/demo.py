"""The command `demo`."""

from __future__ import annotations

import errno
import json
import os
import sys
import webbrowser
from pathlib import Path

import click

from lib_memnoise.lab.cli.command import Command
from lib_memnoise.lab.cli.options import COUNT, PATH, SAMPLER, SEED, TEXT, VARIANT, WholeNumber, divided, flag, option

PAGE = "memnoise-demo.html"


@click.command(cls=Command)
@option("--prompt", "own", multiple=True, type=TEXT, help="Your own, instead of memorised ones; may be repeated.")
@option("--prompts", type=WholeNumber(1, 12), default=4, help="Memorised prompts.")
@flag("--every-method", help="All methods, at several strengths.")
@option("--images", type=COUNT, default=4, help="Images a prompt.")
@option("--seed", type=SEED, default=0, help="Of the first image.")
@option("--sampler", type=SAMPLER, default="DDIM")
@option("--steps", type=WholeNumber(2, 1000), default=50, help="Of the sampler.")
@option("--variant", type=VARIANT, default="eps", help="What it predicts.")
@divided("a list of records")
@option("--page", type=PATH, metavar="FILE", show_default=f"{PAGE}; with --json none", help="Where to write the page.")
@flag("--open", "opened", help="Open the page.")
def demo(
    own: tuple[str, ...],
    prompts: int,
    every_method: bool,
    images: int,
    seed: int,
    sampler: str,
    steps: int,
    variant: str,
    processes: int,
    threads: int,
    markdown: bool,
    as_json: bool,
    page: Path | None,
    opened: bool,
) -> None:
    """Compare the methods without a WebUI or GPU.

    They run on a miniature Stable Diffusion that memorised pictures.
    """
    import torch
    from tqdm import tqdm

    from lib_memnoise.lab.comparison import COMPARED, EVERY, compare, markdown_table, own_subjects, table, total
    from lib_memnoise.lab.experiment import subjects
    from lib_memnoise.lab.miniature.model import load_miniature

    path = page or (None if as_json else Path(PAGE))
    if path is not None:
        path = checked_page(path)
        from lib_memnoise.lab import demo_report
    torch.set_num_threads(threads)
    model = load_miniature(variant)
    chosen = own_subjects(own) if own else subjects(memorised=True, held_out=True)[:prompts]
    methods = EVERY if every_method else COMPARED
    with tqdm(total=total(len(chosen), images, methods), unit="image", leave=False) as bar:
        comparison = compare(
            model,
            chosen,
            methods=methods,
            images=images,
            seed=seed,
            sampler=sampler,
            steps=steps,
            looking=path is not None,
            processes=processes,
            progress=bar.update,
        )
    if as_json:
        print(json.dumps(comparison.records, indent=2))
    else:
        print((markdown_table if markdown else table)(comparison.records))
    if path is not None:
        from lib_memnoise.core.files import replacing

        with replacing(path) as partial:
            partial.write_text(demo_report.page(comparison), encoding="utf-8")
        print(f"\nThe pictures are in {path}.", file=sys.stderr if as_json else sys.stdout)
        if opened:
            webbrowser.open(path.as_uri())


def checked_page(path: Path) -> Path:
    """Where a page can be written, found out before anything is generated."""
    path = path.absolute()
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise PermissionError(errno.EACCES, "cannot be written", str(path))
    return path
