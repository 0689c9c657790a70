"""The demo's page: one HTML file with everything in it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lib_memnoise.lab.comparison import STATEMENT, Comparison, explanation
from lib_memnoise.lab.experiment import Images, references
from lib_memnoise.lab.miniature.model import to_images
from lib_memnoise.lab.miniature.yardsticks import COPIED
from lib_memnoise.lab.pages import address, environment
from lib_memnoise.lab.text_table import cells

TEMPLATE = "demo_report.html.jinja"


def _png(image: NDArray[np.uint8]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return address(buffer.getvalue())


def _plot(figure: Any) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    plt.close(figure)
    return address(buffer.getvalue())


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


def _images(result: Images, row: int) -> list[dict[str, str]]:
    """A method's images of a prompt: their frame, what is said of them, and they themselves."""
    images = []
    for k, picture in enumerate(to_images(result.pictures[row])):
        own, alike = result.similarity_own[row, k], result.similarity[row, k]
        title = f"similarity {alike:.2f}" + ("" if np.isnan(own) else f", to its own picture {own:.2f}")
        kind = "copied own" if result.copied_own[row, k] else "copied" if result.copied[row, k] else ""
        images.append({"kind": kind, "title": title, "picture": _png(picture)})
    return images


def _prompt(comparison: Comparison, row: int) -> dict[str, Any]:
    subject = comparison.subjects[row]
    return {
        "caption": subject.caption,
        "memorised": None if subject.memorised is None else _png(references()[subject.memorised]),
        "methods": [(name, _images(result, row)) for name, result in comparison.results.items()],
    }


def page(comparison: Comparison) -> str:
    """The whole page. Nothing in it points outside."""
    template = environment(Path(__file__).parent).get_template(TEMPLATE)
    content = template.render(
        statement=STATEMENT,
        table=cells(comparison.records),
        explanation=explanation(comparison.records),
        plots=[("magnitudes", magnitude_plot(comparison)), ("trade-off", trade_off_plot(comparison))],
        prompts=[_prompt(comparison, row) for row in range(len(comparison.subjects))],
    )
    return f"{content}\n"
