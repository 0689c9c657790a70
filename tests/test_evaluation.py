"""The paper's evaluation: plans, prompts, runs that are killed and go on, what is measured and concluded."""

from __future__ import annotations

import csv
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image
from scipy import stats

from lib_memnoise.__main__ import main
from lib_memnoise.lab.evaluation import metrics, report, results, trajectories
from lib_memnoise.lab.evaluation import plan as plans
from lib_memnoise.lab.evaluation.claims import Claim, claims, overall
from lib_memnoise.lab.evaluation.plan import BadPlan, Curve, Plan, Unit, chunks, curve_of, make
from lib_memnoise.lab.evaluation.prompts import BadPrompts, Prompt, read
from lib_memnoise.lab.evaluation.results import Results, divergence
from lib_memnoise.lab.evaluation.run import Record, Run, packed, unpacked
from lib_memnoise.lab.stats import Estimate, estimate, interval, slopes
from tests.test_command_line import refusal

pytestmark = pytest.mark.usefixtures("threads")

ROOT = Path(__file__).parents[1]
SMALL: dict[str, Any] = {
    "prompts": "miniature", "first": 3, "images": 2, "batch": 2, "width": 128, "height": 128, "steps": 4,
    "metrics": ["similarity", "alignment", "diversity"],
    "curves": [
        {"name": "none", "settings": None, "figures": ["adjustment", "methods"]},
        {"name": "Static", "settings": {"method": "static"}, "sweep": {"tau": [900, 600]},
         "figures": ["adjustment", "methods"]},
        {"name": "Adjusted", "settings": {"method": "batch_wise"}, "figures": ["adjustment", "methods"]},
        {"name": "Traced", "settings": {"method": "batch_wise", "tau": 0, "trace": "on", "steps": 1, "rho": 50},
         "sweep": {"gamma": [0, 1]}, "figures": ["strengths"], "images": 1},
        {"name": "Still", "settings": {"method": "per_sample", "guidance": "tau", "tau": 0, "trace": "on",
                                       "max_steps": 1}, "figures": ["per_sample"], "images": 1},
        {"name": "Decay", "settings": {"method": "per_sample", "max_steps": 1}, "sweep": {"weight_decay": [0.01, 1]},
         "figures": ["weight_decay", "methods"]},
        {"name": "From", "settings": {"method": "static"}, "sweep": {"tau": [999, 600]}, "figures": ["windows"]},
    ],
}  # fmt: skip
PLAIN = {**SMALL, "first": 2, "metrics": ["similarity"], "curves": [
    {"name": "none", "settings": None},
    {"name": "Static", "settings": {"method": "static"}, "sweep": {"tau": [900, 600]}},
]}  # fmt: skip
"""With little to draw."""
TOTAL = 3 * (2 * 7 + 1 * 3)
"""Images of it: no mitigation, three τ (600 is in two curves), adjusted, two weight decays; three are traced."""


