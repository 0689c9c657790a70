"""The layout: which part of the package may import which, how long its modules and functions may be, and its state."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from lib_memnoise.lab.evaluation import metrics, plan

ROOT = Path(__file__).parent.parent
PACKAGE = "lib_memnoise"
LAYERS = (
    ("scripts", "__main__"),
    # The front ends; none knows another.
    ("webui", "lab", "diffusers"),
    ("sampling",),
    ("methods",),
    ("core",),
    ("settings",),
    ("torch_utils",),
    ("registry", "errors", ""),
)
"""From the top: a part may import its own modules and those of the layers below it. "" is the package itself."""
INSIDE = {
    "webui": (
        ("api", "support"),
        ("ui",),
        ("payload", "hooks"),
        ("services", "adjusting", "baseline_trace", "conditioning", "progress", "nested"),
        ("gradients", "blank_prompts", "sampling_pass"),
        ("checkpoint", "host_conditions", "host_state", "tokens", "request"),
        ("backends",),
        ("failures", "sampler_start"),
        ("session", "quirks"),
    ),
}
"""Layers within a part, by the first name below it."""
MOST_LINES = 500
MOST_HELPER_LINES = 200
"""Of a front end that is one module."""
MOST_FUNCTION_LINES = 60
PUBLISHED = {
    "methods/descent.py": {"descend"},
    "methods/forward_descent.py": {"descend_forward"},
    "methods/sail.py": {"adjust"},
    "methods/prompt_embedding.py": {"adjust"},
}
"""Functions that state a published algorithm, which may be longer."""


@functools.cache
def trees() -> dict[str, tuple[Path, ast.Module]]:
    """The syntax tree of every module, and of the script as "scripts"."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        found[name] = path, ast.parse(path.read_text(encoding="utf-8"))
    script = ROOT / "scripts" / "memnoise.py"
    found["scripts"] = script, ast.parse(script.read_text(encoding="utf-8"))
    return found


def imports_of(name: str) -> set[str]:
    """The project's modules that a module imports, inside functions as well."""
    path, tree = trees()[name]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            module = node.module or ""
            for alias in node.names:
                full = f"{module}.{alias.name}"
                found.add(full if full in trees() else module)
    return {module for module in found if module in trees()} - {name}


def part_of(name: str) -> str:
    """The part of the package that a module belongs to: its first name below the package."""
    return name if name == "scripts" else [*name.split("."), ""][1]


def level(layers: tuple[tuple[str, ...], ...], part: str) -> int:
    return next((k for k, parts in enumerate(layers) if part in parts), -1)


def arrows() -> Iterator[tuple[str, str]]:
    for name in trees():
        for module in sorted(imports_of(name)):
            yield name, module


def test_every_part_has_a_layer() -> None:
    parts = {part_of(name) for name in trees()}
    assert parts == {part for layer in LAYERS for part in layer}
    inside = {name.split(".")[2] for name in trees() if name.startswith(f"{PACKAGE}.webui.")}
    assert inside == {part for layer in INSIDE["webui"] for part in layer}


def test_no_arrow_runs_up_or_across() -> None:
    wrong = []
    for name, module in arrows():
        upper, lower = part_of(name), part_of(module)
        if upper != lower and level(LAYERS, upper) >= level(LAYERS, lower):
            wrong.append(f"{name} -> {module}")
        if upper == lower == "webui" and name != module:
            first, second = ([*other.split("."), ""][2] for other in (name, module))
            if first and second and first != second and level(INSIDE["webui"], first) > level(INSIDE["webui"], second):
                wrong.append(f"{name} -> {module}")
    assert wrong == []


def test_there_is_no_circle() -> None:
    graph = {name: imports_of(name) for name in trees()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail[trail.index(name) :], name))
        if name in done:
            return
        for module in graph[name]:
            visit(module, (*trail, name))
        done.add(name)

    for name in graph:
        visit(name, ())


def test_only_the_webui_imports_the_host() -> None:
    for name, (path, tree) in trees().items():
        roots = {
            alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
        }
        roots |= {(node.module or "").split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        if roots & {"modules", "modules_forge", "ldm_patched", "backend", "gradio"}:
            assert part_of(name) in ("webui", "scripts"), path


def test_modules_and_functions_are_short() -> None:
    long = []
    for path, tree in trees().values():
        where = path.relative_to(ROOT).as_posix()
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > (MOST_HELPER_LINES if path.name == "diffusers.py" else MOST_LINES):
            long.append(f"{where}: {lines} lines")
        exempt = PUBLISHED.get(where.removeprefix(f"{PACKAGE}/"), set())
        for node in ast.walk(tree):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or node.name in exempt:
                continue
            body = node.body[1:] if ast.get_docstring(node) is not None and len(node.body) > 1 else node.body
            length = (node.end_lineno or 0) - body[0].lineno + 1
            if length > MOST_FUNCTION_LINES:
                long.append(f"{where}: {node.name} has {length} lines")
    assert long == []


def test_what_is_put_on_the_hosts_objects_is_in_the_inventory() -> None:
    """No attribute with the project's name is set or read but those that `webui.session` declares."""
    source = (ROOT / PACKAGE / "webui" / "session.py").read_text(encoding="utf-8")
    declared = set(re.findall(r'^[A-Z_]+ = "(memnoise\w*)"$', source, re.MULTILINE))
    assert len(declared) == len(re.findall(r"^    [A-Z_]+: Attribute\(", source, re.MULTILINE)) > 5
    options = {"memnoise_save_traces", "memnoise_page_note", "memnoise_fail_instead"}  # the settings page's
    for name, (path, tree) in trees().items():
        if part_of(name) not in ("webui", "sampling"):
            continue
        for node in ast.walk(tree):
            named = node.attr if isinstance(node, ast.Attribute) else None
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in (
                "getattr",
                "setattr",
                "hasattr",
                "delattr",
            ):
                key = node.args[1]
                named = key.value if isinstance(key, ast.Constant) else None
            if isinstance(named, str) and named.startswith("memnoise"):
                assert named in declared | options, f"{path}: {named}"


@pytest.mark.parametrize("name", plan.METRICS)
def test_the_metrics_of_a_plan_are_those_that_can_be_measured(name: str) -> None:
    assert tuple(metrics.METRICS) == plan.METRICS and name in metrics.METRICS
