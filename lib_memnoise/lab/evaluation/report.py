"""The report of a run: one HTML page with everything in it, and the same numbers for machines."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from lib_memnoise import __version__
from lib_memnoise.core.files import replacing
from lib_memnoise.lab.evaluation.claims import CLAIMS, Claim, claims, overall
from lib_memnoise.lab.evaluation.figures import Drawn, draw, label_of_point, save
from lib_memnoise.lab.evaluation.metrics import METRICS, label_of, metric_of
from lib_memnoise.lab.evaluation.results import Results, compared, results
from lib_memnoise.lab.evaluation.run import NEAREST, Run
from lib_memnoise.lab.pages import address, environment
from lib_memnoise.lab.stats import Estimate

PAGE, FIGURES, TEMPLATE = "report.html", "figures", "report.html.jinja"


def number(value: Any) -> str:
    """A cell of a table."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3f}" if 1e-3 <= abs(value) < 100 else f"{value:.4g}"


def _picture(drawn: Drawn, folder: Path) -> str | None:
    """The figure's file, as an address."""
    if drawn.figure is None:
        return None
    return address((folder / f"{drawn.name}.png").read_bytes())


def _table(data: pd.DataFrame | None, columns: Sequence[str]) -> dict[str, Any] | None:
    if data is None or not columns:
        return None
    return {"columns": list(columns), "rows": data[list(columns)].astype(object).to_numpy().tolist()}


def report(run: Run, absent: dict[str, str] | None = None) -> tuple[Results, list[Claim], Path]:
    """Write a run's figures and page, from its records.

    Raises:
        OSError: one cannot be written.
    """
    found = results(run, absent)
    judged = claims(found)
    folder = run.folder / FIGURES
    parts = []
    for drawn in draw(found, run):
        save(drawn, folder)
        parts.append(
            {
                "title": drawn.title[:1].upper() + drawn.title[1:],
                "note": drawn.note,
                # A figure's inches at the page's size of text.
                "width": 0 if drawn.figure is None else round(7 * float(drawn.figure.get_figwidth())),
                "picture": _picture(drawn, folder),
                "table": _table(drawn.data, drawn.shown),
                "name": drawn.name,
            }
        )
    save(Drawn("images", "", None, found.images), folder)
    templates = environment(Path(__file__).parent)
    templates.filters["number"] = number
    page = templates.get_template(TEMPLATE).render(
        version=__version__, plan=found.plan, source=found.source, metrics=_measured(found), labels=METRICS,
        absent=found.absent, claims=grouped(judged), verdicts=VERDICTS, parts=parts, found=found,
        prompts=len(found.plan.prompts), unknown=[nearest_is_unknown(name) for name in found.unknown_nearest],
    )  # fmt: skip
    path = run.folder / PAGE
    with replacing(path) as partial:
        partial.write_text(page, encoding="utf-8")
    with replacing(run.folder / "claims.json") as partial:
        partial.write_text(
            json.dumps([plain(claim) for claim in judged], indent=1, ensure_ascii=False), encoding="utf-8"
        )
    return found, judged, path


def plain(claim: Claim) -> dict[str, Any]:
    """A claim for machines; NaN is null."""

    def known(value: Any) -> Any:
        return None if isinstance(value, float) and math.isnan(value) else value

    content = {**asdict(claim), "holds": claim.holds}
    for name in ("estimate", "beside"):
        if content[name] is not None:
            content[name] = {key: known(value) for key, value in content[name].items()}
    return content


def _measured(found: Results) -> list[tuple[str, str, str]]:
    """What was measured: label, what is better, with what."""
    return [
        (label_of(column), "lower" if metric_of(column).lower_is_better else "higher", source)
        for column, source in found.metrics.items()
    ]


VERDICTS = {True: "holds", False: "does not hold", None: "is not shown"}
"""None: the interval has both in it, or something is missing."""


