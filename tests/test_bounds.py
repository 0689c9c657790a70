"""Every method at the bounds of every setting it has."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lib_memnoise.methods.batch import BatchContext, Outcome
from lib_memnoise.methods.pipeline import run
from lib_memnoise.registry import METHODS
from lib_memnoise.settings import SPECS, condition, from_mapping, is_used, type_of
from tests.networks import noise
from tests.test_methods import Spoken

INITIAL = {
    kind: BatchContext(
        kind, alpha_bar=0.0047, seeds=[3, 4], texts=["a fox", "snow, " * 80], vocabulary=lambda: ["zork", "quux"]
    )
    for kind in ("eps", "v")
}


def values(name: str) -> list[Any]:
    """A setting's bounds, or all that it may be."""
    spec = SPECS[name]
    if spec.choices is not None:
        return list(spec.choices)
    return [False, True] if type_of(name) is bool else [spec.low, spec.high]


def cases() -> list[tuple[str, str, Any]]:
    return [
        (method, name, value)
        for method in METHODS
        for name, spec in SPECS.items()
        if method in spec.methods or (spec.only is not None and spec.only[0] == "guidance")
        for value in values(name)
    ]


def at(method: str, name: str, value: Any) -> dict[str, Any]:
    """Settings that use this one."""
    given: dict[str, Any] = {"method": method, name: value}
    if not is_used(name, given):
        needed = condition(name, given)
        assert needed is not None
        given[needed[0]] = needed[1]
    if is_used("max_steps", given):
        # In reach of a thousand steps, and out of reach of others.
        quick = (
            {"target": 0.97, "target_kind": "fraction"} if value == 1000 and name == "max_steps" else {"max_steps": 8}
        )
        given = {**quick, **given}
    return given


def check(outcome: Outcome, x: Tensor) -> None:
    assert bool(torch.isfinite(outcome.x).all()) and outcome.x.shape == x.shape
    assert not outcome.failed
    for prompt in outcome.prompts.values():
        assert prompt.vectors is None or bool(torch.isfinite(prompt.vectors).all())


@pytest.mark.parametrize(("method", "name", "value"), cases())
def test_bounds_are_usable(method: str, name: str, value: Any) -> None:
    for preset, kind in (("sd1", "eps"), ("sd2_v", "v")):
        x, settings = noise(2, size=4), from_mapping(at(method, name, value)).resolved(preset)
        check(run(x, Spoken(2), settings, INITIAL[kind]), x)


CORNERS: list[dict[str, Any]] = [
    {"gamma": 10, "rho": 1000, "steps": 50},
    {"gamma": 10, "rho": 0.001, "steps": 50},
    {"method": "per_sample", "lr": 1, "target": 0, "max_steps": 100},
    {"method": "per_sample", "rule": "sphere", "lr": 1, "target": 0, "max_steps": 100},
    {"method": "per_sample", "lr": 1, "target": 0, "max_steps": 100, "weight_decay": 1},
    {"method": "prompt_embedding", "lr": 1, "target": 0, "max_steps": 100, "weight_decay": 1},
    {"method": "sail", "lr": 1, "target": 0, "alpha": 10, "redraws": 20, "max_steps": 4},
    {"method": "sail", "max_steps": 0, "redraws": 20},
    {"method": "divin", "eta": 1, "temperature": 10},
    {"method": "divin", "eta": 1, "temperature": 0},
    {"method": "divin", "eta": 0, "temperature": 0},
    {"method": "divin", "eta": 0, "temperature": 10},
]


@pytest.mark.parametrize("given", CORNERS, ids=str)
def test_bounds_together(given: dict[str, Any]) -> None:
    x = noise(2)
    check(run(x, Spoken(2), from_mapping(given).resolved("sd1"), INITIAL["eps"]), x)


def test_divin_without_its_gradient_measures_nothing() -> None:
    x, context = noise(2), INITIAL["eps"]
    found = run(x, Spoken(2), from_mapping({"method": "divin", "temperature": 0}).resolved("sd1"), context)
    expected = 0.95 * x + math.sqrt(0.1) * torch.stack([context.noise(x, image, 0) for image in range(2)])
    torch.testing.assert_close(found.x, expected)
    assert found.before is None and not found.failed


def test_divin_where_nothing_is_left_of_the_picture_is_refused() -> None:
    settings = from_mapping({"method": "divin"}).resolved("sd1")
    with pytest.raises(RuntimeError, match="at which something is left of the picture"):
        run(noise(2), Spoken(2), settings, BatchContext("eps", alpha_bar=0.0, seeds=[1, 2]))
    check(run(noise(2), Spoken(2), settings, BatchContext("v", alpha_bar=0.0, seeds=[1, 2])), noise(2))


class Broken(Spoken):
    """Not finite for the second image, wherever it is asked."""

    def __init__(self, value: float) -> None:
        super().__init__(2)
        self.value = value

    def of(self, x: Tensor, vectors: Tensor) -> Tensor:
        found = super().of(x, vectors)
        return found * self.value if vectors is self.every[-1] or vectors.shape == self.every[-1].shape else found

    def select(self, images: list[int]) -> Spoken:
        part = Broken(self.value)
        part.net, part.every = self.net, [self.every[i] for i in images]
        return part


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("none", "static", "dynamic")])
def test_what_is_not_finite_is_never_sampled(method: str, value: float) -> None:
    """The image is left as it was drawn and heard as it is, and says so; the other is none the worse."""
    x, settings = noise(2), from_mapping({"method": method}).resolved("sd1")
    found = run(x, Broken(value), settings, INITIAL["eps"])
    assert bool(torch.isfinite(found.x).all())
    asks = method not in ("opposite_guidance", "random_tokens", "cross_attention", "padding_fix")
    assert (found.failed == {1: "the network returned values that are not finite"}) == asks
    if asks:
        assert torch.equal(found.x[1], x[1]) and 1 not in found.prompts
    else:
        assert torch.equal(found.x, x)


def test_vectors_that_are_not_finite_are_never_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    from lib_memnoise.methods import prompt_embedding

    real = prompt_embedding.adjust

    def adjust(*args: Any, **kwargs: Any) -> prompt_embedding.Adjusted:
        found = real(*args, **kwargs)
        found.vectors[1][0, 2, 3] = math.nan
        return found

    monkeypatch.setattr(prompt_embedding, "adjust", adjust)
    settings = from_mapping({"method": "prompt_embedding", "target": 0, "max_steps": 2}).resolved("sd1")
    found = run(noise(2), Spoken(2), settings, INITIAL["eps"])
    assert list(found.prompts) == [0] and list(found.failed) == [1]
