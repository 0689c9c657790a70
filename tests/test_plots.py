"""Plots of traces: interactive, and as a file."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lib_memnoise.core import plots
from lib_memnoise.core.report import Generation, TracePoint
from lib_memnoise.settings import Settings
from lib_memnoise.webui.services import traces

POINTS = [
    {"t": t, "magnitude": m, "guided": t < 900, "against": "empty"} for t, m in ((981, 3.0), (901, 1.5), (1, 1.0))
]
IMAGE: dict[str, Any] = {"points": POINTS, "drawn": [], "tau": 900.0, "transition": None}


def trace(*images: dict[str, Any]) -> dict[str, Any]:
    return {"images": [{**IMAGE, **image} for image in images]}


def layers(document: dict[str, Any]) -> dict[str, Any]:
    return {layer["mark"]["type"]: layer for layer in plots.chart(document).to_dict()["layer"]}


def test_the_chart_has_all_curves_and_marks() -> None:
    pytest.importorskip("altair")
    two = trace({"drawn": POINTS[:2]}, {"tau": None, "transition": 880.0})
    found = layers(two)
    values = found["line"]["data"]["values"]
    assert [(v["image"], v["noise"], v["t"]) for v in values if v["image"] == "1"] == [
        *(("1", "as sampled", t) for t in (981, 901, 1)),
        *(("1", "noise as drawn", t) for t in (981, 901)),
    ]
    assert sum(v["image"] == "2" for v in values) == 3
    assert [v["guidance"] for v in values[:3]] == ["off", "off", "on"]
    marks = found["rule"]["data"]["values"]
    assert marks == [{"t": 900.0, "mark": "τ"}, {"t": 880.0, "mark": "transition point, image 2"}]


def test_a_chart_without_marks_and_none_without_points() -> None:
    pytest.importorskip("altair")
    assert set(layers(trace({"tau": None}))) == {"line"}
    assert plots.chart(trace({"points": []})) is None


def test_without_altair_it_is_a_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    """As gradio 4 leaves it."""
    monkeypatch.setitem(sys.modules, "altair", None)
    pytest.importorskip("matplotlib")
    drawn = plots.chart(trace({"drawn": POINTS}))
    assert [list(line.get_ydata()) for line in drawn.axes[0].lines[:2]] == [[3.0, 1.5, 1.0]] * 2
    assert plots.chart(trace({"points": []})) is None


def test_the_file_shows_the_curves() -> None:
    pytest.importorskip("matplotlib")

    def pixels(document: dict[str, Any]) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(plots.png(document))).convert("RGB")).astype(int)

    one, both = pixels(trace({})), pixels(trace({"drawn": [{**p, "magnitude": 4.0} for p in POINTS]}))
    assert one.shape == both.shape and (one != both).any()
    blue = (abs(one - np.array([31, 119, 180])).sum(-1) < 30).sum()
    assert blue > 200
    assert pixels(trace({"points": []})).shape == one.shape


def saved(folder: Path, name: str) -> Image.Image:
    picture = Image.new("RGB", (8, 8))
    picture.save(folder / name)
    picture.already_saved_as = str(folder / name)  # type: ignore[attr-defined]  # as the host notes it
    return picture


def test_traces_are_saved_beside_their_own_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    generation = Generation(Settings(enabled=True, trace="on"), trace_id="a")
    for place in range(3):
        generation.image(place // 2, place % 2).trace.append(TracePoint(981.0 - place, 1.0, True, "empty"))
    pictures = [saved(tmp_path, "one.png"), Image.new("RGB", (8, 8)), saved(tmp_path, "three.final.webp")]
    traces.save(generation, [*pictures, saved(tmp_path, "unknown.png")], batch_size=2)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        "one.png", "one.memnoise.json", "one.memnoise.png", "three.final.webp", "three.final.memnoise.json",
        "three.final.memnoise.png", "unknown.png",
    }  # fmt: skip
    found = json.loads((tmp_path / "three.final.memnoise.json").read_text(encoding="utf-8"))
    assert [image["points"][0]["t"] for image in found["images"]] == [979.0]