def grouped(judged: Sequence[Claim]) -> list[dict[str, Any]]:
    """Every claim of the paper's, its verdict and its parts in this run."""
    groups = []
    for number, claim in CLAIMS.items():
        parts = [part for part in judged if part.number == number]
        holds = overall(parts)
        counts = [sum(part.holds is each for part in parts) for each in (True, False, None)]
        words = ("shown", "refuted", "undecided")
        said = ", ".join(f"{count} {word}" for count, word in zip(counts, words) if count)
        summary = "" if len(parts) < 2 else f"of its {len(parts)} parts {said}"
        groups.append({"number": number, "claim": claim, "holds": holds, "parts": parts, "summary": summary})
    return groups


def text(found: Results, judged: Sequence[Claim]) -> str:
    """The results as plain text: a line a point, then the claims."""
    lines = []
    names = list(found.metrics)
    data = found.table("methods")
    if len(data) and names:
        lines.append(f"{'':42}" + "".join(f"{name:>26}" for name in names) + f"{'rows':>9}")
        for _, row in data.iterrows():
            label = label_of_point(row)
            cells = [
                str(Estimate(row[name], row[f"{name} low"], row[f"{name} high"], len(found.plan.prompts)))
                for name in names
            ]
            lines.append(f"{label:42}" + "".join(f"{cell:>26}" for cell in cells) + f"{number(row['rows']):>9}")
        lines.append("")
    for group in grouped(judged):
        if not group["parts"]:
            continue
        lines.append(f"({group['number']}) {group['claim']}: {VERDICTS[group['holds']]}.")
        for part in group["parts"]:
            beside = "" if part.beside is None else f"; {part.beside_of}: {part.beside}"
            lines.append(f"    {VERDICTS[part.holds]:14} {part.estimate!s:26} {part.claim} ({part.measured}{beside})")
    lines += ["", *notes(found)]
    return "\n".join(lines)


def notes(found: Results) -> list[str]:
    """What a reader must know of the numbers."""
    lines = [
        f"{len(found.images)} of {found.plan.total} images, {len(found.plan.prompts)} prompts; "
        "intervals are 95 % bootstrap intervals over prompts."
    ]
    if found.missing:
        lines.append(f"{found.missing} images are missing.")
    if found.failed:
        lines.append(f"{found.failed} images could not be mitigated, and are left out.")
    if any(claim.holds is None for claim in claims(found)):
        lines.append("What is not shown has an interval on both sides of the claim: more prompts would decide it.")
    near = [name for name in NEAREST if found.has(name)]
    if near:
        own = ", ".join(f"{name}_own" for name in near)
        lines.append(f"{', '.join(near)}: to the nearest of all training pictures; {own}: to the prompt's own.")
    lines += [nearest_is_unknown(name) for name in found.unknown_nearest]
    lines += [f"{name} is not measured: {reason}." for name, reason in found.absent.items()]
    return lines


def nearest_is_unknown(name: str) -> str:
    return (
        f"{name} is measured of the prompts' own training pictures alone: copies of others are not counted until "
        "evaluate measures them."
    )


def comparison(a: Run, b: Run) -> pd.DataFrame:
    """Paired differences b − a."""
    return compared(results(a), results(b))


def comparison_text(data: pd.DataFrame, a: Path, b: Path) -> str:
    """The differences as plain text; a star marks those whose interval excludes 0."""
    lines = [f"a: {a}", f"b: {b}", "", f"{'':44}{'metric':14}{'images':>7}{'a':>10}{'b':>10}   b − a"]
    for _, row in data.iterrows():
        differs = row["low"] > 0 or row["high"] < 0
        lines.append(
            f"{row['method']:44}{row['metric']:14}{row['images']:7d}{row['a']:10.4f}{row['b']:10.4f}   "
            f"{row['difference']:+.4f} [{number(row['low'])}, {number(row['high'])}]{' *' if differs else ''}"
        )
    return "\n".join(
        [*lines, "", "The same prompts and seeds; *: the 95 % bootstrap interval over prompts excludes 0."]
    )
