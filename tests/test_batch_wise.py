from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib_memnoise.core.delta import magnitude
from lib_memnoise.methods.batch_wise import adjust
from tests.networks import SmallDelta, noise
from tests.reference import algorithm_1


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    batch=st.integers(1, 4),
    gamma=st.floats(0.01, 0.8),
    rho=st.floats(0.5, 60),
    steps=st.integers(1, 4),
)
def test_agrees_with_algorithm_1(seed: int, batch: int, gamma: float, rho: float, steps: int) -> None:
    x = noise(batch, seed=seed)
    exact = SmallDelta(seed=seed).double()
    adjusted = adjust(x.double(), exact, gamma=gamma, rho=rho, steps=steps)
    single = adjust(x, SmallDelta(seed=seed), gamma=gamma, rho=rho, steps=steps)
    assert single.dtype is torch.float32
    for image in range(batch):
        expected = algorithm_1(x[image], exact, gamma=gamma, rho=rho, M=steps)
        torch.testing.assert_close(adjusted[image], expected, atol=1e-10, rtol=1e-10)
        # in float32 the network's own rounding comes back amplified: bounded as a whole, not element by element
        assert (single[image] - expected).norm() < 1e-4 * expected.norm()


def test_costs_two_evaluations_a_step_and_none_where_nothing_changes() -> None:
    x, delta = noise(3), SmallDelta()
    adjust(x, delta, gamma=0.7, rho=12.5, steps=4)
    assert delta.rows == [3] * 8
    for gamma, rho, steps in ((0, 1, 2), (1, 0, 2), (1, 1, 0)):
        delta.rows.clear()
        assert torch.equal(adjust(x, delta, gamma=gamma, rho=rho, steps=steps), x)
        assert delta.rows == []


def test_an_image_does_not_depend_on_its_batch() -> None:
    x, delta = noise(4), SmallDelta()
    together = adjust(x, delta, gamma=0.7, rho=12.5, steps=2)
    for image in range(4):
        alone = adjust(x[image : image + 1], delta, gamma=0.7, rho=12.5, steps=2)
        torch.testing.assert_close(together[image], alone[0], atol=1e-5, rtol=1e-5)


def test_leaves_its_input_alone_and_works_in_float32_under_half_networks() -> None:
    x = noise(2)
    before = x.clone()
    adjusted = adjust(x, SmallDelta(dtype=torch.bfloat16), gamma=0.7, rho=12.5, steps=2)
    assert torch.equal(x, before) and adjusted.dtype is torch.float32
    assert not torch.equal(adjusted, x)
    assert adjust(x.half(), SmallDelta(), gamma=0.7, rho=12.5, steps=1).dtype is torch.float32


def test_a_prediction_of_zero_leaves_its_image_alone() -> None:
    x, net = noise(2), SmallDelta()

    def delta(z: torch.Tensor) -> torch.Tensor:
        return net(z) * torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1)

    adjusted = adjust(x, delta, gamma=0.7, rho=12.5, steps=2)
    assert torch.equal(adjusted[0], x[0]) and torch.isfinite(adjusted).all()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError("stop")])
def test_what_delta_raises_passes_through(error: BaseException) -> None:
    def delta(z: torch.Tensor) -> torch.Tensor:
        raise error

    with pytest.raises(type(error) if isinstance(error, Exception) else error):  # type: ignore[arg-type]
        adjust(noise(1), delta, gamma=1, rho=1, steps=1)


def test_lowers_the_magnitude_of_a_linear_prediction() -> None:
    # Δ(x) = A x with A positive semidefinite: the step is −γ̃ρ A Δ/‖Δ‖, a descent direction.
    a = torch.diag(torch.linspace(0.1, 1, 4 * 8 * 8))

    def delta(z: torch.Tensor) -> torch.Tensor:
        return (z.flatten(1) @ a).reshape(z.shape)

    x = noise(2)
    assert (magnitude(delta(adjust(x, delta, gamma=0.2, rho=5, steps=2))) < magnitude(delta(x))).all()
