"""The commands `miniature train`, `miniature install` and `miniature check`."""

from __future__ import annotations

from pathlib import Path

import click

from lib_memnoise.lab.cli.command import Commands
from lib_memnoise.lab.cli.options import PATH, PROCESSES, VARIANT, flag, option


@click.group(cls=Commands, no_args_is_help=False)
def miniature() -> None:
    """The miniature model."""


@miniature.command()
@click.argument("folder", type=PATH)
@option("--processes", type=PROCESSES, default=2, help="One thread each.")
@flag("--shipped-autoencoder", help="Begin with it, not from nothing.")
@option("--export", "target", type=PATH, metavar="FOLDER", help="Also pack the result into this folder.")
def train(folder: Path, processes: int, shipped_autoencoder: bool, target: Path | None) -> None:
    """Train the miniature from its sprites.

    Goes on where it was stopped. FOLDER is where the work is kept (about 1 GB).
    """
    from lib_memnoise.lab.miniature.train import export, train

    train(folder, processes=processes, shipped=shipped_autoencoder)
    if target is not None:
        export(folder, target)


@miniature.command()
@click.argument("webui", type=PATH, metavar="SD_WEBUI_DIR")
@option("--variant", type=VARIANT, help="Only this one.")
@option("--ckpt-dir", "checkpoints", type=PATH, metavar="FOLDER", help="Where the WebUI looks for checkpoints.")
@option("--vocabulary", type=PATH, metavar="FILE", help="CLIP's bpe_simple_vocab_16e6.txt.gz.")
def install(webui: Path, variant: str | None, checkpoints: Path | None, vocabulary: Path | None) -> None:
    """Put the miniature's checkpoints into a WebUI.

    SD_WEBUI_DIR is the WebUI's folder, with its launch.py.
    """
    from lib_memnoise.lab.miniature.checkpoint import install

    variants = None if variant is None else (variant,)
    for path in install(webui, variants=variants, checkpoints=checkpoints, vocabulary=vocabulary):
        print(path)


@miniature.command()
def check() -> None:
    """Measure the yardsticks and the autoencoder on real pictures."""
    from lib_memnoise.lab.miniature.validation import report, validate

    print(report(validate()))
