"""The command `schema`."""

from __future__ import annotations

import json

import click

from lib_memnoise.lab.cli.command import Command
from lib_memnoise.settings import json_schema


@click.command(cls=Command)
def schema() -> None:
    """Print the JSON Schema of the settings.

    It is the document that the WebUI serves at /memnoise/v1/schema.
    """
    print(json.dumps(json_schema(), indent=2, ensure_ascii=False))
