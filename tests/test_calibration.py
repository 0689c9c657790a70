from __future__ import annotations

import json
import math
import multiprocessing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lib_memnoise.core.calibration import (
    LOWEST,
    TOLERANCE,
    BadCalibration,
    Key,
    beta_quantile,
    distinct,
    from_document,
    make_calibration,
    ordinary_prompts,
)
from lib_memnoise.core.calibration_store import CalibrationStore

KEY = Key("abc123", 512, 512, "eps", 981)
positive = st.floats(0.01, 100)


@given(st.lists(positive, min_size=20, max_size=60), st.floats(0.001, 0.5))
def test_a_threshold_keeps_its_rate(scores: list[float], rate: float) -> None:
    """Of n + 1 exchangeable scores, the last is above the others' threshold in at most this share of orders."""
    calibration = make_calibration(KEY, scores)
    above = sum(score > calibration.threshold(rate) for score in scores)
    assert above <= rate * (len(scores) + 1)
    assert calibration.threshold(rate) in calibration.scores
    assert calibration.median == pytest.approx(np.median(scores))


@given(st.integers(1, 300), st.integers(0, 299), st.sampled_from([0.001, 0.025, 0.5, 0.975]))
def test_a_quantile_is_scipys(n: int, k: int, probability: float) -> None:
    k = 1 + k % n
    assert beta_quantile(k, n, probability) == pytest.approx(stats.beta.ppf(probability, k, n + 1 - k), rel=1e-8)


def test_what_a_threshold_promises() -> None:
    promise = make_calibration(KEY, range(1, 121)).promise(0.01)
    assert (promise.expected, promise.is_kept) == (1 / 121, True)
    assert str(promise) == "1 % false positives asked; with 120 prompts 95 %: 0.021 % to 3.0 %"
    few = make_calibration(KEY, range(1, 21)).promise(0.01)
    assert not few.is_kept
    assert str(few).endswith("0.13 % to 17 %; so few prompts cannot promise less than 4.8 %, it takes 99")
    assert make_calibration(KEY, range(1, 100)).promise(0.01).is_kept


@given(st.integers(20, 250), st.sampled_from([0.001, 0.01, 0.05, 0.1, 0.5]))
def test_a_promise_is_about_the_threshold(n: int, rate: float) -> None:
    calibration = make_calibration(KEY, range(1, n + 1))
    promise = calibration.promise(rate)
    assert calibration.threshold(rate) == n + 1 - calibration.rank(rate)
    assert promise.expected == pytest.approx(calibration.rank(rate) / (n + 1))
    assert promise.low < promise.expected < promise.high
    assert promise.is_kept == (n >= 1 / rate - 1 - 1e-6)


def test_the_promise_is_kept() -> None:
    """Of many calibrations with scores of one distribution, the interval has the true rate in 95 %."""
    random = np.random.default_rng(1)
    inside = 0
    for _ in range(1000):
        calibration = make_calibration(KEY, random.uniform(0.1, 1.1, 60))
        promise = calibration.promise(0.05)
        inside += promise.low <= 1.1 - calibration.threshold(0.05) <= promise.high
    assert 930 <= inside <= 970


def test_percentiles() -> None:
    calibration = make_calibration(KEY, range(1, 101))
    assert [calibration.percentile(score) for score in (0.5, 1, 50.5, 100, 200)] == [0, 1, 50, 100, 100]
    assert calibration.threshold(0.01) == 100 and calibration.threshold(0.1) == 91


def test_derived_settings() -> None:
    numbers = make_calibration(KEY, [0.9] * 100).settings(1.0, 0.01)
    assert numbers == {"gamma": 0.7, "target": 0.9, "target_kind": "absolute", "threshold": 0.9}  # SD 1.4's
    # At half the side, ‖Δ‖ of the same quality is half as large, and the settings are at the reference size.
    assert make_calibration(KEY, [0.45] * 100).settings(0.5, 0.01) == numbers
    assert make_calibration(KEY, [1e-4] * 100).settings(1.0, 0.01)["gamma"] == 10


@given(st.lists(positive, min_size=20, max_size=30))
def test_documents_come_back(scores: list[float]) -> None:
    for source in ("built-in", "own", "recent", None):
        calibration = make_calibration(KEY, scores, source)
        assert from_document(json.loads(json.dumps(calibration.document()))) == calibration


def test_older_documents_are_read() -> None:
    older = {name: value for name, value in GOOD.items() if name != "source"}
    calibration = from_document(older)
    assert calibration.source is None and str(calibration) == "30 prompts at timestep 981"
    assert str(make_calibration(KEY, range(1, 31), "recent")) == "30 prompts of recent pictures at timestep 981"


GOOD = make_calibration(KEY, range(1, 31)).document()


@pytest.mark.parametrize(
    "bad",
    [
        None, [], {}, "x", {**GOOD, "format": 2}, {**GOOD, "width": "512"}, {**GOOD, "checkpoint": 3},
        {**GOOD, "scores": None}, {**GOOD, "scores": [1.0] * 19}, {**GOOD, "scores": [1.0] * 29 + [math.nan]},
        {**GOOD, "scores": [1.0] * 29 + [0.0]}, {**GOOD, "scores": ["1"] * 30},
        {**GOOD, "source": "elsewhere"}, {**GOOD, "source": ["own"]},
    ],
)  # fmt: skip
def test_what_is_no_calibration(bad: Any) -> None:
    with pytest.raises(BadCalibration):
        from_document(bad)


