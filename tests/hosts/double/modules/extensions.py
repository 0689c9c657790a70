"""The installed extensions: in the double exactly those that `Double` was given."""

from __future__ import annotations

import configparser
import os
from typing import Any

extensions: list[Extension] = []
extension_paths: dict[str, Extension] = {}
loaded_extensions: dict[str, Extension] = {}


class ExtensionMetadata:
    filename = "metadata.ini"

    def __init__(self, path: str, canonical_name: str) -> None:
        self.config = configparser.ConfigParser()
        self.config.read(os.path.join(path, self.filename))
        self.canonical_name = canonical_name.lower().strip()

    def list_callback_order_instructions(self) -> list[Any]:
        return []


class Extension:
    def __init__(self, path: str) -> None:
        self.name = os.path.basename(path.rstrip("/"))
        self.path = path
        self.enabled = True
        self.is_builtin = False
        self.metadata = ExtensionMetadata(path, self.name)
        self.canonical_name = self.metadata.canonical_name
        self.remote = self.branch = self.commit_hash = self.version = ""
        self.commit_date: Any = None

    def list_files(self, subdir: str, extension: str) -> list[str]:
        folder = os.path.join(self.path, subdir)
        if not os.path.isdir(folder):
            return []
        names = sorted(name for name in os.listdir(folder) if os.path.splitext(name)[1].lower() == extension)
        return [path for path in (os.path.join(folder, name) for name in names) if os.path.isfile(path)]


def install(paths: list[str]) -> None:
    extensions[:] = [Extension(path) for path in paths]
    extension_paths.clear()
    extension_paths.update({x.path: x for x in extensions})
    loaded_extensions.clear()
    loaded_extensions.update({x.canonical_name: x for x in extensions})


def active() -> list[Extension]:
    return [x for x in extensions if x.enabled]


def find_extension(filename: str) -> Extension | None:
    parent = os.path.dirname(os.path.realpath(filename))
    while parent != os.path.dirname(parent):
        for path, extension in extension_paths.items():
            if os.path.realpath(path) == parent:
                return extension
        parent = os.path.dirname(parent)
    return None
