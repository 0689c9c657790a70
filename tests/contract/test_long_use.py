"""Hundreds of generations in one process, of every kind and with everything that goes wrong in between."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lib_memnoise.registry import METHODS
from lib_memnoise.settings import SPECS
from tests.contract.conftest import HOSTS, Studio, open_host
from tests.contract.test_methods import settings_of
from tests.contract.test_requests import plot

HELPERS = [Path(__file__).resolve().parents[1] / "hosts" / name for name in ("witness", "census")]
GENERATIONS = {"double": 60, "webui": 300}
SAMPLERS = ("DDIM", "Euler a", "DPM++ 2M", "UniPC", "PLMS", "Heun", "LCM")
CHECKPOINTS = ("sd2-v", "sdxl", "sd1-b", "sd1")
OPTIONS: tuple[dict[str, Any], ...] = (
    {"pad_cond_uncond": True},
    {"batch_cond_uncond": False},
    {"skip_early_cond": 0.3},
    {"randn_source": "CPU"},
)
FAULTS = ("out of memory", "error", "nan", "out of memory 1 times", "interrupt", "skip")
MOST_GROWN = 150e6
"""Bytes; allocators keep some."""


@pytest.fixture(scope="module", params=HOSTS)
def studio(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    with open_host(request.param, tmp_path_factory, extensions=HELPERS) as host:
        yield Studio(host)


class Day:
    """Generations of one kind after another, counted."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        self.chance = random.Random(0)
        self.generations = 0
        self.checkpoint = 0
        self.kinds: list[Callable[[], None]] = [
            self.a_method, self.a_method, self.a_method, self.flagged, self.traced, self.hires, self.a_plot,
            self.refused, self.failing, self.interrupted, self.another_checkpoint, self.another_option,
            self.two_at_once,
        ]  # fmt: skip

    def payload(self) -> dict[str, Any]:
        choose = self.chance.choice
        return {
            "steps": choose([3, 4, 6]),
            "seed": self.chance.randrange(1000),
            "batch_size": choose([1, 1, 2, 3]),
            "n_iter": choose([1, 1, 2]),
            "cfg_scale": choose([1, 4, 7]),
            "sampler_name": choose(SAMPLERS),
            "prompt": choose(["a fox", "a red fox AND a barn :0.5", "a (fox:1.3) in [winter:summer:2]", ""]),
            "negative_prompt": choose(["", "blurry"]),
        }

    def generate(self, settings: dict[str, Any] | None, **payload: Any) -> Any:
        answer = self.studio.answer(None if settings is None else [True, settings], **{**self.payload(), **payload})
        self.generations += 1
        assert answer.status == 200, answer.detail
        return answer

    def a_method(self) -> None:
        method = self.chance.choice(list(METHODS))
        answer = self.generate(settings_of(method))
        # cross-attention and the padding fix are for some text encoders only
        failed = [text for text in answer.infotexts if "Memnoise failed" in text]
        assert not failed or method in ("padding_fix", "cross_attention"), failed

    def flagged(self) -> None:
        self.generate({"when": "flagged", "threshold": self.chance.choice([0.0, 0.5, 1000.0])})

    def traced(self) -> None:
        self.generate({**settings_of("batch_wise"), "trace": self.chance.choice(["on", "compare"])})

    def hires(self) -> None:
        hires = {"enable_hr": True, "hr_scale": 2, "hr_upscaler": "Latent", "denoising_strength": 0.6}
        self.generate({"tau": 500, "hires": self.chance.random() < 0.5}, **hires, batch_size=1, sampler_name="DDIM")

    def a_plot(self) -> None:
        axis = (f"[Memnoise] {SPECS['tau'].label}", "500, 900")
        answer = plot(self.studio, axis, args=[True, {}], **{**self.payload(), "batch_size": 1, "n_iter": 1})
        self.generations += 2
        assert answer.status == 200, answer.detail

    def refused(self) -> None:
        assert self.studio.answer([True, {"gamma": 11}], **self.payload()).status == 422
        assert self.studio.answer([True, {"gama": 1}], **self.payload()).status == 422
        self.generations += 1

    def failing(self) -> None:
        fault, fails = self.chance.choice(FAULTS), self.chance.random() < 0.3
        settings = {**settings_of(self.chance.choice(["batch_wise", "per_sample"])), "fail_instead": fails}
        scripts = {"memnoise": {"args": [True, settings]}, "witness": {"args": ["", fault]}}
        answer = self.studio.answer(alwayson_scripts=scripts, **{**self.payload(), "prompt": "a fox", "n_iter": 1})
        self.generations += 1
        assert answer.status == 200 or fails, answer.detail

    def interrupted(self) -> None:
        """By another client, at some time."""
        if not self.studio.is_real:
            return
        way, settings = self.chance.choice(["interrupt", "skip"]), {"method": "per_sample", "target": 0}
        asking = threading.Thread(target=self.generate, args=({**settings, "max_steps": 1000},), daemon=True)
        asking.start()
        begin = time.perf_counter()
        while asking.is_alive() and time.perf_counter() - begin < 60:
            time.sleep(self.chance.random() * 0.3)
            self.studio.host.post(f"/sdapi/v1/{way}")
        asking.join(1)
        assert not asking.is_alive(), f"{way} did nothing"

    def another_checkpoint(self) -> None:
        self.checkpoint += 1
        self.studio.host.load(CHECKPOINTS[self.checkpoint % len(CHECKPOINTS)])
        self.generate({"tau": 500})

    def another_option(self) -> None:
        with self.studio.options(self.chance.choice(OPTIONS)):
            self.generate(settings_of("per_sample"))

    def two_at_once(self) -> None:
        """Each client's pictures are what it gets alone."""
        requests: list[tuple[Any, dict[str, Any]]] = [
            ([True, settings_of("per_sample")], {"prompt": "a fox", "steps": 4, "seed": 3}),
            ([True, {"tau": 300}], {"prompt": "a barn", "steps": 4, "seed": 4, "sampler_name": "Euler a"}),
            (None, {"prompt": "a barn", "steps": 4, "seed": 4}),
        ]
        alone = [self.studio.answer(args, **payload) for args, payload in requests]
        together: dict[int, Any] = {}

        def ask(number: int) -> None:
            args, payload = requests[number]
            together[number] = self.studio.answer(args, **payload)

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(requests))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.generations += 2 * len(requests)
        for number, answer in enumerate(alone):
            assert answer.status == together[number].status == 200
            assert np.array_equal(answer.images[0], together[number].images[0]), number
            assert answer.infotexts == together[number].infotexts

    def until(self, generations: int) -> None:
        while self.generations < generations:
            every = list(self.kinds)
            self.chance.shuffle(every)
            for kind in every:
                kind()
        self.studio.host.load("sd1")