@given(st.text(), st.integers(64, 2048))
def test_names_are_for_files(checkpoint: str, side: int) -> None:
    name = Key(checkpoint, side, side, "v", 999).name
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.-") and len(name) < 120
    assert not name.startswith(".") and name.endswith(f"-{side}x{side}-v-999")


def test_a_store(tmp_path: Path) -> None:
    store = CalibrationStore(tmp_path / "new" / "folder")
    assert store.load(KEY) == (None, None) and store.all() == []
    calibration = make_calibration(KEY, range(1, 31))
    path = store.save(calibration)
    assert store.load(KEY) == (calibration, None) and store.all() == [calibration]
    assert [file.name for file in store.folder.iterdir()] == [path.name]
    assert store.load(Key("abc123", 512, 512, "eps", 999)) == (None, None)


def test_the_nearest_serves(tmp_path: Path) -> None:
    def at(timestep: int, **other: Any) -> Key:
        return replace(KEY, timestep=timestep, **other)

    store = CalibrationStore(tmp_path)
    assert store.nearest(KEY) == (None, [])
    others = at(951, width=576), at(951, checkpoint="abc124"), at(951, parameterization="v"), at(930, width=640)
    for key in (at(801), at(901), at(951), *others):
        store.save(make_calibration(key, range(1, 31)))

    def nearest(timestep: int, **other: Any) -> Key | None:
        found, problems = store.nearest(at(timestep, **other))
        assert problems == []
        return None if found is None else found.key

    assert [nearest(t) for t in (951, 981, 930, 920, 901)] == [at(951), at(951), at(951), at(901), at(901)]
    far, farther = (nearest(930 + TOLERANCE + more, width=640) for more in (0, 1))
    assert far == at(930, width=640) and farther is None
    assert nearest(LOWEST) == at(901) and nearest(LOWEST - 1) is None and nearest(801) == at(801)
    assert nearest(981, height=768) is None and nearest(981, width=576) == at(951, width=576)
    # One with the user's own prompts is better than a nearer one without.
    store.save(make_calibration(at(901), range(1, 31), "own"))
    assert nearest(951) == at(901)


def test_a_damaged_neighbour_is_said(tmp_path: Path) -> None:
    store = CalibrationStore(tmp_path)
    store.save(make_calibration(KEY, range(1, 31)))
    damaged = store.path(replace(KEY, timestep=951))
    damaged.write_text("{")
    (tmp_path / "abc123-512x512-eps-x.json").write_text("{")
    found, problems = store.nearest(KEY)
    assert found is not None and len(problems) == 1 and damaged.name in problems[0] and not damaged.exists()


def test_distinct_prompts() -> None:
    assert distinct(["a fox", " a fox ", "", "  ", "a cat"], 9) == ["a fox", "a cat"]
    every = [f"{k}" for k in range(1000)]
    assert distinct(every, 1000) == every
    assert distinct(every, 4) == ["0", "250", "500", "750"]


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff\xfe", b"[]", b"[" * 100_000, json.dumps({"format": 1}).encode()])
def test_damage_is_set_aside_and_said(tmp_path: Path, damage: bytes) -> None:
    store = CalibrationStore(tmp_path)
    path = store.save(make_calibration(KEY, range(1, 31)))
    path.write_bytes(damage)
    assert store.all() == []
    found, said = store.load(KEY)
    assert found is None and said is not None and path.name in said and "\n" not in said
    assert not path.exists() and len(list(tmp_path.iterdir())) == 1
    assert store.load(KEY) == (None, None)
    store.save(make_calibration(KEY, range(1, 31)))
    assert store.load(KEY)[0] is not None


def test_another_checkpoints_file(tmp_path: Path) -> None:
    """Two names may come to one file; a calibration is never taken for another checkpoint's."""
    store = CalibrationStore(tmp_path)
    one, other = (Key(name, 512, 512, "eps", 981) for name in ("a b", "a/b"))
    assert one.name == other.name
    store.save(make_calibration(one, range(1, 31)))
    found, said = store.load(other)
    assert found is None and said is not None and "another checkpoint" in said


def _save_and_load(folder: Path, shift: int) -> None:
    store = CalibrationStore(folder)
    for k in range(20):
        store.save(make_calibration(KEY, np.arange(1, 401) + shift + k))
        found, said = store.load(KEY)
        assert said is None and found is not None


def test_processes_do_not_clash(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_save_and_load, args=(tmp_path, 1000 * k)) for k in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(list(tmp_path.iterdir())) == 1


def test_ordinary_prompts() -> None:
    prompts = ordinary_prompts()
    assert len(set(prompts)) == len(prompts) >= 100 and prompts[:30] == ordinary_prompts(30)
    assert len(set(ordinary_prompts(400))) == 400
    with pytest.raises(ValueError, match="no 1000000 ordinary prompts"):
        ordinary_prompts(1_000_000)
