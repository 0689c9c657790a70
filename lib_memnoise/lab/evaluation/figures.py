"""The paper's figures and tables, drawn from a run's records alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from lib_memnoise.core.files import replacing
from lib_memnoise.lab.evaluation.metrics import label_of, metric_of, training_picture
from lib_memnoise.lab.evaluation.plan import Curve
from lib_memnoise.lab.evaluation.results import Results, strength_of, weight_decay
from lib_memnoise.lab.evaluation.run import Run
from lib_memnoise.lab.evaluation.trajectories import baseline

GRID_PROMPTS, GRID_IMAGES = 6, 4
"""Rows and columns of grids, at most."""


@dataclass(frozen=True)
class Drawn:
    """A figure or a table of the report."""

    name: str
    """Of its files."""
    title: str
    figure: Figure | None
    """None: a table alone."""
    data: pd.DataFrame | None
    """What is drawn; None: pictures."""
    shown: tuple[str, ...] = ()
    """The data's columns that the report shows as a table."""
    note: str = ""
    """How to read it."""


def _figure(rows: int = 1, columns: int = 1, width: float = 6.0, height: float = 4.2) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def draw(found: Results, run: Run) -> Iterator[Drawn]:
    """Everything that the run has records for."""
    copy, copying = found.metric("copy"), found.copying
    if copy is not None:
        for figure, number in (("adjustment", "4"), ("methods", "5")):
            for role, also in (("alignment", number), ("diversity", "8"), ("quality", "8")):
                other = found.metric(role)
                if other is not None and found.curves(figure) and (figure == "methods" or role == "alignment"):
                    yield trade_off(found, figure, f"{figure}-{copy}-{other}", copying, other, also)
        if found.kinds:
            yield by_kind(found, copying)
    yield from magnitudes(found)
    for figure, title in (("methods", "Figures 6 and 11"), ("windows", "Figure 1")):
        if found.curves(figure):
            yield grid(found, run, figure, title)
    if found.curves("weight_decay"):
        data = weight_decay(found)
        note = (
            "JSD: divergence between the lengths ‖x‖ of adjusted noises and of as many that were drawn; as drawn: what "
            "as many drawn ones have among themselves, which is where a few images must end."
        )
        yield Drawn("weight-decay", "Weight decay (as Tables 1 and 2)", None, data, tuple(data.columns), note)
    if found.curves("methods"):
        yield cost(found)


def trade_off(found: Results, figure: str, name: str, copying: Sequence[str], other: str, number: str) -> Drawn:
    """Copying against another metric, a line for every method, with 95 % intervals (Figures 4, 5 and 8).

    As copies are counted in several ways, side by side.
    """
    data = found.table(figure)
    drawn, axes = _figure(1, len(copying), width=6.0 if len(copying) == 1 else 5.0 * len(copying))
    for ax, copy in zip(axes[0], copying):
        for curve in found.curves(figure):
            _trade_off_curve(ax, data[data["curve"] == curve.name], curve, other, copy)
        ax.set_xlabel(_axis(other))
        ax.set_ylabel(_axis(copy))
    axes[0, 0].legend(fontsize=7)
    _same_range(axes[0])
    kind = "Noise as drawn and adjusted" if figure == "adjustment" else "Methods at their strengths"
    measured = [f"{column}{end}" for column in (*copying, other) for end in ("", " low", " high")]
    title = f"{kind}: {metric_of(copying[0]).label} and {label_of(other)} (as Figure {number})"
    note = (
        f"Lower right is better: less is copied, at more {label_of(other)}. Beside the points is their strength; "
        f"bars are 95 % intervals. {in_words(copying)}"
    )
    return Drawn(name, title, drawn, data, ("curve", "strength", *measured, "images"), note)


def _trade_off_curve(ax: Axes, rows: pd.DataFrame, curve: Curve, other: str, copy: str) -> None:
    x, y = rows[other], rows[copy]
    errors = [_errors(rows, name) for name in (other, copy)]
    alone = len(rows) == 1
    ax.errorbar(
        x, y, xerr=errors[0], yerr=errors[1], label=curve.name, marker="*" if alone else "o",
        markersize=11 if alone else 5, linewidth=1.2, elinewidth=0.6, capsize=2,
    )  # fmt: skip
    for strength, at in zip(rows["strength"], zip(x, y)):
        if curve.sweep is not None and np.isfinite(at).all():
            ax.annotate(f"{strength:g}" if isinstance(strength, (int, float)) else str(strength), at, xytext=(4, 3),
                        textcoords="offset points", fontsize=6, color="#555")  # fmt: skip


