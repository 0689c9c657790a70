"""Scores, mitigation of flagged images only, and guidance that starts at each image's own transition point."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lib_memnoise.settings import size_factor
from tests.contract.conftest import ROUNDING, Run, Studio, close
from tests.contract.test_generation import NOTHING, PROMPTS, SAMPLERS, same

NONE_FLAGGED = {"when": "flagged", "threshold": 1000}
ALL_FLAGGED = {"when": "flagged", "threshold": 0}


def scores(run: Run) -> list[float]:
    return [run.number("magnitude", image) for image in range(run.count)]


@pytest.mark.parametrize("settings", [NONE_FLAGGED, {"method": "none"}], ids=["none flagged", "none"])
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_score_costs_nothing(studio: Studio, sampler: str, batch_size: int, settings: dict[str, Any]) -> None:
    payload = {"sampler_name": sampler, "scheduler": "Simple", "batch_size": batch_size}
    run, nothing = studio.run(settings, **payload), studio.run(NOTHING, **payload)
    assert same(run, studio.run(**payload))
    for image in range(batch_size):
        assert run.number("rows", image) == nothing.number("rows", image)
    mitigated = "False" if "when" in settings else None
    assert run.read("Memnoise mitigated") == mitigated and run.read("Memnoise failed") is None
    if batch_size == 1:
        assert scores(run)[0] == pytest.approx(studio.run({}, **payload).number("magnitude"), rel=1e-3)


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_score_leaves_every_prompt_alone(studio: Studio, prompt: str, batch_size: int) -> None:
    payload = {"sampler_name": "Euler", "scheduler": "Simple", "batch_size": batch_size, **PROMPTS[prompt]}
    with studio.options(payload.pop("options", {})):
        plain, run = studio.run(**payload), studio.run(NONE_FLAGGED, **payload)
        rows = [r.number("rows") for r in (run, studio.run(NOTHING, **payload))]
    # The forks leave the unconditional rows out at CFG 1.
    halved = prompt == "skip early" or (studio.is_fork and prompt == "CFG 1")
    if halved and studio.is_fork:  # the first step's rows were in a call of more
        assert all(close(a, b) <= ROUNDING for a, b in zip(run.pictures, plain.pictures))
    else:
        assert same(run, plain)
    # A row an image where the negative prompt is another branch, or where the first step has no unconditional one.
    extra = 1 if "negative" in prompt or prompt == "editing" or halved else 0
    assert rows[0] == rows[1] + extra


FACTOR = size_factor(4 * 8 * 8, "eps")
"""By which a threshold is scaled at 64 px."""


@pytest.mark.parametrize("negative", ["", "blurry"])
@pytest.mark.parametrize("method", ["batch_wise", "per_sample"])
@pytest.mark.parametrize("sampler", ["DDIM", "Euler", "DPM++ 2M"])
def test_only_flagged_images_are_mitigated(studio: Studio, sampler: str, method: str, negative: str) -> None:
    payload = {"batch_size": 4, "sampler_name": sampler, "negative_prompt": negative}
    settings: dict[str, Any] = {"method": method}
    settings |= {"tau": 500} if method == "batch_wise" else {"target": 0.8, "target_kind": "fraction"}
    plain, every = studio.run(**payload), studio.run(settings, **payload)
    low, high = sorted(scores(every))[1:3]
    settings |= {"when": "flagged", "threshold": (low + high) / 2 / FACTOR}
    run, exact = studio.run(settings, **payload), studio.run({**settings, "exact_batches": True}, **payload)
    assert scores(run) == pytest.approx(scores(every), rel=1e-3)
    flagged = [run.read("Memnoise mitigated", image) == "True" for image in range(4)]
    assert sum(flagged) == 2
    for image in range(4):
        expected = every if flagged[image] else plain
        assert close(run.pictures[image], expected.pictures[image]) <= ROUNDING
        assert close(exact.pictures[image], expected.pictures[image]) <= ROUNDING
        assert flagged[image] or np.array_equal(exact.pictures[image], plain.pictures[image])
        used = run.read("Memnoise used", image)
        assert (used is not None) == flagged[image] and run.read("Memnoise failed", image) is None


def test_all_flagged_is_as_always(studio: Studio) -> None:
    flagged, always = studio.run(ALL_FLAGGED, batch_size=2), studio.run({}, batch_size=2)
    assert same(flagged, always)
    assert [flagged.number("rows", image) for image in range(2)] == [always.number("rows", image) for image in range(2)]
    # A gradient needs an evaluation of its own.
    per_sample = {"method": "per_sample", "target": 0.8, "target_kind": "fraction"}
    flagged, always = studio.run({**per_sample, **ALL_FLAGGED}), studio.run(per_sample)
    assert close(flagged.pictures[0], always.pictures[0]) <= ROUNDING
    assert flagged.number("rows") == always.number("rows") + 2


def test_settings_of_a_score_come_back(studio: Studio) -> None:
    run = studio.run({"when": "flagged", "threshold": 2.5, "exact_batches": True})
    assert run.read("Memnoise when") == "flagged" and run.read("Memnoise threshold") == "2.5"
    assert run.read("Memnoise exact batches") == "True"


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("prompt", ["a red fox in the snow", "a fox AND snow :0.5", "a fox, " * 60])
@pytest.mark.parametrize("sampler", ["DDIM", "Euler", "DPM++ 2M"])
def test_no_transition_before_the_latest(studio: Studio, sampler: str, prompt: str, batch_size: int) -> None:
    """A random network's ‖Δ‖ falls all the way: guidance starts at the latest, and hearing the prompt costs a row."""
    payload = {"sampler_name": sampler, "prompt": prompt, "batch_size": batch_size, "steps": 12}
    waiting = studio.run({"method": "none", "guidance": "transition", "latest": 500}, **payload)
    fixed = studio.run({"method": "none", "guidance": "tau", "tau": 500}, **payload)
    for image in range(batch_size):
        at = waiting.read("Memnoise transition at", image)
        if at is None:
            assert close(waiting.pictures[image], fixed.pictures[image]) <= ROUNDING
        assert waiting.number("rows", image) > fixed.number("rows", image)
