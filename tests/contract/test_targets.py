"""Targets of descents where none is given, and what comes of one that is out of reach."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lib_memnoise.core.calibration import ordinary_prompts
from tests.contract.conftest import Studio
from tests.contract.test_generation import same
from tests.contract.test_scores import SMALL, forget, post

SIZE = {"width": 72, "height": 64}
"""At which nothing else is calibrated."""


@pytest.fixture(autouse=True)
def uncalibrated(studio: Studio) -> Iterator[None]:
    """Other tests' calibrations would serve."""
    forget(studio)
    yield
    forget(studio)


@pytest.mark.parametrize("model", ["sd1", "sd2-v", "sdxl"])
def test_an_unknown_checkpoint_goes_to_half_of_what_it_starts_from(studio: Studio, model: str) -> None:
    """A published target is one checkpoint's: on another it may be out of reach, or no target at all."""
    studio.host.load(model)
    for method in ("per_sample", "prompt_embedding", "sail"):
        run = studio.run({"method": method, "max_steps": 100})
        assert "target=0.5x" in (run.read("Memnoise used") or ""), method
    run = studio.run({"method": "per_sample"})
    assert run.number("magnitude after") < 0.5 * run.number("magnitude")
    assert run.number("steps taken") < 100 and run.read("Memnoise note") is None
    assert run.read("Memnoise preset") is None


def test_the_papers_targets_by_name(studio: Studio) -> None:
    run = studio.run({"method": "per_sample", "preset": "sd1"})
    assert "target=0.1125 " in (run.read("Memnoise used") or "")  # scaled to the size
    assert run.read("Memnoise preset") == "sd1"


def test_a_target_out_of_reach_is_given_up(studio: Studio) -> None:
    settings = {"method": "per_sample", "target": 0.001, "max_steps": 60}
    run = studio.run(settings, batch_size=2)
    for image in range(2):
        assert run.number("steps taken", image) < 60
        note = run.read("Memnoise note", image) or ""
        assert "the target was not reached in " in note and "too slowly to reach it in 60" in note
        # of every step a forward and a backward pass, and one evaluation that is the sampler's first
        assert run.number("backward rows", image) == 2 * run.number("steps taken", image)
    assert studio.run({**settings, "target": 0}).number("steps taken") == 60  # which asks for all steps


def test_a_calibrations_target_is_written_down(studio: Studio) -> None:
    body = {**SMALL, **SIZE, "prompts": ordinary_prompts(20)}
    status, made = post(studio, "calibrate", body)
    assert status == 200, made
    auto = studio.run({"method": "per_sample"}, **SIZE)
    assert auto.read("Memnoise preset") is None
    # where the scores of ordinary prompts have their middle; γ̃ stays the family's
    used = dict(part.split("=") for part in (auto.read("Memnoise used") or "").split(" "))
    assert float(used["target"]) == pytest.approx(made["median"], rel=1e-3)
    assert "gamma=0.7 " in (studio.run({}, **SIZE).read("Memnoise used") or "")

    # With a number given, the infotext holds all of them: what it says makes the same picture again.
    given = studio.run({"method": "per_sample", "lr": 0.02}, **SIZE)
    assert given.read("Memnoise preset") == "custom" and given.read("Memnoise target kind") == "absolute"
    said = {"method": "per_sample", "preset": "custom", "lr": 0.02, "max_steps": 100, "target_kind": "absolute"}
    again = studio.run({**said, "target": float(given.read("Memnoise target") or 0)}, **SIZE)
    assert same(again, given) and again.read("Memnoise used") == given.read("Memnoise used")
    # elsewhere it is not calibrated
    assert "target=0.5x" in (studio.run({"method": "per_sample"}).read("Memnoise used") or "")
