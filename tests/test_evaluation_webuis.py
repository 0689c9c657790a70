"""An evaluation on WebUIs: several share a queue, and die, hang and fail on the way; and on Dask's workers."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from lib_memnoise.__main__ import main
from lib_memnoise.lab.evaluation import cluster, dispatch
from lib_memnoise.lab.evaluation.generators import literal, parameters
from lib_memnoise.lab.evaluation.plan import Unit
from lib_memnoise.lab.evaluation.results import results
from lib_memnoise.lab.evaluation.run import Run
from tests.hosts.fleet import Process, free_port, in_front
from tests.test_command_line import refusal

pytest.importorskip("uvicorn")
pytestmark = pytest.mark.usefixtures("threads")

ROOT = Path(__file__).parents[1]
STATIC = {"name": "Static", "settings": {"method": "static"}, "sweep": {"tau": [900, 700]}}
DOCUMENT: dict[str, Any] = {
    "images": 4, "batch": 2, "steps": 8, "width": 64, "height": 64, "metrics": ["diversity"],
    "curves": [{"name": "none", "settings": None}, STATIC],
}  # fmt: skip


@pytest.fixture(scope="module")
def pair() -> Iterator[list[Process]]:
    with Process() as first, Process() as second:
        yield [first, second]


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    return write(tmp_path, {})


def write(folder: Path, changed: dict[str, Any], prompts: int = 6) -> Path:
    (folder / "prompts.txt").write_text("".join(f"a fox, number {k}\n" for k in range(prompts)))
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump({"prompts": "prompts.txt", **DOCUMENT, **changed}))
    return path


def evaluate(folder: Path, plan: Path, *argv: str) -> None:
    main(["evaluate", str(folder), "--plan", str(plan), *argv])


def complete(folder: Path) -> None:
    """Every image of the plan is there once, with its own seed, in the database and as a file."""
    with Run(folder) as run:
        found = [(point, prompt, image) for point, prompt, image, *_ in run.rows()]
        wanted = [(point, prompt, image) for point, prompt, count in run.plan.wanted() for image in range(count)]
        assert sorted(found) == sorted(wanted) and len(set(found)) == run.plan.total
        for point, prompt, image, seed, _ in run.rows():
            assert seed == run.plan.seed_of(prompt, image)
            assert run.picture(point, prompt, image).is_file()
        assert len(list((folder / "images").rglob("*.png"))) == run.plan.total
        assert results(run).missing == 0


# What is sent and what is read


def test_a_caption_keeps_its_meaning() -> None:
    assert literal("(a) [b] c\\d") == "\\(a\\) \\[b\\] c\\\\d"
    assert literal("cats AND dogs BREAK ANDES <i>X</i> <lora:x:1>") == "cats and dogs break ANDES <i>X</i> < lora:x:1>"


def test_the_infotext_is_read() -> None:
    text = 'a, b: c\nNegative prompt: d\nSteps: 8, Memnoise note: "x, \\"y\\": z", Memnoise magnitude: 1.5, Version: v1'
    assert parameters(text) == {
        "Steps": "8", "Memnoise note": 'x, "y": z', "Memnoise magnitude": "1.5", "Version": "v1",
    }  # fmt: skip


def test_what_the_webui_tells(pair: list[Process], tmp_path: Path) -> None:
    traced = {"method": "batch_wise", "tau": 0, "trace": "on"}
    curves = [{"name": "none", "settings": None}, {"name": "γ̃", "settings": traced, "sweep": {"gamma": [0, 0.7]},
                                                  "figures": ["strengths"]}]  # fmt: skip
    plan = write(tmp_path, {"curves": curves}, prompts=2)
    evaluate(tmp_path / "run", plan, "--url", pair[0].url)
    with Run(tmp_path / "run") as run:
        found = results(run)
        assert run.source["checkpoint"] == "sd1" and run.source["parameterization"] == "eps"
        still, moved = run.plan.curves[1].points
    adjusted = found.images[found.images["point"] == moved]
    assert (adjusted["before"] > 0).all() and (adjusted["norm"] > 0).all()
    assert adjusted["rows"].gt(0).all() and adjusted["seconds"].gt(0).all()
    traces = {key[0]: trace for key, trace in found.traces.items()}
    assert traces.keys() == {still, moved} and len(traces[still]) >= 7
    assert traces[moved][0, 1] < traces[still][0, 1]
    assert (tmp_path / "run" / "figures" / "magnitudes.csv").is_file()


# Several of them


def test_two_share_a_queue(pair: list[Process], plan: Path, tmp_path: Path) -> None:
    with in_front(pair[0].url) as first, in_front(pair[1].url) as second:
        evaluate(tmp_path / "run", plan, "--url", first.url, "--url", second.url)
        assert first.passed and second.passed
        assert first.passed + second.passed == 6 * 3 * 2  # two requests of two images at each point
    complete(tmp_path / "run")


def test_one_killed_for_good(plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Process() as stays, Process() as dies, in_front(dies.url) as watched:
        threading.Thread(target=_kill_after, args=(dies, watched, 3), daemon=True).start()
        # A front whose double is gone cuts connections.
        evaluate(tmp_path / "run", plan, "--url", stays.url, "--url", watched.url, "--attempts", "2")
        assert not dies.answers()
    complete(tmp_path / "run")


def _kill_after(process: Process, watched: Any, count: int) -> None:
    while watched.passed < count:
        time.sleep(0.002)
    process.kill()


def test_the_only_one_restarts(plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Process() as webui:

        def restart() -> None:
            while not any((tmp_path / "run" / "images").rglob("*.png")):
                time.sleep(0.002)
            webui.kill()
            time.sleep(1)
            webui.start()

        restarting = threading.Thread(target=restart, daemon=True)
        restarting.start()
        evaluate(tmp_path / "run", plan, "--url", webui.url)
        restarting.join()
    said = capsys.readouterr().err
    assert f"nothing answers at {webui.url}" in said and "Again in" in said
    complete(tmp_path / "run")


def test_errors_hangs_and_cuts(
    pair: list[Process], plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with in_front(pair[0].url) as front:
        front.spoil = [500, None, "cut", None, 503, None, "hang", None, 502, "cut"]
        evaluate(tmp_path / "run", plan, "--url", front.url, "--timeout", "1")
        said = capsys.readouterr().err
    assert said.count("Again in") == 6
    assert "out of order" in said and "did not answer in time" in said and "broke off" in said
    assert re.search(r"\d+/72 \[.*images/s", said), "no progress bar"
    complete(tmp_path / "run")


def test_a_unit_that_always_fails_is_set_aside(pair: list[Process], plan: Path, tmp_path: Path) -> None:
    with in_front(pair[0].url) as front:
        front.spoil = [500] * dispatch.ATTEMPTS
        run = ("evaluate", str(tmp_path / "run"), "--plan", str(plan), "--url", front.url)
        assert "2 images could not be made; the same command tries again" in refusal(*run)
        assert (tmp_path / "run" / "report.html").read_text().count("2 images are missing")
        main(run)
    complete(tmp_path / "run")


def test_one_is_there_from_the_start_the_other_comes_later(pair: list[Process], plan: Path, tmp_path: Path) -> None:
    late = Process()
    try:
        late.start(wait=False)
        evaluate(tmp_path / "run", plan, "--url", late.url, "--url", pair[0].url)
    finally:
        late.kill()
    complete(tmp_path / "run")


def test_none_is_left(plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    run = ("evaluate", str(tmp_path / "run"), "--plan", str(plan), "--url", url, "--attempts", "2")
    assert f"nothing answers at {url}" in refusal(*run)
    assert "0 of 72 images are there" in capsys.readouterr().err


# What is no use


def test_refusals(pair: list[Process], plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = ("evaluate", str(tmp_path / "run"), "--plan", str(plan), "--url")
    assert "has no memnoise; it must be a WebUI with this extension" in refusal(*run, f"{pair[0].url}/elsewhere")
    assert "is no address of a WebUI" in refusal(*run, "webui")
    with Process("sd1", "--without-memnoise") as bare:
        assert "has no memnoise" in refusal(*run, bare.url)
    monkeypatch.setattr(importlib.import_module("lib_memnoise.lab.evaluation.generators"), "__version__", "9.9.9")
    assert "has memnoise 0.1.0; this is 9.9.9" in refusal(*run, pair[0].url)
    assert not list((tmp_path / "run").rglob("*.png"))


def test_another_sampler_than_it_has(pair: list[Process], tmp_path: Path) -> None:
    plan = write(tmp_path, {"sampler": "Dimm"})
    run = ("evaluate", str(tmp_path / "run"), "--url", pair[0].url, "--plan", str(plan))
    assert "has no sampler 'Dimm'; it has" in refusal(*run)
    plan = write(tmp_path, {"sampler": "Euler", "scheduler": "Karas"})
    assert "has no schedule type 'Karas'; it has" in refusal(*run[:1], str(tmp_path / "two"), *run[2:])
    plan = write(tmp_path, {"sampler": "Euler", "scheduler": "Karras"}, prompts=1)
    main([*run[:1], str(tmp_path / "three"), *run[2:]])
    complete(tmp_path / "three")


def test_two_of_different_checkpoints(pair: list[Process], plan: Path, tmp_path: Path) -> None:
    with Process("sd2-v") as other:
        run = ("evaluate", str(tmp_path / "run"), "--plan", str(plan), "--url")
        said = refusal(*run, pair[0].url, "--url", other.url)
        assert "holds images of another origin" in said and "sd2-v" in said
        # and what was begun with the one is not gone on with by the other
        evaluate(tmp_path / "two", plan, "--url", pair[0].url)
        (next((tmp_path / "two" / "images").rglob("*.png"))).unlink()
        said = refusal("evaluate", str(tmp_path / "two"), "--plan", str(plan), "--url", other.url)
        assert "checkpoint is sd1 there and sd2-v here" in said


def test_a_password(plan: Path, tmp_path: Path) -> None:
    with Process("sd1", "--api-auth", "me:secret") as webui:
        run = ("evaluate", str(tmp_path / "run"), "--plan", str(plan), "--url", webui.url)
        assert "wants a user and password" in refusal(*run)
        main([*run, "--api-auth", "me:secret"])
    complete(tmp_path / "run")


# Dask


@contextlib.contextmanager
def dask(workers: int, url: str, logs: Path) -> Iterator[tuple[str, list[subprocess.Popen[bytes]]]]:
    """A scheduler and workers, each a process of its own, as on several machines."""
    port = free_port()
    address = f"tcp://127.0.0.1:{port}"
    quiet = {"DASK_DISTRIBUTED__WORKER__DAEMON": "False", "DASK_DISTRIBUTED__DASHBOARD__ENABLED": "False"}
    environment = {**os.environ, **quiet, "OMP_NUM_THREADS": "1", "MEMNOISE_URL": url}

    def begin(name: str, *command: str) -> subprocess.Popen[bytes]:
        with (logs / f"{name}.log").open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "distributed.cli." + command[0], *command[1:]],
                cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    running = [begin("scheduler", "dask_scheduler", "--host", "127.0.0.1", "--port", str(port), "--no-dashboard")]
    try:
        running += [
            begin(f"worker-{k}", "dask_worker", address, "--nthreads", "1", "--no-nanny", "--no-dashboard")
            for k in range(workers)
        ]
        yield address, running[1:]
    finally:
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_a_dask_worker_is_killed(
    pair: list[Process], plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("distributed")
    # A loaded machine is slow to start them.
    monkeypatch.setattr(cluster, "WAIT", 120.0)
    monkeypatch.setattr(cluster, "CONNECT", 120.0)
    with in_front(pair[0].url) as front, dask(2, front.url, tmp_path) as (address, workers):

        def kill() -> None:
            while front.passed < 5:
                time.sleep(0.002)
            workers[0].kill()

        threading.Thread(target=kill, daemon=True).start()
        evaluate(tmp_path / "run", plan, "--dask", address, "--url", front.url)
        assert workers[0].wait(10) and workers[1].poll() is None
        # A request that the killed one had may have been asked for twice; no other.
        assert 36 <= front.passed <= 37
    complete(tmp_path / "run")


def test_no_dask(
    pair: list[Process], plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("distributed")
    run = ("evaluate", str(tmp_path / "run"), "--plan", str(plan), "--url", pair[0].url, "--dask")
    monkeypatch.setattr(cluster, "WAIT", 1.0)
    monkeypatch.setattr(cluster, "CONNECT", 1.0)
    assert "no Dask scheduler with a worker" in refusal(*run, f"tcp://127.0.0.1:{free_port()}")
    monkeypatch.setattr(cluster, "WAIT", 120.0)
    monkeypatch.setattr(cluster, "CONNECT", 120.0)
    monkeypatch.setattr(cluster, "LOOK", 0.5)
    with in_front(pair[0].url) as front, dask(1, front.url, tmp_path) as (address, workers):

        def kill() -> None:
            while front.passed < 5:
                time.sleep(0.002)
            monkeypatch.setattr(cluster, "WAIT", 1.0)
            workers[0].kill()

        threading.Thread(target=kill, daemon=True).start()
        assert "no worker is left" in refusal(*run, address)
    with Run(tmp_path / "run") as begun:
        assert 0 < begun.done < begun.plan.total  # what came back is kept


def test_without_the_package(plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    run = ("evaluate", str(tmp_path / "run"), "--plan", str(plan), "--dask", "tcp://127.0.0.1:1")
    assert "the package distributed is missing" in refusal(*run)


# The queue alone


class Fails:
    """A generator that answers `count` units and then never again."""

    def __init__(self, name: str, count: int) -> None:
        self.name, self.count, self.made, self.in_process = name, count, 0, False

    def source(self) -> dict[str, Any]:
        return {}

    def __call__(self, request: Any) -> list[Any]:
        if self.made == self.count:
            raise dispatch.Unanswered(f"{self.name} is gone.")
        self.made += 1
        return [request]


def queue(generators: list[Any], total: int) -> tuple[list[int], dispatch.DispatchResult]:
    kept: list[int] = []
    units = (Unit("none", k, 0, 1) for k in range(total))
    told = dispatch.dispatch(
        generators,
        units,
        lambda unit: unit.prompt,
        lambda unit, made: kept.append(made[0]),
        lambda *_: None,
        patience=2,
    )  # type: ignore[arg-type, return-value]
    return kept, told


def test_who_is_left_does_it_all() -> None:
    kept, _ = queue([Fails("a", 3), Fails("b", 0), Fails("c", 10**6)], 200)
    assert sorted(kept) == list(range(200))


def test_all_gone() -> None:
    with pytest.raises(dispatch.Unanswered, match="is gone"):
        queue([Fails("a", 3), Fails("b", 2)], 50)


def test_back_off() -> None:
    waits: list[float] = []
    said: list[str] = []

    def never() -> None:
        raise dispatch.Unanswered("nothing answers.")

    with pytest.raises(dispatch.Unanswered):
        dispatch.retrying(10, said.append, waits.append)(never)
    assert waits == [0.5, 1, 2, 4, 8, 16, 32, 60, 60]
    assert said[-1] == "nothing answers. Again in 60 s."
