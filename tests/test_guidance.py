from __future__ import annotations

import numpy as np
import pytest
import torch

from lib_memnoise.guidance import Start, guidance_off, make_start, transition_point
from lib_memnoise.settings import from_mapping


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
        return make_start(from_mapping(given).resolved("sd1"))

    assert start() == Start(900)
    assert start(method="per_sample") == start(method="none") == start(guidance="first") == Start(999)
    assert start(method="none", guidance="tau", tau=860) == Start(860)
    assert start(guidance="transition", latest=640) == Start(640, at_transition=True)
    assert not start(method="none").is_off(999)
