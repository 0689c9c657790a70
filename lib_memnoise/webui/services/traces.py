"""Keeps traces of ‖Δ‖ for the page and the API to fetch after a generation, and saves them to files."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from lib_memnoise.core.files import replacing
from lib_memnoise.core.report import Generation

MOST = 128
"""The most generations whose traces are kept; the oldest are dropped first."""


class TraceStore:
    """A bounded store of traces. Anyone who knows a trace's name may read it; names cannot be guessed."""

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
    """The traces of a generation's images so far, as JSON: one object with a list of images."""
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
                "drawn": [asdict(point) for point in report.baseline],
                "hires": [asdict(point) for point in report.hires.trace] if report.hires else [],
            }
            for (batch, place), report in sorted(generation.images.items())
        ],
    }


def save(generation: Generation, pictures: Sequence[Image.Image], batch_size: int) -> None:
    """Write the traces of saved pictures next to them, as `NAME.memnoise.json` and `NAME.memnoise.png`.

    Raises:
        OSError: a file cannot be written.
    """
    from lib_memnoise.core import plots

    traced = document(generation)
    of_place = {(image["batch"], image["place"]): image for image in traced["images"]}
    for number, picture in enumerate(pictures):
        image, name = of_place.get(divmod(number, batch_size)), getattr(picture, "already_saved_as", None)
        if image is None or not name or not (image["points"] or image["drawn"] or image["hires"]):
            continue
        document_of_image = {**traced, "images": [image]}
        with replacing(Path(name).with_suffix(".memnoise.json")) as partial:
            partial.write_text(json.dumps(document_of_image, indent=1), encoding="utf-8")
        with replacing(Path(name).with_suffix(".memnoise.png")) as partial:
            partial.write_bytes(plots.png(document_of_image))
