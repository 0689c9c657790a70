"""The command line: what it prints, what it writes, and what it says of what is wrong."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import webbrowser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lib_memnoise import __version__
from lib_memnoise.__main__ import main
from lib_memnoise.lab import claims, comparison, experiment
from lib_memnoise.lab.miniature import WEIGHTS, OneSentence, checkpoint, model
from lib_memnoise.lab.processes import Workers
from lib_memnoise.settings import from_mapping, json_schema

ROOT = Path(__file__).parents[1]
KEYS = {
    "method", "settings", "prompts", "images", "similarity", "similarity_own", "copied", "copied_own", "alignment",
    "rows", "backward_rows", "magnitude_before", "magnitude_after", "norm",
}  # fmt: skip
SMALL = ("--prompts", "2", "--images", "1", "--steps", "4", "--processes", "1")


pytestmark = pytest.mark.usefixtures("threads")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def error_of(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def refusal(*argv: str) -> str:
    """The one sentence with which a command ends."""
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    said = str(stopped.value.code)
    assert said.startswith("memnoise: ") and said.endswith(".") and "\n" not in said
    return said


def records_of(capsys: pytest.CaptureFixture[str], *argv: str) -> list[dict[str, Any]]:
    main(["demo", "--json", *argv])
    return list(json.loads(capsys.readouterr().out))


@pytest.fixture(scope="module")
def miniature() -> model.Miniature:
    return model.load_miniature()


# The demo


def test_json(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    records = records_of(capsys, *SMALL, "--seed", "5")
    assert [record["method"] for record in records] == ["none", "static tau", "batch-wise", "per-sample"]
    for record in records:
        assert record.keys() == KEYS
        assert record["images"] == 1 and record["prompts"] == 2
        settings = from_mapping(record["settings"])  # as the API takes them
        assert settings.enabled == (record["method"] != "none")
        assert all(np.isfinite(value) for value in record.values() if isinstance(value, float))
    assert records_of(capsys, *SMALL, "--seed", "5", "--processes", "2") == records  # to the bit
    assert records_of(capsys, *SMALL, "--seed", "6") != records
    assert not list(folder.iterdir())  # no page unless one is named


def test_table_and_page(capsys: pytest.CaptureFixture[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    prompt = "a fox on a red background"
    main(["demo", *SMALL, "--prompt", prompt, "--sampler", "Euler", "--open"])
    out = capsys.readouterr().out
    assert "no evidence about the checkpoints people use" in out and "1 prompts, 1 images each" in out
    for name in comparison.COMPARED:
        assert f"\n{name}  " in out
    page = folder / "memnoise-demo.html"
    assert opened == [page.as_uri()] and str(page) in out
    assert f"<h2>{prompt}</h2>" in page.read_text(encoding="utf-8")
    assert [path.name for path in folder.iterdir()] == [page.name]


def test_unknown_words() -> None:
    said = refusal("demo", *SMALL, "--prompt", "a zebra in a submarine")
    assert "does not know the words 'submarine', 'zebra'" in said


@pytest.mark.skipif(getattr(os, "geteuid", lambda: 1)() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(folder: Path) -> None:
    folder.chmod(0o500)
    try:
        assert "cannot be written" in refusal("demo", *SMALL)
    finally:
        folder.chmod(0o700)


@pytest.mark.parametrize("name", ["missing/page.html", "."])
def test_a_page_that_cannot_be_written(name: str) -> None:
    assert "cannot be written" in refusal("demo", *SMALL, "--page", name)


def test_tampered_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    copy = tmp_path / "weights"
    shutil.copytree(WEIGHTS, copy)
    with (copy / "eps.safetensors").open("r+b") as file:
        file.truncate(1000)
    monkeypatch.setattr(model.load_miniature, "__defaults__", ("eps", copy))
    assert "eps.safetensors is damaged (1000 bytes)" in refusal("demo", *SMALL)


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate")],
)
def test_too_little_memory(monkeypatch: pytest.MonkeyPatch, folder: Path, error: Exception) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(comparison, "compare", full)
    assert "not enough memory" in refusal("demo", *SMALL)
    assert not list(folder.iterdir())


def test_interrupted(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(comparison, "compare", stop)
    with pytest.raises(SystemExit) as stopped:
        main(["demo", *SMALL])
    assert stopped.value.code == 130 and not list(folder.iterdir())


# The claims


def test_claims_that_fail_fail_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    # Two steps, and two of the gradient's, make pictures of nothing. Two prompts of each kind are enough for that.
    monkeypatch.setattr(claims, "ORDINARY", 2)
    monkeypatch.setattr(claims, "subjects", lambda **kinds: experiment.subjects(**kinds)[:2])
    for name in ("PER_SAMPLE", "HALF"):
        monkeypatch.setattr(claims, name, dataclasses.replace(getattr(claims, name), max_steps=2))
    monkeypatch.setattr(claims, "SHORT", claims.Plan(images=1, taus=(900.0, 800.0), controls=1, steps=2))
    said = []
    for how in (("1", "--json"), ("2", "--json"), ("1", "--markdown")):
        with pytest.raises(SystemExit) as stopped:
            main(["claims", "--short", "--processes", *how])
        assert stopped.value.code == 1
        said.append(capsys.readouterr().out)
    assert said[1] == said[0]  # however many processes
    assert said[2].splitlines()[2].startswith("| none | ") and said[2].count("\n| ") == 9 + 12 + 1
    found = json.loads(said[0])
    assert [point["method"] for point in found["points"]] == [
        "none", "static tau 900", "static tau 800", "batch-wise", "per-sample, to a quarter", "per-sample, to half",
        "automatic tau", "batch-wise, automatic tau", "random displacement",
    ]  # fmt: skip
    assert not all(claim["holds"] for claim in found["claims"])
    assert all(point["similarity_own"] <= point["similarity"] for point in found["points"])


def test_a_process_that_ends_is_said_and_leaves_none(miniature: model.Miniature) -> None:
    before = set(multiprocessing.active_children())
    with pytest.raises(OneSentence, match="a process ended before its work was done"), Workers(miniature, 2) as some:
        some.submit(end).result()
    assert set(multiprocessing.active_children()) == before


def test_what_a_process_raises_is_raised(miniature: model.Miniature) -> None:
    with pytest.raises(ZeroDivisionError), Workers(miniature, 2) as some:
        later = [some.submit(divide, k) for k in (1, 0, 1)]
        assert [future.result() for future in later]


def end(_: model.Miniature) -> None:
    os._exit(3)


def divide(_: model.Miniature, by: int) -> float:
    return 1 / by


def test_scores_of_the_miniature_take_nothing_of_a_webuis() -> None:
    assert "words was given" in refusal("score", "a fox", "--words")
    assert "cfg_scale was given" in refusal("score", "--cfg", "0")
    assert "takes one --seed" in refusal("score", "a fox", "--seed", "1", "--seed", "2")


# The miniature


def test_install_needs_a_webui(folder: Path) -> None:
    assert "is not a WebUI: it has no launch.py" in refusal("miniature", "install", str(folder))


def test_install_says_what_it_wrote(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    (folder / "launch.py").touch()
    monkeypatch.setattr(checkpoint, "find_merges", lambda _: folder)
    monkeypatch.setattr(checkpoint, "clip_files", lambda *_: {"vocab.json": "{}"})
    main(["miniature", "install", str(folder), "--variant", "eps", "--ckpt-dir", str(folder / "models")])
    file = folder / "models" / "memnoise-miniature.safetensors"
    assert capsys.readouterr().out == f"{file}\n" and file.stat().st_size > 1_000_000


@pytest.mark.skipif(getattr(os, "geteuid", lambda: 1)() == 0, reason="root may write everywhere")
def test_install_without_permission(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    (folder / "launch.py").touch()
    monkeypatch.setattr(checkpoint, "find_merges", lambda _: folder)
    monkeypatch.setattr(checkpoint, "clip_files", lambda *_: {"vocab.json": "{}"})
    folder.chmod(0o500)
    try:
        assert "Permission denied" in refusal("miniature", "install", str(folder))
    finally:
        folder.chmod(0o700)


# Arguments


@pytest.mark.parametrize(
    "argv, bounds",
    [
        (("--prompts", "13"), "from 1 to 12"),
        (("--threads", "0"), "from 1 to 64"),
        (("--processes", "0"), "from 1 to 64"),
        (("--images", "0"), "from 1 to 1000"),
        (("--images", "1001"), "from 1 to 1000"),
        (("--images", "1.5"), "from 1 to 1000"),
        (("--seed", "-1"), "from 0 to 4294967295"),
        (("--seed", "4294967296"), "from 0 to 4294967295"),
        (("--seed", "x" * 500), "from 0 to 4294967295"),
        (("--steps", "1"), "from 2 to 1000"),
        (("--steps", "1001"), "from 2 to 1000"),
        (("--steps", ""), "from 2 to 1000"),
    ],
)
def test_bad_numbers(capsys: pytest.CaptureFixture[str], argv: tuple[str, str], bounds: str) -> None:
    error = error_of(capsys, "demo", *argv)
    assert error.count("\n") == 1 and error.endswith(f"it must be a whole number {bounds}.\n")
    assert argv[0] in error and len(error) < 200


@pytest.mark.parametrize("argv", [(), ("paint",), ("demo", "--gpu"), ("demo", "--seed"), ("schema", "x")])
def test_bad_arguments(capsys: pytest.CaptureFixture[str], argv: tuple[str, ...]) -> None:
    error = error_of(capsys, *argv)
    assert error.startswith("python -m lib_memnoise") and error.count("\n") == 1


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delitem(sys.modules, "lib_memnoise.lab.miniature.train", raising=False)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(SystemExit, match=r"^memnoise: the package tqdm is missing; .*\[demo\]") as stopped:
        main(["miniature", "train", str(tmp_path / "work")])
    assert str(stopped.value).count("\n") == 0 and not list(tmp_path.iterdir())


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"memnoise {__version__}\n"


def test_schema(capsys: pytest.CaptureFixture[str]) -> None:
    main(["schema"])
    out = capsys.readouterr().out
    assert json.loads(out) == json_schema()
    assert out == json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"


def test_schema_needs_no_torch() -> None:
    code = (
        "import sys; from lib_memnoise.__main__ import main; main(['schema']); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).returncode == 0


def test_as_a_module() -> None:
    argv = [sys.executable, "-m", "lib_memnoise", "schema"]
    # A stream that cannot hold γ̃ unless the command line sees to it.
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.decode("utf-8")) == json_schema()


@pytest.mark.parametrize(
    "argv",
    [
        ("score", "a \udcff fox", "--url", "http://127.0.0.1:9"),
        ("score", "a fox", "--negative", "\udcff", "--url", "http://127.0.0.1:9"),
        ("score", "a fox", "--scheduler", "\udcff", "--url", "http://127.0.0.1:9"),
        ("score", "a fox", "--url", "http://\udcff"),
        ("score", "a fox", "--auth", "me:\udcff", "--url", "http://127.0.0.1:9"),
        ("demo", "--prompt", "\udcff"),
    ],
)
def test_bytes_that_are_no_text_are_refused(capsys: pytest.CaptureFixture[str], argv: tuple[str, ...]) -> None:
    error = error_of(capsys, *argv)
    assert (
        error.count("\n") == 1
        and "\\udcff" in error
        and error.endswith("it must be text in the terminal's encoding.\n")
    )


@pytest.mark.parametrize("text", ["nan", "inf", "1e999", "9" * 400, "seven", "\udcff"])
def test_a_scale_is_a_number(capsys: pytest.CaptureFixture[str], text: str) -> None:
    error = error_of(capsys, "score", "a fox", "--url", "http://127.0.0.1:9", "--cfg", text)
    assert error.count("\n") == 1 and error.endswith("is not valid; it must be a number.\n") and len(error) < 200


def test_what_is_no_text_is_said_in_the_terminal(tmp_path: Path) -> None:
    """Also where the parser itself repeats it."""
    for argv in ([b"\xff"], [b"score", b"a \xff", b"--url", b"x"], [b"demo", b"--page", b"/nowhere/\xff.html"]):
        done = subprocess.run(
            [sys.executable, "-m", "lib_memnoise", *argv], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode in (1, 2) and "Traceback" not in done.stderr and "udcff" in done.stderr, done.stderr


def test_numbers_that_json_has_not() -> None:
    from lib_memnoise.lab.client import WebUI, WebUIError

    with pytest.raises(WebUIError, match="none in JSON"):
        WebUI("http://127.0.0.1:9").post("score", {"cfg_scale": float("nan")})
