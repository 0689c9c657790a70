"""The results for people: lines for a terminal, and a markdown page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Entry = dict[str, Any]
Row = Sequence[str]


def lines(entry: Entry) -> list[str]:
    """One entry for a terminal."""
    title = f"{entry['part']}: {entry['name']}"
    if "not run" in entry:
        return [f"{title}: not run: {entry['not run']}"]
    return [title, *(aligned(rows) if (rows := table(entry)) else [])]


def aligned(rows: Sequence[Row]) -> list[str]:
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def table(entry: Entry) -> list[Row]:
    """A header and rows of an entry's figures."""
    return TABLES[entry["part"]](entry["figures"])


def number(value: Any, digits: int = 3) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.{digits}g}"
    return str(value)


def between(values: dict[str, float]) -> str:
    return f"{values['median']:.3f} ({values['min']:.3f} to {values['max']:.3f})"


def compared(values: Sequence[Any]) -> str:
    return "" if all(value is None for value in values) else " / ".join(number(value) or "-" for value in values)


def timed(figures: Entry) -> list[Row]:
    rows: list[Row] = [
        ("method", "time, × none", "target ≤", "paper", "memory, × none", "target ≤", "paper", "peak MB", "rows",
         "backward")
    ]  # fmt: skip
    for name, found in figures["methods"].items():
        if "not run" in found:
            rows.append((name, f"not run: {found['not run']}", *[""] * 8))
            continue
        paper = found["paper"] or (None, None)
        rows.append(
            (
                name + (" (prototype)" if found["prototype"] else ""),
                between(found["time"]),
                number(found["target"]["time"], 4),
                number(paper[0]),
                "not run" if found["memory"] is None else f"{found['memory']:.3f}",
                number(found["target"]["memory"]),
                number(paper[1]),
                number(found["peak, MB"]),
                number(found["rows"]),
                number(found["backward rows"]),
            )
        )
    none = figures["seconds of none"]
    rows.append((f"none: {none['median']:.3f} s a batch, {figures['turns']} turn(s)", *[""] * 9))
    return rows


def generic(header: Row, keys: Sequence[str]) -> Any:
    """A table of `rows`, each a dict with these keys."""

    def made(figures: Entry) -> list[Row]:
        return [header, *([number(row.get(key)) for key in keys] for row in figures["rows"])]

    return made


TABLES: dict[str, Any] = {
    "time": timed,
    "syncs": generic(
        ("method", "a sampler step", "an optimiser step", "an adjustment step", "place"),
        ("method", "sampler", "optimiser", "adjustment", "place"),
    ),
    "memory": generic(
        ("limit, MB", "meant to end", "tried", "ended", "as without a limit", "allocated before", "after"),
        ("limit", "wanted", "tried", "ended", "same", "before", "after"),
    ),
    "precision": generic(
        ("what", "found", "bound", "within"),
        ("what", "found", "bound", "within"),
    ),
    "miniature": generic(
        (
            "method",
            "copied, CPU",
            "copied, here",
            "similarity, CPU",
            "here",
            "difference, 95 %",
            "same verdict",
            "rows, CPU",
            "rows, here",
        ),
        ("method", "copied cpu", "copied", "similarity cpu", "similarity", "interval", "agree", "rows cpu", "rows"),
    ),
}


def markdown(entries: Sequence[Entry]) -> str:
    """The newest entry of each name, as a page."""
    newest = {(entry["part"], entry["name"], entry["precision"]): entry for entry in entries}
    parts: list[str] = []
    first = entries[0]["labels"]
    parts.append(f"# {first['device']}\n")
    said = ", ".join(f"{name} {value}" for name, value in first.items() if value is not None and name != "device")
    parts.append(f"{said}. `benchmarks/device.sh` wrote this; benchmarks/README.md says what the figures are.\n")
    current = None
    for entry in sorted(newest.values(), key=lambda entry: list(TABLES).index(entry["part"])):
        if entry["part"] != current:
            current = entry["part"]
            parts.append(f"## {current}\n")
        precision = f" ({entry['precision']})" if entry["precision"] else ""
        parts.append(f"### {entry['name']}{precision}, {entry['when']}\n")
        if "not run" in entry:
            parts.append(f"Not run: {entry['not run']}.\n")
            continue
        header, *rows = table(entry)
        parts.append("\n".join([_line(header), "|" + "---|" * len(header), *map(_line, rows)]) + "\n")
        parts += [f"{remark}\n" for remark in entry["figures"].get("remarks", [])]
    return "\n".join(parts)


def _line(cells: Row) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