def _same_range(axes: Sequence[Axes]) -> None:
    low, high = zip(*(ax.get_ylim() for ax in axes))
    for ax in axes:
        ax.set_ylim(min(low), max(high))


def in_words(copying: Sequence[str]) -> str:
    """Which training pictures likeness is to."""
    if len(copying) == 1:
        return f"Only {label_of(copying[0])} is measured."
    first = "the latter, which is the paper's way," if metric_of(copying[0]).of_the_paper else "the former"
    return f"Likeness is to the nearest of all training pictures, and to the prompt's own: {first} comes first."


def _axis(name: str) -> str:
    return f"{label_of(name)} ({'lower' if metric_of(name).lower_is_better else 'higher'} is better)"


def _errors(rows: pd.DataFrame, name: str) -> NDArray[np.float64]:
    value = rows[name].to_numpy(dtype=float)
    errors = np.stack([value - rows[f"{name} low"].to_numpy(), rows[f"{name} high"].to_numpy() - value]).astype(float)
    return np.clip(np.nan_to_num(errors), 0, None)


def by_kind(found: Results, copying: Sequence[str]) -> Drawn:
    """Copying of verbatim and of template prompts, apart."""
    data = found.table("methods")
    drawn, axes = _figure(1, len(copying), width=6.0 if len(copying) == 1 else 5.0 * len(copying),
                          height=0.32 * len(data) + 1.2)  # fmt: skip
    for ax, copy in zip(axes[0], copying):
        for k, kind in enumerate(found.kinds):
            column, count = f"{copy} {kind}", len(found.kinds)
            ax.barh(np.arange(len(data)) + 0.8 * k / count, data[column], height=0.8 / count,
                    xerr=_errors(data, column), error_kw={"elinewidth": 0.6}, label=_kind(kind))  # fmt: skip
        ax.set_yticks([])
        ax.invert_yaxis()
        ax.set_xlabel(_axis(copy))
    names = [label_of_point(row) for _, row in data.iterrows()]
    axes[0, 0].set_yticks(np.arange(len(data)) + 0.4 - 0.4 / len(found.kinds), names, fontsize=7)
    axes[0, 0].legend(fontsize=7)
    columns = [f"{copy} {kind}{end}" for copy in copying for kind in found.kinds for end in ("", " low", " high")]
    shown = ("curve", "strength", *columns)
    title = f"{metric_of(copying[0]).label}, kinds of prompts apart"
    note = " ".join([*(_KINDS.get(kind, "") for kind in found.kinds), in_words(copying)])
    return Drawn("kinds", title, drawn, data[list(shown)], shown, note)


_KINDS = {
    "TM": "Template prompts share parts of their pictures with other training pictures;",
    "VM": "verbatim ones are copied whole.",
    "A": "On the miniature a caption of type A came with its training picture only,",
    "B": "one of type B with some other pictures as well.",
}


def _kind(name: str) -> str:
    """A prompt's type, as the paper's CSV has it."""
    return {"VM": "verbatim (VM)", "TM": "template (TM)"}.get(name, f"type {name}")


def label_of_point(row: pd.Series) -> str:
    """A point's name: its curve and strength."""
    if row["strength"] is None:
        return str(row["curve"])
    return f"{row['curve']}, {strength_of(row['sweep'], row['strength'])}"


# ‖Δ‖ along the trajectory

WITHOUT_GUIDANCE = (
    "Sampled without guidance. Where ‖Δ‖ falls sharply is the transition point: guidance that starts after it leads "
    "to no copy."
)


