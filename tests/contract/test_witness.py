"""A second extension in the host recomputes the adjusted noise, and breaks the network."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.contract.conftest import HOSTS, Studio, open_host

WITNESS = Path(__file__).resolve().parents[1] / "hosts" / "witness"


@pytest.fixture(scope="module", params=HOSTS)
def studio(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    with open_host(request.param, tmp_path_factory, extensions=[WITNESS]) as host:
        yield Studio(host)


def witnessed(studio: Studio, settings: dict[str, Any], expected: dict[str, Any], **payload: Any) -> float:
    scripts = {"memnoise": {"args": [True, settings]}, "witness": {"args": [json.dumps(expected), ""]}}
    answer = studio.answer(alwayson_scripts=scripts, **payload)
    assert answer.status == 200, answer.detail
    text = answer.infotexts[-1]
    assert "Memnoise failed" not in text, text
    assert "Frozen: 0" in text
    return float(text.split("Witness: ")[1].split(",")[0])


@pytest.mark.parametrize("model", ["sd1", "sd2-v", "sdxl", "sd1-inpainting"])
@pytest.mark.parametrize("sampler", ["DDIM", "PLMS", "Euler", "DPM++ 2M SDE", "Heun"])
def test_the_noise_is_what_the_paper_says(studio: Studio, model: str, sampler: str) -> None:
    studio.host.load(model)
    numbers = {"gamma": 0.05, "rho": 20, "steps": 3} if model == "sd2-v" else {"gamma": 0.7, "rho": 50, "steps": 2}
    assert witnessed(studio, numbers, numbers, sampler_name=sampler) < 1e-4
    per_sample = {"method": "per_sample", "lr": 0.02, "target": 0, "max_steps": 4}
    expected = {"lr": 0.02, "max_steps": 4}
    for payload in ({"batch_size": 1}, {"batch_size": 2, "prompt": "a fox AND snow :0.5"}):
        # Adam divides by the gradient's own size: a rounding error in a tiny one is not tiny any more
        assert witnessed(studio, per_sample, expected, sampler_name=sampler, **payload) < 5e-3
    studio.host.load("sd1")


FAULTS = {
    "out of memory": "out of memory while adjusting the noise",
    "error": "the network is not in the mood",
    "nan": "not finite",
}


@pytest.mark.parametrize("method", ["batch_wise", "per_sample"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_failure_never_costs_the_image(studio: Studio, fault: str, method: str) -> None:
    plain = studio.run(batch_size=2)
    scripts = {"memnoise": {"args": [True, {"method": method}]}, "witness": {"args": ["", fault]}}
    answer = studio.answer(alwayson_scripts=scripts, batch_size=2)
    assert answer.status == 200, answer.detail
    for picture, unmitigated in zip(answer.images[-2:], plain.pictures):
        assert np.array_equal(picture, unmitigated)
    for text in answer.infotexts[-2:]:
        assert FAULTS[fault] in text.split("Memnoise failed: ")[1]
        assert "Frozen: 0" in text
    # nothing lingers
    assert np.array_equal(studio.run(batch_size=2).pictures[0], plain.pictures[0])


@pytest.mark.parametrize("method", ["batch_wise", "per_sample"])
@pytest.mark.parametrize("fault", FAULTS)
def test_or_the_request_fails_if_that_was_asked_for(studio: Studio, fault: str, method: str) -> None:
    scripts = {"memnoise": {"args": [True, {"method": method, "fail_instead": True}]}, "witness": {"args": ["", fault]}}
    answer = studio.answer(alwayson_scripts=scripts)
    assert answer.status in (422, 500) and FAULTS[fault] in answer.detail
    assert studio.answer([True, {"method": method}]).status == 200
    with studio.options({"memnoise_fail_instead": True}):
        scripts["memnoise"] = {"args": [True, {"method": method}]}
        answer = studio.answer(alwayson_scripts=scripts)
        assert answer.status in (422, 500) and FAULTS[fault] in answer.detail


@pytest.mark.parametrize("method", ["batch_wise", "per_sample"])
@pytest.mark.parametrize("fault", ["interrupt", "skip"])
def test_interrupt_and_skip_are_honoured_in_the_loop(studio: Studio, fault: str, method: str) -> None:
    settings: dict[str, Any] = {
        "method": method,
        **({"steps": 50} if method == "batch_wise" else {"target": 0, "max_steps": 1000}),
    }
    scripts = {"memnoise": {"args": [True, settings]}, "witness": {"args": ["", fault]}}
    answer = studio.answer(alwayson_scripts=scripts)
    assert answer.status == 200 and answer.seconds < 5
    assert len(answer.images) >= 1
    text = answer.infotexts[-1]
    assert "interrupted before the noise was adjusted" in text and "Memnoise failed" not in text
    assert np.array_equal(studio.run({}).images[0], studio.run({}).images[0])
