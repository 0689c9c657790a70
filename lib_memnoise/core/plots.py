"""Plots of traces: ‖Δ(x_t, t)‖ along the trajectory, as in the paper's Figures 2, 3, 9 and 10.

altair and matplotlib are heavy, so they are imported only when a plot is made. gradio 3 brings both of them, gradio 4
only matplotlib.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from typing import Any

NOISES = {"points": "as sampled", "drawn": "noise as drawn", "hires": "hires pass"}
"""The keys of an image's curves in a trace's document, and the names that people see."""


def curves(trace: Mapping[str, Any]) -> Iterator[tuple[int, str, list[Mapping[str, Any]]]]:
    """For every curve that has points, the image's number (from 1), the curve's name and its points."""
    for number, image in enumerate(trace["images"], 1):
        for key, name in NOISES.items():
            if image.get(key):
                yield number, name, image[key]


def marks(trace: Mapping[str, Any]) -> list[tuple[float, str]]:
    """The timesteps to mark, with a label each: τ, and each image's own transition point."""
    marked = {(float(image["tau"]), "τ") for image in trace["images"] if image["tau"] is not None}
    for number, image in enumerate(trace["images"], 1):
        if image["transition"] is not None:
            marked.add((float(image["transition"]), f"transition point, image {number}"))
    return sorted(marked, reverse=True)


def chart(trace: Mapping[str, Any]) -> Any:
    """An interactive altair chart, or a matplotlib figure without altair; None where nothing was traced."""
    try:
        import altair as alt
    except ModuleNotFoundError:
        return figure(trace) if any(curves(trace)) else None

    values = [
        {"image": str(number), "noise": noise, "t": point["t"], "magnitude": point["magnitude"],
         "guidance": "on" if point["guided"] else "off", "against": f"{point['against']} prompt"}
        for number, noise, points in curves(trace)
        for point in points
    ]  # fmt: skip
    if not values:
        return None
    t = alt.X("t:Q", title="timestep t", scale=alt.Scale(reverse=True, zero=False, nice=False))
    lines = (
        alt.Chart(alt.Data(values=values))
        .mark_line(point=True)
        .encode(
            x=t,
            y=alt.Y("magnitude:Q", title="‖Δ(x_t, t)‖", scale=alt.Scale(zero=True)),
            color=alt.Color("image:N", title="image", legend=alt.Legend(orient="bottom")),
            strokeDash=alt.StrokeDash(
                "noise:N",
                title=None,
                sort=list(NOISES.values()),
                legend=alt.Legend(orient="bottom", symbolType="stroke", symbolSize=500, symbolStrokeColor="gray"),
            ),
            order=alt.Order("t:Q", sort="descending"),
            tooltip=[
                alt.Tooltip(f"{name}:{kind}")
                for name, kind in (
                    ("image", "N"), ("noise", "N"), ("t", "Q"), ("magnitude", "Q"), ("guidance", "N"), ("against", "N"),
                )
            ],
        )
    )  # fmt: skip
    layers = [lines]
    if marks(trace):
        rules = alt.Chart(alt.Data(values=[{"t": at, "mark": name} for at, name in marks(trace)]))
        layers.append(
            rules.mark_rule(strokeDash=[2, 3], color="gray").encode(
                x=t, tooltip=[alt.Tooltip("mark:N"), alt.Tooltip("t:Q")]
            )
        )
        layers.append(
            rules.mark_text(align="left", dx=4, dy=6, baseline="top", color="gray").encode(
                x=t, y=alt.value(0), text="mark:N"
            )
        )
    # As wide as the page allows, and below the label that gradio puts into the corner.
    fit = {"type": "fit", "contains": "padding"}
    return alt.layer(*layers).properties(width="container", height=300, padding={"top": 40}, autosize=fit).interactive()


def figure(trace: Mapping[str, Any]) -> Any:
    """The same plot as a matplotlib figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    plot = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(plot)
    axes = plot.add_subplot()
    for number, noise, points in curves(trace):
        axes.plot(
            [point["t"] for point in points],
            [point["magnitude"] for point in points],
            color=f"C{(number - 1) % 10}",
            linestyle=dict(zip(NOISES.values(), ("-", "--", ":")))[noise],
            marker=".",
            label=noise if len(trace["images"]) == 1 else f"image {number}, {noise}",
        )
    for at, name in marks(trace):
        axes.axvline(at, color="gray", linestyle=":")
        axes.annotate(name, (at, 1), xycoords=("data", "axes fraction"), xytext=(3, -10), textcoords="offset points")
    axes.set(xlabel="timestep t", ylabel="‖Δ(x_t, t)‖")
    axes.set_ylim(bottom=0)
    axes.invert_xaxis()
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    return plot


def png(trace: Mapping[str, Any]) -> bytes:
    """The same plot as a PNG file."""
    buffer = io.BytesIO()
    figure(trace).savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
