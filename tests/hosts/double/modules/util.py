"""Small helpers that extensions use through `modules.shared` or directly."""

from __future__ import annotations

import os
import re

from modules.paths_internal import script_path


def natural_sort_key(s: str) -> list:
    return [int(part) if part.isdigit() else part.lower() for part in re.split(r"(\d+)", s)]


def listfiles(dirname: str) -> list[str]:
    paths = (os.path.join(dirname, x) for x in sorted(os.listdir(dirname), key=natural_sort_key) if x[0] != ".")
    return [path for path in paths if os.path.isfile(path)]


def html_path(filename: str) -> str:
    return os.path.join(script_path, "html", filename)


def html(filename: str) -> str:
    try:
        with open(html_path(filename), encoding="utf8") as file:
            return file.read()
    except OSError:
        return ""


def topological_sort(dependencies: dict[str, list[str]]) -> list[str]:
    """Names so that each comes after those it depends on; unknown and circular dependencies are ignored."""
    order: dict[str, None] = {}
    entered: set[str] = set()

    def visit(name: str) -> None:
        if name in entered:
            return
        entered.add(name)
        for other in dependencies[name]:
            if other in dependencies:
                visit(other)
        order[name] = None

    for name in dependencies:
        visit(name)
    return list(order)
