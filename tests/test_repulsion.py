"""Repulsion, and Algorithm 1's step repeated to a target, against the formulas written anew."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lib_memnoise.core.report import ImageReport
from lib_memnoise.methods import repulsion
from lib_memnoise.methods.batch import BatchContext
from lib_memnoise.methods.forward_descent import descend_forward
from lib_memnoise.methods.pipeline import mitigate, needs_gradient, run
from lib_memnoise.settings import SettingError, from_mapping, is_used, json_schema
from tests.networks import SmallDelta, noise


def delta_of(delta: SmallDelta, x: np.ndarray) -> np.ndarray:
    return np.asarray(delta(torch.from_numpy(x)[None]).detach()[0].numpy())


@given(st.integers(0, 1000), st.floats(0, 2))
@settings(max_examples=25, deadline=None)
def test_repulsion_is_its_formula(seed: int, beta: float) -> None:
    x, delta = noise(2, seed=seed).double(), SmallDelta(seed=seed).double()
    adjusted, before = repulsion.adjust(x, delta, beta=beta)
    for image in range(2):
        one = x[image].numpy()
        prediction = delta_of(delta, one)
        moved = one + beta * math.sqrt(one.size) * prediction / np.linalg.norm(prediction)
        expected = np.linalg.norm(one) * moved / np.linalg.norm(moved)
        assert np.allclose(adjusted[image].numpy(), expected, atol=1e-10)
        assert math.isclose(float(before[image]), np.linalg.norm(prediction), rel_tol=1e-9)
        # The angle to Δ is smaller than before, and the length is as it was.
        assert (adjusted[image].numpy() * prediction).sum() >= (one * prediction).sum() - 1e-9
        assert math.isclose(float(adjusted[image].norm()), np.linalg.norm(one), rel_tol=1e-9)


def test_repulsion_costs_one_evaluation_and_none_after_a_score() -> None:
    x, delta = noise(3), SmallDelta()
    chosen = from_mapping({"method": "repulsion"}).resolved("sd1")
    run(x, delta, chosen, BatchContext("eps"))
    assert delta.rows == [3]
    delta.rows.clear()
    flagged = from_mapping({"method": "repulsion", "when": "flagged", "threshold": 0}).resolved("sd1")
    reports = [ImageReport() for _ in x]
    found = mitigate(x, delta, flagged, BatchContext("eps"), reports=reports)
    assert delta.rows == [3] and not torch.equal(found.outcome.x, x)


def test_repulsion_leaves_alone_what_has_no_direction() -> None:
    x = noise(2)
    adjusted, before = repulsion.adjust(x, torch.zeros_like, beta=0.5)
    assert torch.equal(adjusted, x) and before.tolist() == [0, 0]
    off = run(x, SmallDelta(), from_mapping({"method": "repulsion", "beta": 0}).resolved("sd1"), BatchContext("eps"))
    assert torch.equal(off.x, x) and off.before is not None


def by_hand(
    x: np.ndarray, delta: SmallDelta, gamma: float, rho: float, target: float, most: int, keep: bool
) -> tuple[np.ndarray, int, float]:
    """One image: the latent of the least ‖Δ‖ seen, steps taken, and that ‖Δ‖."""
    length, best, least = np.linalg.norm(x), x, math.inf
    for step in range(most + 1):
        prediction = delta_of(delta, x)
        value = float(np.linalg.norm(prediction))
        if value <= least:
            best, least = x, value
        if value < target or step == most:
            return best, step, least
        probe = rho * prediction / value
        x = x - gamma * (delta_of(delta, x + probe) - prediction)
        if keep:
            x = x * length / np.linalg.norm(x)
    raise AssertionError


@pytest.mark.parametrize("keep", [False, True])
@given(st.integers(0, 1000), st.floats(0.3, 0.95), st.integers(0, 6))
@settings(max_examples=15, deadline=None)
def test_forward_descent_is_algorithm_1_to_a_target(keep: bool, seed: int, fraction: float, most: int) -> None:
    x, delta = noise(3, seed=seed).double(), SmallDelta(seed=seed).double()
    found = descend_forward(
        x, delta, gamma=0.7, rho=4.0, target=lambda before: fraction * before, max_steps=most, keep_length=keep
    )
    for image in range(3):
        target = fraction * float(np.linalg.norm(delta_of(delta, x[image].numpy())))
        best, steps, least = by_hand(x[image].numpy(), delta, 0.7, 4.0, target, most, keep)
        assert np.allclose(found.best[image].numpy(), best, atol=1e-9)
        assert int(found.steps[image]) == steps
        assert math.isclose(float(found.after[image]), least, rel_tol=1e-9)
        assert bool(found.reached[image]) == (least < target)


def test_an_image_that_is_finished_is_not_evaluated_again() -> None:
    x, delta = noise(3), SmallDelta()
    values = [float(delta(one[None]).detach().norm()) for one in x]
    delta.rows.clear()
    highest = max(values)
    found = descend_forward(x, delta, gamma=0.7, rho=4.0, target=sorted(values)[1] + 1e-6, max_steps=1)
    assert found.steps.tolist() == [int(value == highest) for value in values]
    assert delta.rows == [3, 1, 1]


def test_what_is_not_finite_ends_its_image_alone() -> None:
    x, inner = noise(2), SmallDelta()

    def delta(x: Tensor) -> Tensor:
        out = inner(x).detach()
        out[-1] = float("nan")
        return out

    chosen = from_mapping({"method": "per_sample", "rule": "forward", "max_steps": 3}).resolved("relative")
    found = run(x, delta, chosen, BatchContext("eps"))
    assert list(found.failed) == [1] and torch.equal(found.x[1], x[1])


@pytest.mark.parametrize("rule", ["adamw", "sphere", "forward"])
def test_what_is_zero_already_cannot_fall(rule: str) -> None:
    """Prompt editing may begin with the empty prompt: Δ is 0, and half of it is no target."""
    x = noise(2)

    def delta(x: Tensor) -> Tensor:
        return 0 * x

    given_settings = {"method": "per_sample", "rule": rule, "target": 0.5, "target_kind": "fraction"}
    found = run(x, delta, from_mapping(given_settings).resolved("sd1"), BatchContext("eps"))
    assert torch.equal(found.x, x) and not found.notes
    assert found.steps is not None and found.steps.tolist() == [0, 0]


def test_forward_descent_needs_no_gradient() -> None:
    forward = from_mapping({"method": "per_sample", "rule": "forward"}).resolved("sd1")
    assert not needs_gradient(forward)
    assert needs_gradient(from_mapping({"method": "per_sample"}).resolved("sd1"))
    asked: list[bool] = []

    def delta(x: Tensor) -> Tensor:
        asked.append(torch.is_grad_enabled() or torch.is_inference_mode_enabled())
        return 0.9 * x

    with torch.inference_mode():
        found = run(noise(2), delta, forward, BatchContext("eps"))
    assert asked and found.steps is not None and found.used["rule"] == "forward"


@pytest.mark.parametrize(
    ("given_settings", "sentence"),
    [
        ({"method": "per_sample", "gamma": 0.5}, "gamma = 0.5 is used only where rule is forward, but it is adamw"),
        ({"method": "per_sample", "rule": "forward", "lr": 0.1}, "lr = 0.1 is used only where rule is adamw or sphere"),
        ({"method": "per_sample", "keep_length": True}, "keep_length = true is used only where rule is forward"),
        ({"method": "batch_wise", "beta": 0.3}, "beta = 0.3 belongs to the method repulsion"),
        ({"method": "repulsion", "beta": 2.5}, "from 0 to 2"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(given_settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SettingError, match=sentence):
        from_mapping(given_settings)


def test_a_condition_may_belong_to_one_method() -> None:
    assert is_used("gamma", {"method": "batch_wise"}) and not is_used("gamma", {"method": "per_sample"})
    assert is_used("gamma", {"method": "per_sample", "rule": "forward"})
    assert is_used("lr", {"method": "sail"}) and not is_used("lr", {"method": "per_sample", "rule": "forward"})
    assert json_schema()["properties"]["gamma"]["x-only-with"] == {"per_sample": {"rule": ["forward"]}}
