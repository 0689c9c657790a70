"""The command `calibrate`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from lib_memnoise.lab.cli.command import Command
from lib_memnoise.lab.cli.options import PATH, flag, option, webui
from lib_memnoise.lab.miniature import OneSentence


@click.command(cls=Command)
@webui(required=True)
@option("--prompts", type=PATH, metavar="FILE", help="Captions such as you use, one a line.")
@flag("--recent", instead_of="prompts", help="Those of the pictures that the WebUI saved last.")
def calibrate(
    url: str, auth: str | None, request: dict[str, Any], as_json: bool, prompts: Path | None, recent: bool
) -> None:
    """Have a WebUI score ordinary prompts and keep that.

    The calibration is of the checkpoint that is loaded.
    """
    from lib_memnoise.lab.client import WebUI

    if prompts is not None:
        request["prompts"] = captions_of(prompts)
    elif recent:
        request["source"] = "recent"
    made = WebUI(url, auth).post("calibrate", request)
    if as_json:
        print(json.dumps(made, indent=2, ensure_ascii=False))
        return
    print(
        f"{made['text']}, {made['width']}x{made['height']}: {made['lowest']:.4g} to {made['highest']:.4g}, median "
        f"{made['median']:.4g}; threshold {made['threshold']:.4g} ({made['promise']})"
    )
    for note in made["notes"]:
        print(f"note: {note}")


def captions_of(path: Path) -> list[str]:
    """Captions of a text file, one a line, as many as a WebUI takes."""
    from lib_memnoise.core.calibration import MOST, distinct

    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise OneSentence(f"{path} is no text file in UTF-8.") from None
    every = distinct(lines, len(lines))
    found = distinct(lines, MOST)
    if len(found) < len(every):
        print(f"{len(found)} of {len(every)} captions are taken, at even distances.", file=sys.stderr)
    return found
