"""Traces of ‖Δ‖, for the page and the API to fetch after a generation."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import asdict
from typing import Any

from lib_memnoise.generation import Generation

MOST = 128
"""Generations whose traces are kept; the oldest go first."""


class TraceStore:
    """A bounded store. Who knows a trace's name may read it; names cannot be guessed."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._traces: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self._lock = threading.Lock()

    def put(self, name: str, trace: dict[str, Any]) -> None:
        with self._lock:
            self._traces[name] = trace
            self._traces.move_to_end(name)
            while len(self._traces) > self._most:
                self._traces.popitem(last=False)

    def get(self, name: str) -> dict[str, Any] | None:
        with self._lock:
            return self._traces.get(name)


STORE = TraceStore()


def document(generation: Generation) -> dict[str, Any]:
    """The traces of a generation's images so far, as JSON."""
    return {
        "id": generation.trace_id,
        "method": generation.settings.method,
        "images": [
            {
                "batch": batch,
                "place": place,
                "score": report.before,
                "mitigated": not report.left_alone and report.failed is None,
                "tau": report.used.get("tau"),
                "transition": report.transition,
                "points": [asdict(point) for point in report.trace],
            }
            for (batch, place), report in sorted(generation.images.items())
        ],
    }