def magnitudes(found: Results) -> Iterator[Drawn]:
    """Figures 2, 3, 9 and 10: ‖Δ‖ at every timestep without guidance."""
    start = baseline(found)
    if start is None or not any(key[0] == start for key in found.traces):
        return
    lines = [(start, "noise as drawn")]
    places = sorted({key[1:] for key in found.traces if key[0] == start})
    prompts = sorted({prompt for prompt, _ in places})[:GRID_PROMPTS]
    images = sorted({image for _, image in places})[:GRID_IMAGES]
    yield _per_prompt(found, start, prompts)
    for curve in found.curves("strengths"):
        named = [(key, strength_of(curve.sweep, strength)) for strength, key in zip(curve.strengths, curve.points)]
        yield _grid_of_curves(
            found, "magnitudes", "‖Δ‖ at adjustment strengths γ̃ (as Figures 3 and 9)", named, prompts, images
        )
        yield _mean_curves(found, "magnitudes-mean", "‖Δ‖ at adjustment strengths γ̃, all traced images", named)
    for curve in found.curves("per_sample"):
        named = [*lines, (curve.points[0], "per-sample")]
        title = "‖Δ‖ with per-sample (as Figure 10)"
        yield _grid_of_curves(found, "magnitudes-per-sample", title, named, prompts, images)
        yield _mean_curves(found, "magnitudes-per-sample-mean", f"{title}, all traced images", named)


def _points(found: Results, keys: Sequence[tuple[str, str]], prompts: Sequence[int] | None = None) -> pd.DataFrame:
    rows = [
        {"curve": label, "prompt": prompt, "image": image, "t": t, "magnitude": size}
        for key, label in keys
        for (point, prompt, image), trace in found.traces.items()
        if point == key and (prompts is None or prompt in prompts)
        for t, size in trace
    ]
    return pd.DataFrame(rows, columns=["curve", "prompt", "image", "t", "magnitude"])


def _decorate(ax: Axes, title: str = "") -> None:
    ax.invert_xaxis()
    ax.set_ylim(bottom=0)
    ax.set_xlabel("timestep t", fontsize=8)
    ax.set_ylabel("‖Δ(x_t, t)‖", fontsize=8)
    ax.tick_params(labelsize=7)
    ax.set_title(title, fontsize=7)


def _short(text: str, most: int = 40) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _per_prompt(found: Results, start: str, prompts: Sequence[int]) -> Drawn:
    """Figure 2: a plot for every prompt, a line for every noise."""
    shown = prompts[:3]
    drawn, axes = _figure(1, len(shown), width=3.4 * len(shown), height=3)
    for ax, prompt in zip(axes[0], shown):
        for (key, number, image), trace in sorted(found.traces.items()):
            if key == start and number == prompt:
                ax.plot(*trace.T, linewidth=1, label=f"noise {image + 1}")
        _decorate(ax, _short(found.plan.prompts[prompt].caption))
    axes[0, 0].legend(fontsize=6)
    data = _points(found, [(start, "noise as drawn")], shown)
    return Drawn("magnitudes-noises", "‖Δ‖ of different noises (as Figure 2)", drawn, data, note=WITHOUT_GUIDANCE)


