"""One run: what it is labelled with, how much time it has, and where it writes."""

from __future__ import annotations

import contextlib
import json
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from lib_memnoise import __version__
from on_device import tables


def driver() -> str | None:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        return found.strip().splitlines()[0]
    return None


def labels(device: str) -> dict[str, Any]:
    """Where a figure was measured."""
    found = {
        "device": platform.processor() or platform.machine() or "CPU",
        "driver": None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "memnoise": __version__,
        "system": f"{platform.system()} {platform.release()}",
        "threads": torch.get_num_threads(),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "device": properties.name,
            "driver": driver(),
            "memory, MB": round(properties.total_memory / 1e6),
            "cudnn": torch.backends.cudnn.version(),
        }
    return found


@dataclass
class Run:
    device: str
    small: bool
    folder: Path
    started: float = field(default_factory=time.monotonic)
    deadline: float = float("inf")
    """Of the part under way."""
    labels: dict[str, Any] = field(default_factory=dict)
    file: Path = field(init=False)

    def __post_init__(self) -> None:
        self.labels = labels(self.device)
        name = re.sub(r"[^a-z0-9]+", "-", self.labels["device"].lower()).strip("-")
        day = datetime.now(timezone.utc).strftime("%Y-%m-%d")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file = self.folder / f"{day}-{name}{'-small' if self.small else ''}.jsonl"

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.started

    def late(self, needed: float) -> bool:
        """Whether what takes so many seconds would end after the part's time."""
        return not self.small and self.elapsed + needed > self.deadline

    def say(self, text: str) -> None:
        print(f"[{self.elapsed:6.1f} s] {text}", flush=True)

    def record(self, part: str, name: str, figures: dict[str, Any], precision: str) -> None:
        """Write figures down at once, and say them."""
        self._append({"part": part, "name": name, "precision": precision, "figures": figures})

    def skip(self, part: str, name: str, reason: str, precision: str = "") -> None:
        self._append({"part": part, "name": name, "precision": precision, "not run": reason})

    def _append(self, entry: dict[str, Any]) -> None:
        when = datetime.now(timezone.utc).isoformat(timespec="seconds")
        entry = {"when": when, "elapsed": round(self.elapsed, 1), **entry, "labels": self.labels}
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        where = ", ".join(str(self.labels[key]) for key in ("device", "driver") if self.labels[key])
        self.say(f"{where}, torch {self.labels['torch']}, {entry['precision'] or 'no precision'}")
        for line in tables.lines(entry):
            self.say(f"    {line}")
        self.write_table()

    def write_table(self) -> None:
        entries = [json.loads(line) for line in self.file.read_text(encoding="utf-8").splitlines()]
        self.file.with_suffix(".md").write_text(tables.markdown(entries), encoding="utf-8")

    @contextlib.contextmanager
    def part(self, name: str, share: float) -> Iterator[None]:
        """A part that plans for so many seconds, and is stopped by a TimeoutError where it takes a third more."""
        begun = self.elapsed
        self.say(f"{name} begins, with {share:.0f} s")
        self.deadline = begun + share

        def stop(*_: Any) -> None:
            raise TimeoutError(f"took longer than {share * 4 / 3:.0f} s")

        before = signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, 0 if self.small else share * 4 / 3)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
            self.say(f"{name} took {self.elapsed - begun:.1f} s")
            sys.stdout.flush()
