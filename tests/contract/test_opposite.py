"""Opposite guidance: until guidance starts, ε_uncond − s·Δ is followed (Jain et al. 2025)."""

from __future__ import annotations

from typing import Any

import pytest

from tests.contract.conftest import ROUNDING, Studio, close
from tests.contract.test_generation import same

NEVER: dict[str, Any] = {"method": "none", "guidance": "tau", "tau": 0}
"""Guidance starts at no step of these schedules, the last of which is not at t = 0."""
PAYLOAD: dict[str, Any] = {"scheduler": "SGM Uniform", "steps": 6}


@pytest.mark.parametrize("prompt", ["a red fox in the snow", "a fox AND snow :0.5", "a fox, " * 60])
@pytest.mark.parametrize("sampler", ["DDIM", "DDIM CFG++", "Euler", "Euler a", "DPM++ 2M", "UniPC", "Heun"])
def test_it_is_guidance_of_negative_scale(studio: Studio, sampler: str, prompt: str) -> None:
    """What the host itself does with the CFG scale −s is another way to the same picture."""
    payload = {**PAYLOAD, "sampler_name": sampler, "prompt": prompt, "batch_size": 2}
    s = 1.5
    scale = -s * 12.5 if "CFG++" in sampler and not studio.is_fork else -s  # which divides the scale
    expected = studio.run(**payload, cfg_scale=scale)
    run = studio.run({**NEVER, "opposite": s}, **payload)
    off = studio.run(NEVER, **payload)
    for image in range(2):
        assert run.read("Memnoise failed", image) is None
        assert close(run.pictures[image], expected.pictures[image]) <= ROUNDING
        assert close(off.pictures[image], expected.pictures[image]) > ROUNDING
        assert run.number("rows", image) > off.number("rows", image)
    assert "opposite=1.5" in (run.read("Memnoise used") or "")


@pytest.mark.parametrize("prompt", ["a red fox in the snow", "a fox AND snow :0.5"])
@pytest.mark.parametrize("options", [{"skip_early_cond": 0.5}, {"s_min_uncond_all": True, "s_min_uncond": 100}])
def test_steps_without_unconditional_rows(studio: Studio, options: dict[str, Any], prompt: str) -> None:
    """Where the host leaves them out, what is followed is the same."""
    settings = {**NEVER, "opposite": 1.5}
    payload = {**PAYLOAD, "prompt": prompt, "sampler_name": "Euler"}
    expected = studio.run(settings, **payload)
    with studio.options(options):
        run = studio.run(settings, **payload)
    assert run.read("Memnoise failed") is None
    assert close(run.pictures[0], expected.pictures[0]) <= ROUNDING


def test_it_ends_where_guidance_starts(studio: Studio) -> None:
    payload = {"steps": 8, "batch_size": 2}
    assert same(
        studio.run({"method": "none", "guidance": "tau", "tau": 999, "opposite": 3}, **payload), studio.run(**payload)
    )
    assert same(studio.run({"tau": 500, "opposite": 0}, **payload), studio.run({"tau": 500}, **payload))
    half, never = (
        studio.run({"method": "none", "guidance": "tau", "tau": t, "opposite": 3}, **payload) for t in (500, 0)
    )
    assert close(half.pictures[0], never.pictures[0]) > ROUNDING


def test_a_scale_of_zero_is_refused(studio: Studio) -> None:
    run = studio.run({**NEVER, "opposite": 3}, cfg_scale=0)
    assert "opposite guidance needs a CFG scale other than 0" in (run.read("Memnoise failed") or "")


def test_where_it_does_not_belong(studio: Studio) -> None:
    answer = studio.answer([True, {"method": "per_sample", "opposite": 3}])
    assert answer.status == 422
    assert answer.detail == (
        "memnoise: opposite = 3 is used only where guidance is tau or transition, but it is first."
    )