def census(studio: Studio) -> dict[str, Any]:
    studio.run(prompt="another")  # the host keeps the last request
    answer = studio.host.get("/census")
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def reload_page(studio: Studio) -> None:
    """The settings page's "Reload UI": the host loads its scripts again."""
    host = studio.host
    starts = host.log_text().count("Startup time")
    assert host.post("/census/reload").status_code == 200
    for _ in range(600):
        time.sleep(0.2)
        if host.log_text().count("Startup time") > starts:
            return
    raise TimeoutError(host.log_tail())


def test_a_checkpoint_that_was_left_holds_no_request(studio: Studio) -> None:
    """reForge keeps the checkpoint it started with as long as it runs, and so the U-Net of that one's last pass."""
    untouched = census(studio)
    studio.run({"tau": 500})
    studio.run(settings_of("per_sample"))
    studio.host.load("sd2-v")
    assert census(studio)["alive"] == untouched["alive"]
    studio.host.load("sd1")


def test_hundreds_of_generations_leave_nothing(studio: Studio, capsys: pytest.CaptureFixture[str]) -> None:
    for checkpoint in CHECKPOINTS:  # what a host keeps of each, it has now
        studio.host.load(checkpoint)
        studio.run()
    plain, mitigated = studio.run(batch_size=2), studio.run({"tau": 500}, batch_size=2)
    untouched = census(studio)
    day, most = Day(studio), GENERATIONS["webui" if studio.is_real else "double"]
    day.until(most // 3)
    warm = census(studio)
    day.until(2 * most // 3)
    if studio.is_real:
        reload_page(studio)
    day.until(most)
    end = census(studio)

    figures = {key: (untouched[key], warm[key], end[key]) for key in ("rss", "threads", "tensors", "alive")}
    with capsys.disabled():
        print(f"\n{studio.host.name}: {day.generations} generations; at first, after a third, at the end: {figures}")
    for run, again in ((plain, studio.run(batch_size=2)), (mitigated, studio.run({"tau": 500}, batch_size=2))):
        assert all(map(np.array_equal, run.pictures, again.pictures))
        assert run.infotexts == again.infotexts
    assert end["hooks"] == untouched["hooks"]
    assert end["alive"] == untouched["alive"]
    assert end["tensors"] <= untouched["tensors"] + 50
    if studio.is_real:
        assert end["rss"] - warm["rss"] < MOST_GROWN
