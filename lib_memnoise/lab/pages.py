"""HTML pages with everything in them: their templates, and pictures as addresses."""

from __future__ import annotations

import base64
from pathlib import Path

import jinja2


def environment(folder: Path) -> jinja2.Environment:
    """Of the templates in a folder. What is put into one is escaped, and must be given."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )


def address(png: bytes) -> str:
    """A PNG file as an address that has it in it."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
