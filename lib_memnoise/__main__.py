"""The command line: `python -m lib_memnoise`."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from lib_memnoise import __version__
from lib_memnoise.settings import json_schema


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, without the usage in front."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """An argument type: a whole number from low to high."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            shown = text if len(text) <= 40 else text[:37] + "..."
            raise argparse.ArgumentTypeError(f"{shown!r} is not valid; it must be a whole number from {low} to {high}.")
        return value

    return parse


def schema(_: argparse.Namespace) -> None:
    print(json.dumps(json_schema(), indent=2, ensure_ascii=False))


def demo(arguments: argparse.Namespace) -> None:
    # Imported here: the other commands need no torch.
    import torch

    from lib_memnoise.lab.demo import STATEMENT, compare, table

    torch.set_num_threads(1)  # on tensors this small, threads only wait for one another
    records = compare(seed=arguments.seed, images=arguments.images, steps=arguments.steps)
    if arguments.json:
        print(STATEMENT, file=sys.stderr)
        print(json.dumps(records, indent=2))
    else:
        print(table(records))


def miniature_train(arguments: argparse.Namespace) -> None:
    from lib_memnoise.miniature.train import export, train

    train(arguments.folder, processes=arguments.processes)
    if arguments.export is not None:
        export(arguments.folder, arguments.export)


def parser() -> argparse.ArgumentParser:
    top = Parser(
        prog="python -m lib_memnoise",
        description="memnoise: adjusts initial noise so that text-to-image models do not copy training images.",
    )
    top.add_argument("--version", action="version", version=f"memnoise {__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)

    text = "print the JSON Schema of the settings, the document that the WebUI serves at /memnoise/v1/schema"
    command = commands.add_parser("schema", help=text, description=text)
    command.set_defaults(command=schema)

    text = (
        "compare the methods without a WebUI or GPU, on an analytic toy: the exact denoiser of a small made-up "
        "distribution, no evidence about Stable Diffusion checkpoints"
    )
    command = commands.add_parser("demo", help=text, description=text)
    command.add_argument("--json", action="store_true", help="print a list of records instead of a table")
    command.add_argument("--seed", type=whole_number(0, 2**32 - 1), default=0, help="of the noises (default: 0)")
    command.add_argument("--images", type=whole_number(1, 1000), default=8, help="images a prompt (default: 8)")
    command.add_argument("--steps", type=whole_number(2, 1000), default=50, help="DDIM steps (default: 50)")
    command.set_defaults(command=demo)

    text = "the miniature model"
    miniature = commands.add_parser("miniature", help=text, description=text)
    parts = miniature.add_subparsers(title="commands", metavar="COMMAND", required=True)
    text = "train the miniature from its sprites; goes on where it was stopped"
    command = parts.add_parser("train", help=text, description=text)
    command.add_argument("folder", type=Path, help="where the work is kept (about 1 GB)")
    command.add_argument("--processes", type=whole_number(1, 64), default=2, help="one thread each (default: 2)")
    command.add_argument("--export", type=Path, help="also pack the result into this folder")
    command.set_defaults(command=miniature_train)
    return top


def main(argv: Sequence[str] | None = None) -> None:
    for stream in (sys.stdout, sys.stderr):
        # γ̃ and ‖Δ‖ are in the output, and a redirected stream on Windows has no UTF-8 of its own.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8")
    arguments = parser().parse_args(argv)
    try:
        arguments.command(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has seen enough (`| head`). Python flushes once more on its way out: into nothing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except ModuleNotFoundError as error:
        hint = 'python -m pip install ".[demo]" installs what this command needs.'
        raise SystemExit(f"memnoise: the package {error.name} is missing; {hint}") from None


if __name__ == "__main__":
    main()