def _grid_of_curves(
    found: Results,
    name: str,
    title: str,
    keys: Sequence[tuple[str, str]],
    prompts: Sequence[int],
    images: Sequence[int],
) -> Drawn:
    """A plot for every prompt and noise, a line for every setting."""
    places = [(prompt, image) for prompt in prompts for image in images]
    # Of one noise each, prompts stand side by side.
    columns = min(len(images), GRID_IMAGES) if len(images) > 1 else min(len(prompts), 3)
    rows = -(-len(places) // columns)
    drawn, axes = _figure(rows, columns, width=2.9 * columns + 0.4, height=2.2 * rows + 0.3)
    for ax, place in zip_longest(axes.flat, places):
        if place is None:
            ax.set_axis_off()
            continue
        prompt, image = place
        for key, label in keys:
            trace = found.traces.get((key, prompt, image))
            if trace is not None:
                ax.plot(*trace.T, linewidth=1, label=label)
        _decorate(ax, f"{_short(found.plan.prompts[prompt].caption, 32)}, noise {image + 1}")
    axes[0, 0].legend(fontsize=6)
    return Drawn(name, title, drawn, _points(found, keys, prompts), note=WITHOUT_GUIDANCE)


def _mean_curves(found: Results, name: str, title: str, keys: Sequence[tuple[str, str]]) -> Drawn:
    data = _points(found, keys)
    drawn, axes = _figure(height=3.4)
    for _, label in keys:
        mean = data[data["curve"] == label].groupby("t")["magnitude"].mean()
        axes[0, 0].plot(mean.index, mean.to_numpy(), label=label, linewidth=1.3)
    _decorate(axes[0, 0])
    axes[0, 0].legend(fontsize=7)
    mean = data.groupby(["curve", "t"], sort=False)["magnitude"].mean().reset_index()
    return Drawn(name, title, drawn, mean, note="The mean over images, whose transitions are at different timesteps.")


# Pictures


def grid(found: Results, run: Run, figure: str, title: str) -> Drawn:
    """The training picture and what every method made of the same noise, a row a prompt."""
    curves = found.curves(figure)
    if figure == "windows":
        shown = [
            (key, f"from t = {strength:g}") for curve in curves for strength, key in zip(curve.strengths, curve.points)
        ]
    else:
        shown = [_middle(curve) for curve in curves]
    asked = range(min(found.plan.points[key].prompts for key, _ in shown))
    numbers = [k for k in asked if any(run.picture(key, k, 0).is_file() for key, _ in shown)][:GRID_PROMPTS]
    drawn, axes = _figure(
        max(1, len(numbers)), 1 + len(shown), width=1.25 * (1 + len(shown)), height=1.5 * max(1, len(numbers))
    )
    for ax in axes.flat:
        ax.set_axis_off()
    for row, number in zip(axes, numbers):
        prompt = found.plan.prompts[number]
        row[0].set_title(_short(prompt.caption, 24), fontsize=6)
        try:
            _show(row[0], training_picture(prompt.references[0]))
        except (OSError, IndexError):
            row[0].text(0.5, 0.5, "no training\npicture", ha="center", va="center", fontsize=6)
        for ax, (key, label) in zip(row[1:], shown):
            try:
                with Image.open(run.picture(key, number, 0)) as picture:
                    _show(ax, picture.convert("RGB"))
            except OSError:
                ax.text(0.5, 0.5, "missing", ha="center", va="center", fontsize=6)
            if number == numbers[0]:
                ax.set_title(label, fontsize=6)
    kind = (
        "Guidance from one timestep on" if figure == "windows" else "Pictures of the same noise, training picture first"
    )
    return Drawn(f"pictures-{figure}", f"{kind} (as {title})", drawn, None)


def _middle(curve: Curve) -> tuple[str, str]:
    """A curve's point of middle strength, and its name."""
    k = len(curve.points) // 2
    strength = "" if curve.sweep is None else f"\n{strength_of(curve.sweep, curve.strengths[k])}"
    return curve.points[k], f"{curve.name}{strength}"


def _show(ax: Axes, picture: Image.Image) -> None:
    small = picture.copy()
    small.thumbnail((256, 256))
    ax.imshow(np.asarray(small))


# Cost


def cost(found: Results) -> Drawn:
    """Table 3: rows and time of an image, as ratios to no mitigation, and peak memory."""
    data = found.table("methods")
    if "none" in found.plan.points:
        for name in ("seconds", "memory"):
            own = found.estimate("none", name).value
            data[f"{name} ratio"] = data[name] / own
    columns = ["curve", "strength", "rows", "backward_rows", "seconds", "seconds ratio", "memory", "memory ratio"]
    shown = [name for name in columns if name in data and (name in ("curve", "strength") or data[name].notna().any())]
    note = (
        "Rows are network evaluations of one image, counted; seconds are those of its request, divided by the images "
        "in it, whatever else the machine had to do; memory is the GPU's peak."
    )
    return Drawn("cost", "Cost of an image (as Table 3)", None, data[shown], tuple(shown), note)


def save(drawn: Drawn, folder: Path) -> None:
    """Write a figure as PNG and SVG, and its data as CSV and Parquet.

    Raises:
        OSError: one cannot be written.
    """
    writers: dict[str, Callable[[Path], object]] = {}
    if drawn.figure is not None:
        figure = drawn.figure
        writers["png"] = lambda path: figure.savefig(path, format="png", dpi=150)
        writers["svg"] = lambda path: figure.savefig(path, format="svg", metadata={"Date": None})
    if drawn.data is not None:
        data = drawn.data
        writers["csv"] = lambda path: data.to_csv(path, index=False)
        # A column of strengths may have numbers and words in it, which Parquet cannot have.
        mixed = {
            name: str for name in data.columns if data[name].map(type).nunique() > 1 and data[name].dtype == object
        }
        with suppress(ImportError):  # pyarrow is optional
            import pyarrow  # noqa: F401

            writers["parquet"] = lambda path: data.astype(mixed).to_parquet(path, index=False)
    for kind, write in writers.items():
        with replacing(folder / f"{drawn.name}.{kind}") as partial:
            write(partial)
