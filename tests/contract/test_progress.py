"""What is seen of an adjustment while it lasts."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from tests.contract.conftest import Run, Studio
from tests.contract.test_generation import HIRES

LONG: dict[str, dict[str, Any]] = {
    "per_sample": {"target": 0, "max_steps": 100},
    "prompt_embedding": {"target": 0, "max_steps": 100},
    "sail": {"target": 0, "max_steps": 50, "redraws": 1},
    "noise_selection": {"candidates": 64},
    "batch_wise": {"steps": 50},
}


def watched(studio: Studio, settings: dict[str, Any], **payload: Any) -> tuple[Run, list[dict[str, Any]]]:
    """A generation, and what the host said of its progress meanwhile, with the second it was said in."""
    runs: list[Run] = []
    working = threading.Thread(target=lambda: runs.append(studio.run(settings, **payload)))
    working.start()
    said = []
    while working.is_alive():
        said.append({"at": time.time(), **studio.host.get("/sdapi/v1/progress?skip_current_image=true").json()})
        working.join(0.01)
    return runs[0], said


@pytest.mark.parametrize("method", LONG)
def test_the_hosts_progress_moves_while_the_noise_is_adjusted(studio: Studio, method: str) -> None:
    _, said = watched(studio, {"method": method, **LONG[method]}, batch_size=2)
    adjusting = [
        one for one in said if (one["textinfo"] or "").startswith("Memnoise: ") and " of at most " in one["textinfo"]
    ]
    assert len(adjusting) >= 3, said
    steps = [one["state"]["sampling_step"] for one in adjusting]
    most = max(settings for settings in (one["state"]["sampling_steps"] for one in adjusting))
    assert most == {"noise_selection": 64, "batch_wise": 50}.get(method, 100)
    assert steps == sorted(steps) and steps[-1] > steps[0]
    shares = [one["progress"] for one in adjusting]
    assert shares == sorted(shares) and shares[-1] > 0.3
    if method in ("per_sample", "prompt_embedding", "sail"):
        value = ", 2 images running, " + ("loss " if method == "sail" else "magnitude ")
        assert all(value in one["textinfo"] and one["textinfo"].endswith("target 0") for one in adjusting)
    # and what it says is gone when it is sampled
    after = said[said.index(adjusting[-1]) + 1 :]
    assert all(one["textinfo"] is None or " of at most " not in one["textinfo"] for one in after)


def test_the_time_left_is_the_samplers_own_once_it_samples(studio: Studio) -> None:
    """The host estimates it from the time since the job began, of which nothing has been sampled in the beginning."""
    settings = {"method": "per_sample", "target": 0, "max_steps": 100}
    run, said = watched(studio, settings, steps=60)
    assert run.number("steps taken") == 100
    began = said[0]["at"]
    sampling = [one for one in said if one["state"]["sampling_steps"] == 60 and one["state"]["sampling_step"] >= 6]
    assert sampling, said
    for one in sampling:
        left, took = one["eta_relative"], said[-1]["at"] - began
        assert left < took, (left, took)


def test_the_time_of_a_job_is_whole_in_the_end(studio: Studio) -> None:
    """What is left out while the host samples is put back before it goes on to the next picture."""
    if studio.is_real:
        pytest.skip("it does not tell")
    from modules import shared

    for payload in ({"n_iter": 2}, {**HIRES}):
        began = time.time()
        studio.run({"method": "per_sample", "target": 0, "max_steps": 40, "hires": True}, **payload)
        assert shared.state.time_start == pytest.approx(began, abs=0.3)
