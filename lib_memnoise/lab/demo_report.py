"""The demo's page: one HTML file with everything in it."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lib_memnoise.lab.comparison import STATEMENT, Comparison, explanation
from lib_memnoise.lab.experiment import references
from lib_memnoise.lab.miniature.model import to_images
from lib_memnoise.lab.miniature.yardsticks import COPIED
from lib_memnoise.lab.text_table import cells

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .25rem .75rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
.prompt { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; }
figure { margin: 0; } figcaption { font-size: .85rem; color: #555; max-width: 20rem; }
figure.images img { width: 80px; height: 80px; border: 3px solid #2a9d4a; margin: 1px; }
figure.images img.copied { border-color: #c62828; border-style: dashed; }
figure.images img.own { border-style: solid; }
figure.reference img { width: 128px; height: 128px; }
.plots img { max-width: 100%; }
"""


def _encoded(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode("ascii")


def _png(image: NDArray[np.uint8]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return _encoded(buffer.getvalue())


def _plot(figure: Any) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    plt.close(figure)
    return _encoded(buffer.getvalue())


def magnitude_plot(comparison: Comparison) -> str:
    """Mean ‖Δ‖ along the trajectory, a curve for each method."""
    figure, axes = plt.subplots(figsize=(5.5, 3.6))
    for name, result in comparison.results.items():
        axes.plot(result.timesteps, result.trace.mean((1, 2)), label=name)
    axes.set_xlabel("timestep t")
    axes.set_ylabel("‖Δ(x_t, t)‖")
    axes.invert_xaxis()
    axes.legend()
    return _plot(figure)


def trade_off_plot(comparison: Comparison) -> str:
    """Similarity against alignment: down and right is better. To the prompt's own picture: hollow, below."""
    figure, axes = plt.subplots(figsize=(5.5, 3.6))
    for k, entry in enumerate(comparison.records):
        axes.scatter(entry["alignment"], entry["similarity"], s=60, color=f"C{k % 10}")
        if entry["similarity_own"] is not None:
            axes.scatter(entry["alignment"], entry["similarity_own"], s=60, facecolors="none", edgecolors=f"C{k % 10}")
        axes.annotate(
            entry["method"], (entry["alignment"], entry["similarity"]), xytext=(6, 4), textcoords="offset points"
        )
    axes.axhline(COPIED, color="#999", linestyle=":", linewidth=1)
    axes.set_xlabel("alignment with the prompt")
    axes.set_ylabel("similarity to the nearest memorised picture\n(hollow: to the prompt's own)", fontsize=8)
    axes.margins(0.2)
    return _plot(figure)


def _table(lines: Sequence[Sequence[str]]) -> str:
    rows = []
    for k, line in enumerate(lines):
        tag = "td" if k else "th"
        rows.append("<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in line) + "</tr>")
    return f"<table>{''.join(rows)}</table>"


def _prompt(comparison: Comparison, row: int, memorised: NDArray[np.uint8]) -> str:
    subject = comparison.subjects[row]
    parts = [f"<h2>{html.escape(subject.caption)}</h2>", '<div class="prompt">']
    if subject.memorised is not None:
        parts.append(
            f'<figure class="reference"><img alt="the memorised picture" src="{_png(memorised[subject.memorised])}">'
            "<figcaption>memorised picture</figcaption></figure>"
        )
    for name, result in comparison.results.items():
        images = []
        for k, picture in enumerate(to_images(result.pictures[row])):
            own, alike = result.similarity_own[row, k], result.similarity[row, k]
            said = f"similarity {alike:.2f}" + ("" if np.isnan(own) else f", to its own picture {own:.2f}")
            kind = "copied own" if result.copied_own[row, k] else "copied" if result.copied[row, k] else ""
            images.append(f'<img class="{kind}" alt="{html.escape(name)}" title="{said}" src="{_png(picture)}">')
        parts.append(f'<figure class="images">{"".join(images)}<figcaption>{html.escape(name)}</figcaption></figure>')
    return "".join([*parts, "</div>"])


def page(comparison: Comparison) -> str:
    """The whole page. Nothing in it points outside."""
    memorised = references()
    said = "".join(f"<p>{html.escape(line)}</p>" for line in explanation(comparison.records))
    prompts = "".join(_prompt(comparison, row, memorised) for row in range(len(comparison.subjects)))
    plots = f'<img alt="magnitudes" src="{magnitude_plot(comparison)}">'
    plots += f'<img alt="trade-off" src="{trade_off_plot(comparison)}">'
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>memnoise: the methods side by side</title>'
        f"<style>{STYLE}</style><h1>memnoise: the methods side by side</h1><p>{html.escape(STATEMENT)}</p>"
        f"{_table(cells(comparison.records))}{said}"
        "<p>Red frames: copies of a memorised picture; dashed: of another than the prompt's own.</p>"
        f'<div class="plots">{plots}</div>{prompts}</html>\n'
    )