def write(folder: Path, document: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    return path


def evaluate(folder: Path, *argv: str) -> None:
    main(["evaluate", str(folder), "--threads", "1", *argv])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the small plan."""
    folder = tmp_path_factory.mktemp("finished")
    evaluate(folder / "run", "--plan", str(write(folder, SMALL)))
    return folder / "run"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the plain plan."""
    folder = tmp_path_factory.mktemp("plain")
    evaluate(folder / "run", "--plan", str(write(folder, PLAIN)))
    return folder / "run"


@pytest.fixture
def quick(plain: Path, tmp_path: Path) -> Path:
    shutil.copytree(plain, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def pictures(folder: Path) -> dict[str, tuple[int, int]]:
    """When and what the pictures of a run were written."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.stat().st_ino)
        for path in (folder / "images").rglob("*.png")
    }


# Plans


SD1_SWEEPS = {
    "No adjustment": ("tau", [780, 760, 740, 720]),
    "With adjustment": ("tau", [900, 880, 860, 840]),
    "Random tokens": ("tokens", [1, 2, 4, 6, 8]),
    "Prompt embedding": ("target", [level / 10**0.5 for level in (3, 4, 5, 6, 7)]),
    "Cross-attention scaling": ("bos_scale", [1.15, 1.2, 1.25, 1.3, 1.35]),
    "Opposite guidance": ("opposite", [1, 3, 5, 7, 9]),
    "Batch-wise": ("tau", [900]),
    "Per-sample": ("target", [0.7, 0.9, 1.1, 1.3, 1.5]),
    "Weight decay": ("weight_decay", [0.01, 0.05, 0.1, 0.2]),
    "γ̃": ("gamma", [0, 0.5, 1, 1.5]),
}
SD2_SWEEPS = {
    "Static τ": ("tau", [999.0, 978.6122, 958.2245, 937.8367, 917.4490]),
    "Random tokens": ("tokens", [1, 2, 4, 6, 8]),
    "Prompt embedding": ("target", [level / 10**0.5 for level in (50, 60, 70, 80, 90)]),
    "Cross-attention scaling": ("bos_scale", [1.15, 1.2, 1.25, 1.3, 1.35]),
    "Opposite guidance": ("opposite", [1, 3, 5, 7, 9]),
    "Batch-wise": ("tau", [917.4490]),
    "Per-sample": ("target", [5, 8, 10, 15, 20]),
}


@pytest.mark.parametrize(
    "name, prompts, sampler, size, sweeps",
    [("paper-sd1", 500, "DDIM", 512, SD1_SWEEPS), ("paper-sd2", 219, "Euler", 768, SD2_SWEEPS)],
)
def test_the_papers_sweeps(
    name: str, prompts: int, sampler: str, size: int, sweeps: dict[str, tuple[str, list[float]]]
) -> None:
    document, _ = plans.document(name)
    plan = make(document, prompts=[Prompt(f"caption {k}") for k in range(prompts)])
    curves = {curve.name: curve for curve in plan.curves}
    for curve, (setting, strengths) in sweeps.items():
        assert curves[curve].sweep == setting
        assert curves[curve].strengths == pytest.approx(strengths, rel=1e-4)
    assert (plan.sampler, plan.steps, plan.cfg, plan.width, plan.height) == (sampler, 50, 7, size, size)
    assert plan.images == 10 and plan.metrics == ["sscd", "clip", "lpips", "imagereward"]
    assert curves["No mitigation"].points == ("none",) and plan.points["none"].prompts == prompts
    if name == "paper-sd1":
        settings = plan.points[curves["γ̃"].points[1]].settings
        assert settings == {"method": "batch_wise", "rho": 50, "steps": 1, "tau": 0, "trace": "on", "gamma": 0.5}
        # "with adjustment" at 900 is batch-wise: one point, made once
        assert curves["Batch-wise"].points[0] == curves["With adjustment"].points[0]
        assert curves["Weight decay"].points[0] == curves["Per-sample"].points[1]


def test_every_preset_can_be_planned() -> None:
    for name in plans.presets():
        document, _ = plans.document(name)
        make(document, prompts=[Prompt("a fox")])
    assert {"miniature", "paper-sd1", "paper-sd2"} == set(plans.presets())


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"curves": []}, "the plan, curves: [] should be non-empty."),
        ({"steps": "many"}, "the plan, steps: 'many' is not of type 'integer'."),
        ({"width": 100}, "the plan, width: 100 is not a multiple of 8."),
        ({"pictures": 3}, "'pictures' was unexpected"),
        ({"metrics": ["fid"]}, "metrics: 'fid' is not known; known are sscd, clip"),
        ({"curves": [{"name": "a", "settings": {"method": "static", "gamma": 1}}]}, "curve 'a': gamma"),
        ({"curves": [{"name": "a", "settings": {"method": "static"}, "sweep": {"tau": [1, 2000]}}]},
         "curve 'a': tau = 2000 is not valid"),
        ({"curves": [{"name": "a", "settings": {"method": "statik"}}]}, "curve 'a': method = \"statik\" is not valid"),
        ({"curves": [{"name": "a", "sweep": {"tau": [1]}}]}, "without settings there is nothing to sweep"),
        ({"curves": [{"name": "a"}, {"name": "a"}]}, "there are two of the name 'a'"),
        ({"curves": [{"name": "a", "figures": ["table"]}]}, "curves[0].figures[0]: 'table' is not one of"),
    ],
)  # fmt: skip
def test_bad_plans(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(BadPlan) as error:
        make({**SMALL, **changed}, prompts=[Prompt("a fox")])
    assert said in str(error.value) and "\n" not in str(error.value)


def test_bad_plan_files(tmp_path: Path) -> None:
    def of(text: str | bytes) -> str:
        path = tmp_path / "plan.yaml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return refusal("evaluate", str(tmp_path / "run"), "--plan", str(path))

    assert "line 2, column 2: it is no YAML" in of("a: [1\nb: 2")
    assert "it must have prompts and curves" in of("- 1")
    assert "it must be UTF-8 text" in of(b"a: \xff")
    assert "'curves' is a required property" not in of("prompts: miniature")
    missing = refusal("evaluate", str(tmp_path / "run"), "--plan", "paper-sd3")
    assert "there is no plan 'paper-sd3'; it must be a file, or one of miniature, paper-sd1, paper-sd2." in missing
    assert "what to generate is not said" in refusal("evaluate", str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_the_same_caption_twice() -> None:
    with pytest.raises(BadPlan, match="'a fox' is there twice"):
        make(SMALL, prompts=[Prompt("a fox"), Prompt("a dog"), Prompt("a fox")])


def test_curves_of_flags() -> None:
    assert curve_of("none") == {"name": "none", "settings": None}
    found = curve_of("per_sample:lr=0.02:target=0.5,0.25")
    assert found["settings"] == {"method": "per_sample", "lr": 0.02} and found["sweep"] == {"target": [0.5, 0.25]}
    for text, said in (
        ("static:tau", "must be SETTING=VALUE"), ("static:tau=x", "tau"), ("static:nothing=1", "nothing"),
        ("batch_wise:tau=1,2:gamma=1,2", "tau and gamma have several values"),
    ):  # fmt: skip
        with pytest.raises(BadPlan, match=said):
            curve_of(text)


def test_flags_without_a_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ("--prompts", "miniature", "--method", "none", "--method", "static:tau=900,700", "--images", "3",
            "--width", "128", "--height", "128", "--metrics", "similarity")  # fmt: skip
    evaluate(tmp_path / "run", *argv, "--dry-run")
    assert "108 images: 12 prompts, 3 settings." in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    evaluate(tmp_path / "run", *argv, "--first", "1", "--steps", "2")
    with Run(tmp_path / "run") as run:
        assert run.plan.total == run.done == 9 and run.metrics.keys() == {"similarity", "similarity_own"}


def test_methods_are_compared_on_the_same_seeds() -> None:
    plan = make(SMALL, prompts=[Prompt("a"), Prompt("b"), Prompt("c")])
    seeds = Counter()
    for point, prompt, count in plan.wanted():
        seeds[point] += sum(plan.request(Unit(point, prompt, k, 1)).seed for k in range(count))
    assert len({seeds[key] for key, point in plan.points.items() if point.images == 2}) == 1
    every = {plan.seed_of(prompt, image) for prompt in range(500) for image in range(10)}
    assert len(every) == 5000


@pytest.mark.parametrize(
    "missing, most, expected",
    [([0, 1, 2, 3, 4], 2, [(0, 2), (2, 2), (4, 1)]), ([0, 2, 3, 7], 9, [(0, 1), (2, 2), (7, 1)]), ([], 3, [])],
)
def test_chunks(missing: list[int], most: int, expected: list[tuple[int, int]]) -> None:
    assert list(chunks(missing, most)) == expected


# Prompts


HEAD = ";Caption;URL;type;mean_sscd;max_sscd;Index\n"


def prompts_of(folder: Path, text: str | bytes, name: str = "prompts.csv", truth: Path | None = None) -> list[Prompt]:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read(str(path), truth)


def test_the_papers_csv(tmp_path: Path) -> None:
    text = "\ufeff" + HEAD + '0;"A ""quoted""; caption";http://a;VM;0.8;0.9;17\n\n1; plain ;http://b;TM;0.2;0.2;18\n'
    for name in ("17", "18"):
        (tmp_path / "truth" / name).mkdir(parents=True)
    for name in ("b.png", "a.JPG", "notes.txt"):
        (tmp_path / "truth" / "17" / name).touch()
    found = prompts_of(tmp_path, text, truth=tmp_path / "truth")
    assert [(prompt.caption, prompt.index, prompt.kind) for prompt in found] == [
        ('A "quoted"; caption', "17", "VM"), ("plain", "18", "TM"),
    ]  # fmt: skip
    assert [Path(name).name for name in found[0].references] == ["a.JPG", "b.png"] and not found[1].references


@pytest.mark.parametrize(
    "text, said",
    [
        ("a,b\n1,2\n", "line 1: there is no column Caption; it has a,b."),
        ("", "line 1: there is no column Caption; it has none."),
        (HEAD, "has no prompts."),
        (HEAD + "0;a;u;VM;0;0;1\n1;b;u;VM\n", "line 3: it has 4 columns instead of 7; the last is type."),
        (HEAD + "0;a;u;VM;0;0;1;more\n", "line 2: it has 8 columns instead of 7; the last is Index."),
        (HEAD + "0; ;u;VM;0;0;1\n", "line 2, column Caption: it is empty."),
        (HEAD + "0;a;u;VM;0;0;../1\n", "line 2, column Index: '../1' is not valid"),
        (HEAD + "0;a;u;VM;0;0;\n", "line 2, column Index: '' is not valid"),
        (b"Caption\n\xff\n", "must be UTF-8 text"),
    ],
)
def test_bad_csv(tmp_path: Path, text: str | bytes, said: str) -> None:
    with pytest.raises(BadPrompts) as error:
        prompts_of(tmp_path, text)
    assert said in str(error.value) and "prompts.csv" in str(error.value) and "\n" not in str(error.value)


def test_a_missing_csv(tmp_path: Path) -> None:
    said = refusal("evaluate", str(tmp_path / "run"), "--plan", "paper-sd1")
    assert "memorized_prompts.csv: No such file or directory" in said
    run = ("evaluate", str(tmp_path / "run"), "--plan", "paper-sd1", "--prompts")
    assert f"{tmp_path / 'x.csv'}: No such file" in refusal(*run, str(tmp_path / "x.csv"))
    (tmp_path / "y.csv").write_text(HEAD + "0;a;u;VM;0;0;1\n")
    said = refusal(*run, str(tmp_path / "y.csv"), "--ground-truth", str(tmp_path))
    assert "has no pictures for any prompt" in said


def test_json_lines(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    text = '{"caption": "a fox", "index": 3, "type": "VM", "references": ["a.png"]}\n\n{"caption": "b"}\n'
    found = prompts_of(tmp_path, text, "prompts.jsonl")
    assert found == [Prompt("a fox", "3", "VM", (str(tmp_path / "a.png"),)), Prompt("b")]
    for line, said in (
        ("{", "line 1: it is no JSON"), ("3", "line 1: it must be an object"), ('{"text": 1}', "'text' is not known"),
        ('{"caption": 3}', "caption: 3 is not valid"), ('{"caption": "a", "references": "x"}', "a list of files"),
        ('{"caption": "a", "references": ["x.png"]}', "is no file"), ('{"caption": "a", "index": ".."}', "index: '..'"),
    ):  # fmt: skip
        with pytest.raises(BadPrompts, match=said):
            prompts_of(tmp_path, line, "prompts.jsonl")


def test_a_caption_a_line(tmp_path: Path) -> None:
    assert prompts_of(tmp_path, " a fox \n\nb; c\n", "prompts.txt") == [Prompt("a fox"), Prompt("b; c")]


# What comes of a run


def test_a_run_has_everything(finished: Path) -> None:
    names = {path.name for path in (finished / "figures").iterdir()}
    for drawn in (
        "adjustment-similarity-alignment", "methods-similarity-alignment", "methods-similarity-diversity", "kinds",
        "magnitudes", "magnitudes-mean", "magnitudes-noises", "magnitudes-per-sample", "magnitudes-per-sample-mean",
    ):  # fmt: skip
        assert {f"{drawn}.{kind}" for kind in ("png", "svg", "csv", "parquet")} <= names
    for table in ("weight-decay", "cost", "images"):
        assert {f"{table}.csv", f"{table}.parquet"} <= names
    assert {"pictures-methods.png", "pictures-windows.png"} <= names
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 11 and "http" not in page.replace("http-equiv", "")
    assert "The paper's claims in this run" in page and "missing" not in page
    images = pd.read_parquet(finished / "figures" / "images.parquet")
    assert len(images) == TOTAL and images[["seed", "rows", "before", "seconds"]].notna().all().all()
    claims = json.loads((finished / "claims.json").read_text(encoding="utf-8"))
    assert {claim["number"] for claim in claims} == {1, 2, 3, 4}


def test_figures_come_from_the_records_alone(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name: path.read_bytes() for path in (copied / "figures").iterdir() if path.suffix == ".csv"}
    claims = (copied / "claims.json").read_bytes()
    shutil.rmtree(copied / "figures")
    (copied / "report.html").unlink()
    main(["figures", str(copied)])
    again = {path.name: path.read_bytes() for path in (copied / "figures").iterdir() if path.suffix == ".csv"}
    assert again == before and (copied / "claims.json").read_bytes() == claims
    assert f"{TOTAL} of {TOTAL} images" in capsys.readouterr().out
    # without pictures too, whose places then say so
    shutil.rmtree(copied / "images")
    main(["figures", str(copied)])
    assert (copied / "figures" / "cost.csv").read_bytes() == before["cost.csv"]


def test_records_for_machines(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(copied, "--json")
    found = json.loads(capsys.readouterr().out)
    assert {point["curve"] for point in found["points"]} == {"none", "Static", "Adjusted", "Decay"}
    assert all(-1 <= point["similarity_own"] <= point["similarity"] <= 1 for point in found["points"])
    assert all(claim["beside"] is not None for claim in found["claims"] if claim["number"] in (1, 4))
    assert {claim["holds"] for claim in found["claims"]} <= {True, False, None}


def test_kinds_are_apart(finished: Path) -> None:
    with Run(finished) as run:
        found = results.results(run)
        assert found.kinds == ["A", "B"]
        table = found.table("methods").set_index("point")
        for kind in found.kinds:
            own = found.images[(found.images["point"] == "none") & (found.images["kind"] == kind)]
            expected = own.groupby("prompt")["similarity"].mean().mean()
            assert table.loc["none", f"similarity {kind}"] == pytest.approx(expected)


# Going on


def test_nothing_is_made_twice(quick: Path) -> None:
    before = pictures(quick)
    evaluate(quick)
    assert pictures(quick) == before


def test_images_that_are_gone_or_damaged_are_made_again(quick: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = pictures(quick)
    gone, damaged, *_ = sorted(before)
    (quick / gone).unlink()
    evaluate(quick)
    assert "1 pictures of the run are gone; they are made again." in capsys.readouterr().err
    (quick / damaged).write_bytes((quick / damaged).read_bytes()[:300])
    evaluate(quick, "--metrics", "similarity")  # nothing is measured: it is not looked at
    with Run(quick, writing=True) as run:
        run._database.execute("delete from measures")
        run._database.commit()
    evaluate(quick)
    assert "cannot be read" in capsys.readouterr().err
    evaluate(quick)
    after = pictures(quick)
    assert {name for name in before if after[name] != before[name]} == {gone, damaged}
    with Run(quick) as run:
        assert results.results(run).images["similarity"].notna().sum() == len(before)


def test_a_picture_whose_record_was_not_written_is_taken_over(quick: Path) -> None:
    before = pictures(quick)
    with Run(quick, writing=True) as run:
        rows = {(point, prompt, image): text for point, prompt, image, _, text in run.rows()}
        run._database.execute("delete from images where prompt = 1")
        run._database.commit()
    partial = quick / "images" / "none" / ".000001-000.png.abc.partial"
    partial.touch()
    evaluate(quick)
    assert pictures(quick) == before and not partial.exists()
    with Run(quick) as run:
        assert {(point, prompt, image): text for point, prompt, image, _, text in run.rows()} == rows


def test_another_plan_is_refused(quick: Path, tmp_path: Path) -> None:
    def refused(**changed: Any) -> str:
        return refusal("evaluate", str(quick), "--threads", "1", "--plan", str(write(tmp_path, {**PLAIN, **changed})))

    before = pictures(quick)
    assert "holds another plan's images: steps is 4 there and 5 here" in refused(steps=5)
    assert "seed is 1 there and 2 here" in refused(seed=2)
    assert "prompts is 2" in refused(first=1)
    assert "methods is static-" in refused(curves=PLAIN["curves"][:1])
    assert "images is 2 there and 3 here" in refusal("evaluate", str(quick), "--images", "3")
    assert "another origin than the miniature's" in refusal_after_loss(quick, "--variant", "v")
    for folder, said in ((tmp_path, "has other files in it"), (quick / "images", "has other files in it")):
        run = ("evaluate", str(folder), "--plan", str(tmp_path / "plan.yaml"))
        assert said in refusal(*run)
    now = pictures(quick)
    assert len(now) == len(before) - 1 and all(before[name] == now[name] for name in now)


def refusal_after_loss(folder: Path, *argv: str) -> str:
    next((folder / "images").rglob("*.png")).unlink()
    return refusal("evaluate", str(folder), "--threads", "1", *argv)


def test_what_does_not_change_images_may_change(quick: Path, tmp_path: Path) -> None:
    before = pictures(quick)
    changed = {**PLAIN, "batch": 1, "metrics": ["diversity"], "about": "again"}
    evaluate(quick, "--plan", str(write(tmp_path, changed)))
    assert pictures(quick) == before and "<p>again</p>" in (quick / "report.html").read_text(encoding="utf-8")


def test_two_at_once(quick: Path) -> None:
    with Run(quick, writing=True):
        assert "another process is at work" in refusal("evaluate", str(quick))
        main(["figures", str(quick)])  # reading is free


def test_no_run(tmp_path: Path, quick: Path) -> None:
    assert "is no run" in refusal("figures", str(tmp_path / "nothing"))
    assert "is no run" in refusal("compare", str(quick), str(tmp_path))
    (quick / "plan.json").write_text("{")
    assert "is damaged: plan.json or prompts.jsonl cannot be read" in refusal("figures", str(quick))
    (quick / "plan.json").write_text('{"format": 99, "version": "7", "plan": {}}')
    assert "was written by another memnoise (7)" in refusal("figures", str(quick))


def test_a_damaged_database(quick: Path) -> None:
    (quick / "records.sqlite").write_bytes(b"no database" * 1000)
    for name in ("-wal", "-shm"):
        (quick / f"records.sqlite{name}").unlink(missing_ok=True)
    assert "records.sqlite cannot be" in refusal("figures", str(quick))


def killed(folder: Path, plan: Path, after: float) -> subprocess.CompletedProcess[bytes]:
    """The command, killed so many seconds after its first own picture."""
    before = len(list(folder.rglob("*.png")))
    command = [sys.executable, "-m", "lib_memnoise", "evaluate", str(folder), "--plan", str(plan), "--threads", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while process.poll() is None and len(list(folder.rglob("*.png"))) == before:
        time.sleep(0.01)
    with_time = time.monotonic() + after
    while process.poll() is None and time.monotonic() < with_time:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    _, said = process.communicate()
    return subprocess.CompletedProcess(command, process.returncode, b"", said)


def test_killed_at_any_moment(tmp_path: Path) -> None:
    plan, folder = write(tmp_path, {**PLAIN, "first": 8, "images": 6}), tmp_path / "run"
    moments = random.Random(5)
    for _ in range(4):
        before = pictures(folder)
        killed(folder, plan, moments.uniform(0, 0.7))
        after = pictures(folder)
        assert all(after[name] == before[name] for name in before), "a picture was made again, or lost"
        assert len(after) > len(before) or len(after) == 8 * 6 * 3
        for name in after:
            Image.open(folder / name).load()  # whole
    before = pictures(folder)
    evaluate(folder)
    after = pictures(folder)
    assert all(after[name] == before[name] for name in before) and len(after) == 8 * 6 * 3
    with Run(folder) as run:
        found = [(point, prompt, image) for point, prompt, image, *_ in run.rows()]
        assert len(set(found)) == len(found) == run.plan.total == 8 * 6 * 3
        assert all(
            unpacked(run.picture(*row[:3])) == Record(**json.loads(row[4])) and row[3] == run.plan.seed_of(*row[1:3])
            for row in run.rows()
        )


def test_killed_at_its_very_beginning(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("lock", "prompts.jsonl", ".plan.json.abc.partial"):
        (folder / name).touch()
    with Run.begin(folder, make(SMALL, prompts=[Prompt("a fox")])) as run:
        assert run.done == 0 and [prompt.caption for prompt in run.plan.prompts] == ["a fox"]


def test_a_full_disk(tmp_path: Path) -> None:
    """On a file system of its own that is too small, in a mount namespace of its own."""
    plan, disk, out = write(tmp_path, {**PLAIN, "images": 8}), tmp_path / "disk", tmp_path / "out"
    disk.mkdir()
    script = (
        f"mount -t tmpfs -o size=300k none {disk} && "
        f"{{ {sys.executable} -m lib_memnoise evaluate {disk}/run --plan {plan} --threads 1; code=$?; "
        f"cp -r {disk}/run {out}; exit $code; }}"
    )
    probe = subprocess.run(["unshare", "-Urm", "true"], capture_output=True) if shutil.which("unshare") else None
    if probe is None or probe.returncode:
        pytest.skip("no mount namespaces here")
    done = subprocess.run(
        ["unshare", "-Urm", "sh", "-c", script], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and last.startswith("memnoise: ") and last.endswith("."), done.stderr
    assert "No space left on device" in last or "disk is full" in last
    assert str(disk) in last and "Traceback" not in done.stderr
    # With space again it goes on.
    before = pictures(out)
    assert 0 < len(before) < 48
    evaluate(out)
    after = pictures(out)
    assert len(after) == 48 and all(after[name] == before[name] for name in before)


def test_a_limit_on_files(tmp_path: Path) -> None:
    """What no file may be larger than is refused as a full disk is."""
    plan = write(tmp_path, {**PLAIN, "images": 8})

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    command = [sys.executable, "-m", "lib_memnoise", "evaluate", str(tmp_path / "run"), "--plan", str(plan)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, preexec_fn=limit)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and last.startswith("memnoise: ") and "Traceback" not in done.stderr, done.stderr


def test_two_hundred_thousand_images(tmp_path: Path) -> None:
    """The paper's whole sweep: planned, counted, gone on with, in little memory and time."""
    document, _ = plans.document("paper-sd1")
    plan = make(document, prompts=[Prompt(f"caption {k}", str(k), "VM" if k % 4 else "TM") for k in range(540)])
    assert plan.total > 199_000
    picture = packed(Image.new("RGB", (8, 8)), Record(seed=0))
    begin = time.monotonic()
    with Run.begin(tmp_path / "run", plan) as run:
        rows = ((point, prompt, image, Record(seed=plan.seed_of(prompt, image)))
                for point, prompt, count in plan.wanted() for image in range(count))  # fmt: skip
        run._insert(rows)
        for key in plan.points:
            (run.folder / "images" / key).mkdir(parents=True)
        # Links of a picture: as many files, at no cost of space.
        (tmp_path / "picture.png").write_bytes(picture)
        for key, prompt, count in plan.wanted():
            if prompt % 20 == 0:  # a file may have 65,000 links
                shutil.copyfile(tmp_path / "picture.png", tmp_path / key)
            for image in range(count):
                os.link(tmp_path / key, run.picture(key, prompt, image))
        lost = [run.picture("none", 7, 3), run.picture("none", 539, 9)]
        for path in lost:
            path.unlink()
    made = time.monotonic()
    code = (
        "import resource, sys; from pathlib import Path; from lib_memnoise.lab.evaluation.run import Run\n"
        "def memory(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024\n"
        "before = memory()\n"
        "with Run(Path(sys.argv[1]), writing=True) as run:\n"
        "    print(run.settle(), run.done, [u for u in run.missing(10)], memory() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], cwd=ROOT, capture_output=True, text=True)
    gone = time.monotonic() - made
    assert done.returncode == 0, done.stderr
    *said, growth = done.stdout.rsplit(" ", 1)
    units = [Unit("none", 7, 3, 1), Unit("none", 539, 9, 1)]
    assert said == [f"(0, 2) {plan.total - 2} {units}"]
    assert int(growth) < 150, f"{growth} MiB more"
    assert gone < 60, f"{gone:.0f} s, after {made - begin:.0f} s to make it"


# Metrics


def test_a_run_goes_on_without_a_metric(quick: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = "similarity,sscd,clip,lpips,imagereward"
    evaluate(quick, "--metrics", names, "--clip-weights", str(quick / "plan.json"), "--lpips-weights", "nothing",
             "--imagereward-weights", str(quick / "plan.json"))  # fmt: skip
    captured = capsys.readouterr()
    assert "sscd is not measured: no file was named with --sscd." in captured.out
    page = (quick / "report.html").read_text(encoding="utf-8")
    for name in ("sscd", "clip", "lpips", "imagereward"):
        assert f"{name} is not measured: " in captured.err and f"{name} is not measured: " in captured.out
        assert f"{metrics.METRICS[name].label} is not measured: " in page
    with Run(quick) as run:
        assert "similarity" in run.metrics


def test_sscd_files_that_are_none(quick: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    (quick / "x.pt").write_bytes(b"nothing")
    for name, said in (("y.pt", "is no file"), ("x.pt", "is no TorchScript file")):
        evaluate(quick, "--metrics", "sscd", "--sscd", str(quick / name))
        assert said in capsys.readouterr().out


def test_other_weights_measure_anew(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    def measured(source: str, value: float, options: metrics.Options) -> int:
        count = 0

        class Constant:
            def __init__(self, _: metrics.Options) -> None:
                self.source = source

            def __call__(self, pictures: Sequence[Image.Image], prompt: Prompt) -> list[float]:
                nonlocal count
                count += len(pictures)
                return [value] * len(pictures)

        sscd = metrics.METRICS["sscd"]
        monkeypatch.setitem(metrics.METRICS, "sscd", metrics.Metric(sscd.label, sscd.role, True, Constant))
        with Run(quick, writing=True) as run:
            run.plan.document["metrics"] = ["sscd"]  # type: ignore[index]
            assert metrics.measure(run, options, say=said.append) == {}
            assert {row[4] for row in run.measures() if row[3] == "sscd"} == {value}
        return count

    named = metrics.Options(sscd=Path("weights"))
    assert measured("first", 0.25, named) == 12 and measured("first", 0.25, named) == 0
    assert measured("second", 0.25, metrics.Options()) == 0  # none is named: what is there stays
    assert measured("second", 0.5, named) == 12
    assert said == ["sscd is measured anew, with second."]


def test_training_pictures_may_come_later(tmp_path: Path) -> None:
    (tmp_path / "prompts.csv").write_text("Caption;Index\na fox;1\na cat;2\n")
    (tmp_path / "truth" / "1").mkdir(parents=True)
    run = (tmp_path / "run", "--prompts", str(tmp_path / "prompts.csv"), "--method", "none", "--images", "1",
           "--steps", "2", "--width", "128", "--height", "128", "--metrics", "similarity")  # fmt: skip
    evaluate(*map(str, run))  # type: ignore[arg-type]
    before = pictures(tmp_path / "run")
    with Run(tmp_path / "run") as opened:
        assert [row[4] for row in opened.measures()] == [None] * 4
        shutil.copyfile(opened.picture("none", 0, 0), tmp_path / "truth" / "1" / "same.png")
    evaluate(*map(str, run), "--ground-truth", str(tmp_path / "truth"))  # type: ignore[arg-type]
    with Run(tmp_path / "run") as opened:
        found = {row[1:4]: row[4] for row in opened.measures()}
        # the other prompt has no picture of its own, and is compared with this one all the same
        assert found[0, 0, "similarity"] == found[0, 0, "similarity_own"] == pytest.approx(1)
        assert found[1, 0, "similarity"] < 1 and found[1, 0, "similarity_own"] is None
    assert pictures(tmp_path / "run") == before


def test_a_training_picture_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.png").write_bytes(b"none")
    (tmp_path / "prompts.jsonl").write_text('{"caption": "a fox", "references": ["a.png"]}\n')
    argv = ("--prompts", str(tmp_path / "prompts.jsonl"), "--method", "none", "--images", "1", "--steps", "2",
            "--width", "128", "--height", "128", "--metrics", "similarity")  # fmt: skip
    evaluate(tmp_path / "run", *argv)
    assert "similarity of prompt 0 is not measured: a training picture cannot be read" in capsys.readouterr().err


def two_prompts(folder: Path) -> tuple[str, ...]:
    """Of a run with a picture of each of two prompts, once both of their training pictures are there."""
    lines = [json.dumps({"caption": text, "references": [f"{text}.png"]}) for text in ("a fox", "a cat")]
    for seed, text in enumerate(("a fox", "a cat")):
        values = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(values).resize((128, 128)).save(folder / f"{text}.png")
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    return ("--prompts", str(folder / "prompts.jsonl"), "--method", "none", "--images", "1", "--steps", "2",
            "--width", "128", "--height", "128", "--metrics", "similarity")  # fmt: skip


def test_a_copy_of_another_prompts_picture_is_a_copy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = two_prompts(tmp_path)
    evaluate(tmp_path / "run", *argv)
    with Run(tmp_path / "run", writing=True) as run:
        made = {prompt: run.picture("none", prompt, 0) for prompt in (0, 1)}
        for prompt, path in made.items():  # each the other's
            shutil.copyfile(tmp_path / ("a cat.png" if prompt == 0 else "a fox.png"), path)
        run._database.execute("delete from measures")
        run._database.commit()
    evaluate(tmp_path / "run")
    with Run(tmp_path / "run") as run:
        found = results.results(run)
    assert found.images["similarity"].to_list() == [pytest.approx(1)] * 2
    assert (found.images["similarity_own"] < 0.5).all()
    assert found.copying == ("similarity", "similarity_own")
    table = pd.read_csv(tmp_path / "run" / "figures" / "images.csv")
    assert {"similarity", "similarity_own"} <= set(table.columns)


def test_pictures_of_prompts_that_are_left_out_count(tmp_path: Path) -> None:
    argv = two_prompts(tmp_path)
    evaluate(tmp_path / "run", *argv, "--first", "1")
    with Run(tmp_path / "run", writing=True) as run:
        assert [Path(name).name for name in run.plan.references] == ["a fox.png", "a cat.png"]
        shutil.copyfile(tmp_path / "a cat.png", run.picture("none", 0, 0))
        run._database.execute("delete from measures")
        run._database.commit()
    evaluate(tmp_path / "run")  # without saying again where they are
    with Run(tmp_path / "run") as run:
        assert results.results(run).images["similarity"].to_list() == [pytest.approx(1)]
    assert len(make(SMALL).references) == 18  # of the miniature all that it memorised


def test_a_picture_of_another_prompt_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = two_prompts(tmp_path)
    (tmp_path / "a cat.png").write_bytes(b"none")
    evaluate(tmp_path / "run", *argv)
    captured = capsys.readouterr()
    assert "similarity to the nearest of all is not measured: a training picture cannot be read" in captured.err
    assert "copies of others are not counted" in captured.out
    with Run(tmp_path / "run") as run:
        assert [row[1:4] for row in run.measures()] == [(0, 0, "similarity_own")]
    Image.new("RGB", (8, 8)).save(tmp_path / "a cat.png")
    evaluate(tmp_path / "run")
    with Run(tmp_path / "run") as run:
        assert results.results(run).copying == ("similarity", "similarity_own") and len(list(run.measures())) == 4


def test_a_run_of_the_old_format(quick: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Version 0.1.0 measured the prompts' own pictures under the metric's name, and kept no list of all."""
    with Run(quick) as run:
        before = {row[:4]: row[4] for row in run.measures()}
        run._database.execute("delete from measures where metric = 'similarity'")
        run._database.execute("delete from metrics where metric = 'similarity'")
        run._database.execute("update measures set metric = 'similarity'")
        run._database.execute("update metrics set metric = 'similarity'")
        run._database.commit()
    stored = json.loads((quick / "plan.json").read_text())
    (quick / "plan.json").write_text(json.dumps({**stored, "format": 1}))
    (quick / "references.json").unlink()
    own = {key: value for key, value in before.items() if key[3] == "similarity_own"}
    main(["figures", str(quick)])
    assert "copies of others are not counted until evaluate measures them" in capsys.readouterr().out
    with Run(quick) as run:
        assert {row[:4]: row[4] for row in run.measures()} == own
        assert results.results(run).copying == ("similarity_own",)
    evaluate(quick)
    with Run(quick) as run:
        assert {row[:4]: row[4] for row in run.measures()} == before
        assert run.metrics.keys() == {"similarity", "similarity_own"}
    assert "copies of others" not in capsys.readouterr().out


# What is concluded


def test_intervals_are_bootstrap_intervals() -> None:
    values = np.random.default_rng(3).normal(2, 1, 40)
    found = estimate(np.append(values, np.nan))
    reference = stats.bootstrap((values,), np.mean, n_resamples=20000, method="percentile", rng=1).confidence_interval
    assert found.value == pytest.approx(values.mean()) and found.prompts == 40
    assert (found.low, found.high) == pytest.approx((reference.low, reference.high), abs=0.03)
    low, high = interval(40, statistic=lambda drawn: float(values[drawn].mean()))
    assert (low, high) == pytest.approx((reference.low, reference.high), abs=0.03)
    assert math.isnan(estimate(np.array([np.nan])).value) and math.isnan(estimate(np.array([1.0])).low)


def test_a_prompt_counts_once_however_many_images_it_has() -> None:
    found = made({"none": [[(0.0, 1.0)] * 9, [(1.0, 1.0)]]})
    assert found.estimate("none", "sscd").value == 0.5


def made(points: dict[str, list[list[tuple[float, float]]]], figures: tuple[str, ...] = ("methods",)) -> Results:
    """Results of (SSCD, CLIP score) of every image of every prompt of every point, a curve each by its method."""
    rows = [
        {"point": point, "prompt": prompt, "image": image, "seed": 0, "kind": "", "failed": None, "sscd": c, "clip": a}
        for point, prompts in points.items()
        for prompt, images in enumerate(prompts)
        for image, (c, a) in enumerate(images)
    ]
    count = max(map(len, points.values()))
    methods: dict[str, list[str]] = {}
    for point in points:
        methods.setdefault(point.partition("-")[0], []).append(point)
    curves = tuple(
        Curve(name, figures, None if name == "none" else "tau", tuple(range(len(keys))), tuple(keys), name)
        for name, keys in methods.items()
    )
    plan = Plan(
        {"metrics": ["sscd", "clip"]}, tuple(Prompt(str(k)) for k in range(count)),
        {point: plans.Point(None, count, 1) for point in points}, curves,
    )  # fmt: skip
    return Results(plan, pd.DataFrame(rows), {}, {}, {"sscd": "", "clip": ""})


def spread(copying: float, alignment: float, prompts: int = 20) -> list[list[tuple[float, float]]]:
    random = np.random.default_rng(0)
    return [[(copying + noise, alignment)] for noise in random.normal(0, 0.01, prompts)]


CURVE = {"none": spread(0.9, 0.4), "static-1": spread(0.5, 0.3), "static-2": spread(0.1, 0.2)}


@pytest.mark.parametrize(
    "copying, alignment, expected, holds",
    [(0.4, 0.35, 0.3, True), (0.7, 0.35, 0.0, None), (0.9, 0.35, -0.2, False), (0.05, 0.1, math.nan, None)],
)
def test_at_equal_alignment(copying: float, alignment: float, expected: float, holds: bool | None) -> None:
    """0.35 is half way from 0.4 to 0.3, where the static curve is at (0.9 + 0.5) / 2; 0.1 is beyond its end."""
    found = made({**CURVE, "batch_wise-1": spread(copying, alignment)}, ("adjustment",))
    (claim,) = (claim for claim in claims(found) if claim.number == 1)
    assert claim.estimate.value == pytest.approx(expected, abs=1e-6, nan_ok=True)
    # Equal noise in both: the interval of no difference is a point, on neither side.
    assert claim.holds is holds if expected else claim.holds is not True


def test_the_papers_metric_decides_by_the_prompts_own_pictures() -> None:
    """Of its SSCD the paper's way decides, and the other is beside it; of similarity the nearest of all does."""
    found = made({**CURVE, "batch_wise-1": spread(0.4, 0.35)}, ("adjustment",))
    found.images["sscd_own"] = found.images["sscd"] - 0.1 * (found.images["point"] == "batch_wise-1")
    assert found.copying == ("sscd_own", "sscd")
    (claim,) = claims(found)
    assert claim.estimate.value == pytest.approx(0.4) and "the paper" in claim.measured
    assert claim.beside is not None and claim.beside.value == pytest.approx(0.3) and "nearest" in claim.beside_of
    found.plan.document["metrics"] = ["similarity", "clip"]  # type: ignore[index]
    found.images.rename(columns={"sscd": "similarity", "sscd_own": "similarity_own"}, inplace=True)
    (claim,) = claims(found)
    assert found.copying == ("similarity", "similarity_own") and claim.estimate.value == pytest.approx(0.3)


def test_points_out_of_reach_do_not_count() -> None:
    found = made(
        {**CURVE, "batch_wise-1": spread(0.4, 0.35), "batch_wise-2": spread(0.0, 0.1)}, ("adjustment",)
    )  # fmt: skip
    (claim,) = claims(found)
    assert claim.estimate.value == pytest.approx(0.3) and "the 1 of its 2 strengths within reach" in claim.measured


def test_failed_images_do_not_count() -> None:
    found = made({"none": [[(0.0, 1.0), (1.0, 1.0)]]})
    found.images.loc[1, "failed"] = "out of memory"
    assert found.estimate("none", "sscd").value == 0 and found.failed == 1
    assert "1 images could not be mitigated, and are left out." in report.notes(found)


def test_verdicts() -> None:
    def claim(low: float, high: float, needed: float = 0, below: bool = False) -> bool | None:
        return Claim(1, "", "", Estimate(0, low, high, 9), needed, below).holds

    assert [claim(0.1, 1), claim(-1, 1), claim(-1, -0.1), claim(math.nan, math.nan)] == [True, None, False, None]
    assert [claim(0.1, 0.4, 0.5, True), claim(0.4, 0.6, 0.5, True), claim(0.6, 0.9, 0.5, True)] == [True, None, False]
    parts = [Claim(1, "", "", Estimate(0, low, 2, 9), 0) for low in (1, -1)]
    against = Claim(1, "", "", Estimate(0, -2, -1, 9), 0)
    assert [overall(parts[:1]), overall(parts), overall([*parts, against]), overall([])] == [True, None, False, None]


def trace(*magnitudes: float) -> Any:
    return np.array([(981 - 20 * k, size) for k, size in enumerate(magnitudes)], dtype=float)


def test_along_the_trajectory() -> None:
    falling = trace(8, 8, 8, 8, 4, 2, 2, 2, 2, 2)
    assert trajectories.crossing(falling, 4) == 981 - 20 * 5 and trajectories.crossing(falling, 1) == 0
    assert trajectories.largest_fall(falling) == 6 and math.isnan(trajectories.largest_fall(trace(1, 2)))
    strengths = np.array([0.0, 0.5, 1.0, 1.5])
    assert slopes(strengths, np.array([[10.0, 20, 30, 40], [1, 1, 1, 1]])) == pytest.approx([20, 0])


def test_divergence_of_lengths() -> None:
    """Table 1: next to nothing for noise as drawn, ln 2 where no length is in common, more the longer the noise."""
    size = 4 * 64 * 64
    drawn = stats.chi.rvs(size, size=5000, random_state=1) / math.sqrt(size)
    found = [divergence(drawn * factor, size) for factor in (1, 1.002, 1.005, 1.1)]
    assert found == sorted(found) and found[0] < 0.005 and found[-1] == pytest.approx(math.log(2))
    few = [divergence(drawn[:24] * factor, size) for factor in (1, 1.1)]
    assert found[0] < few[0] < few[1]


# Two runs


def test_compare(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed = {**SMALL, "steps": 6, "curves": SMALL["curves"][:3]}
    evaluate(tmp_path / "run", "--plan", str(write(tmp_path, changed)))
    capsys.readouterr()
    main(["compare", str(finished), str(tmp_path / "run"), "--csv", str(tmp_path / "changes.csv"), "--json"])
    found = pd.DataFrame(json.loads(capsys.readouterr().out))
    assert {"none", "Static, τ = 900", "Adjusted"} <= set(found["method"]) and "Decay" not in set(found["method"])
    own = found[(found["point"] == "none") & (found["metric"] == "similarity")].iloc[0]
    with Run(finished) as a, Run(tmp_path / "run") as b:
        values = [results.results(run).prompt_means("none", "similarity") for run in (a, b)]
    assert own["difference"] == pytest.approx(float((values[1] - values[0]).mean()))
    paired = estimate(values[1] - values[0])
    assert (own["low"], own["high"]) == pytest.approx((paired.low, paired.high)) and own["images"] == 6
    assert len(list(csv.reader((tmp_path / "changes.csv").open()))) == 1 + len(found)
    main(["compare", str(finished), str(finished)])
    out = capsys.readouterr().out
    assert "+0.0000 [0, 0]" in out and "] *" not in out  # nothing differs from itself


def test_nothing_to_compare(finished: Path, tmp_path: Path) -> None:
    changed = {**SMALL, "seed": 77, "first": 1, "curves": SMALL["curves"][:1]}
    evaluate(tmp_path / "run", "--plan", str(write(tmp_path, changed)))
    assert "no measured images of the same settings, prompts and seeds" in refusal(
        "compare", str(finished), str(tmp_path / "run")
    )


# Packages


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in sys.modules if name.startswith("lib_memnoise.lab.evaluation")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(SystemExit, match=r"the package yaml is missing; .*\[evaluate,demo\]"):
        main(["evaluate", str(tmp_path / "run"), "--plan", "miniature"])


def test_help_needs_none_of_them() -> None:
    code = (
        "import contextlib, sys; from lib_memnoise.__main__ import main\n"
        "with contextlib.suppress(SystemExit): main(['evaluate', '--help'])\n"
        "sys.exit(any(name in sys.modules for name in ('yaml', 'pandas', 'torch', 'matplotlib')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
