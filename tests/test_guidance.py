from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from lib_memnoise.core.guidance import Start, guidance_off, make_start, transition_point
from lib_memnoise.methods.batch import BatchContext
from lib_memnoise.methods.pipeline import run
from lib_memnoise.settings import from_mapping
from tests.networks import SmallDelta, noise


def euler_timesteps(steps: int = 50) -> torch.Tensor:
    """The timesteps that Euler's default schedule recovers from its float32 sigmas."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas = (1 - betas).cumprod(0)
    log_sigmas = (((1 - alphas) / alphas) ** 0.5).log().float()
    grid = torch.linspace(999, 0, steps)
    low = grid.floor().long().clamp(max=998)
    sigmas = (log_sigmas[low] * (1 - (grid - low)) + log_sigmas[low + 1] * (grid - low)).exp()
    return torch.from_numpy(np.interp(sigmas.log().numpy(), log_sigmas.numpy(), np.arange(1000.0)))


@pytest.mark.parametrize(("tau", "off"), [(917.4490, 4), (917.449, 4), (999, 0), (999.0, 0), (937.8367, 3), (0, 49)])
def test_a_step_at_tau_has_guidance(tau: float, off: int) -> None:
    assert sum(guidance_off(float(t), tau) for t in euler_timesteps()) == off


def test_ddim_at_900() -> None:
    assert [t for t in range(981, 0, -20) if guidance_off(t, 900)] == [981, 961, 941, 921, 901]


@pytest.mark.parametrize(
    ("values", "transition"),
    [
        ([3.0, 2.0, 1.0, 1.5], 721),  # the third of 761, 741, 721, 701
        ([3.0, 2.0, 2.5, 1.0, 4.0], 741),  # the first, not the lowest
        ([1.0, 2.0, 3.0], None),  # rising from the first step is no minimum
        ([3.0, 2.0, 2.0, 2.5], None),  # neither is a plateau
        ([3.0, 2.0, 1.0], None),
        ([3.0, 2.0], None),
        ([], None),
    ],
)
def test_transition_point(values: list[float], transition: float | None) -> None:
    curve = [(761.0 - 20 * k, value) for k, value in enumerate(values)]
    assert transition_point(curve) == transition
    start = Start(700, at_transition=True)
    off = []
    for t, value in curve:
        start.observe(t, value)
        off.append(start.is_off(t))
    # It is known one step after the minimum, and guidance is on from that step.
    expected = [t > 700 and (transition is None or t >= transition) for t, _ in curve]
    assert off == expected


def test_a_second_look_at_one_timestep_is_not_a_step() -> None:
    start = Start(0, at_transition=True)
    for t, value in ((900.0, 3.0), (880.0, 2.0), (880.0, 2.5), (890.0, 9.0)):
        start.observe(t, value)
    assert start.curve == [(900.0, 3.0), (880.0, 2.0)] and start.is_off(860)


def test_guidance_starts_as_the_settings_say() -> None:
    def start(**given: object) -> Start:
        return make_start(from_mapping(given).resolved("sd1"), 981)

    assert start() == Start(900)
    assert start(method="per_sample") == start(method="none") == start(guidance="first") == Start(999)
    assert start(method="none", guidance="tau", tau=860) == Start(860)
    assert start(guidance="transition", latest=640) == Start(640, at_transition=True)
    assert not start(method="none").is_off(999)


@pytest.mark.parametrize(
    ("first", "given", "preset", "expected"),
    [
        (981, {}, "sd1", 900),  # above τ it is what it is
        (901, {}, "sd1", 900),
        (900, {}, "sd1", 900 / 981 * 900),
        (876, {}, "sd1", 900 / 981 * 876),  # DDIM with 8 steps
        (999, {}, "sd2_v", 917.449),
        (701, {}, "sd2_v", 917.449 / 999 * 701),
        (601, {"method": "static"}, "sd1", 740 / 981 * 601),
        (601, {"method": "per_sample"}, "sd1", 999),
        (601, {"method": "per_sample", "guidance": "tau"}, "relative", 900 / 981 * 601),
        (601, {"method": "dynamic"}, "sd1", 700 / 981 * 601),
        (876, {"method": "dynamic"}, "sd1", 700),
        # asked for in so many words
        (876, {"tau": 900}, "sd1", 900),
        (876, {"tau": 999}, "sd1", 999),
        (876, {"preset": "custom"}, "sd1", 900),
        (601, {"method": "dynamic", "latest": 700}, "sd1", 700),
        (876, {"tau": 900, "tau_of": 990}, "sd1", 900 / 990 * 876),
        (876, {"tau_of": 0}, "sd1", 900),
        # another setting than τ is none of its business
        (876, {"gamma": 0.1}, "sd1", 900 / 981 * 876),
    ],
)
def test_a_pass_that_begins_below_a_preset_s_tau_waits_for_its_share(
    first: float, given: dict[str, object], preset: str, expected: float
) -> None:
    settings = from_mapping(given).resolved(preset)
    assert make_start(settings, first).tau == pytest.approx(expected)
    used = run(
        noise(1), SmallDelta(), replace(settings, method="none", guidance=settings.start), BatchContext("eps", first)
    )
    if settings.start != "first":
        assert used.used["tau" if settings.start == "tau" else "latest"] == make_start(settings, first).tau
        relative = expected not in (settings.tau, settings.latest)
        assert used.used.get("tau_share") == (pytest.approx(expected / first) if relative else None)


@pytest.mark.parametrize("preset", ["sd1", "sd2_v", "relative"])
@pytest.mark.parametrize("method", ["batch_wise", "static", "dynamic", "opposite_guidance"])
def test_guidance_is_held_back_in_every_first_step(preset: str, method: str) -> None:
    settings = from_mapping({"method": method}).resolved(preset)
    for first in range(1, 1000):
        start = make_start(settings, first)
        assert start.is_off(first) and start.tau > 0.7 * first
