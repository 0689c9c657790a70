"""What a host that patches its U-Net is told, row by row."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.hosts.double.host import Double


def modules() -> Iterator[SimpleNamespace]:
    """The backend's modules, which need a host's packages to be imported."""
    with Double(None):
        from lib_memnoise.webui.backends import (
            left_out_rows,
            patcher_calls,
            patcher_guider,
            patcher_hosts,
            unet_patcher,
        )

        yield SimpleNamespace(
            unet_patcher=unet_patcher,
            patcher_calls=patcher_calls,
            patcher_guider=patcher_guider,
            patcher_hosts=patcher_hosts,
            left_out_rows=left_out_rows,
        )


backend = pytest.fixture(scope="module")(modules)


def test_parts_are_paired_as_the_host_pairs_them(backend: SimpleNamespace) -> None:
    """As many parts as the shortest prompt has, each weighted as the last prompt's."""
    parts = [[(0, 1.0), (1, 0.5)], [(2, 0.7)], [(3, 0.9), (4, 0.3)]]
    assert backend.patcher_calls.paired_parts(parts) == [[(0, 0.9)], [(2, 0.9)], [(3, 0.9)]]
    assert backend.patcher_calls.paired_parts(parts[:1]) == parts[:1]


def test_chunks_are_told_by_what_is_in_them(backend: SimpleNamespace) -> None:
    cond = torch.randn(4, 3, 2)
    rows_of_part = [[0, 2], [1, 3]]
    assert backend.patcher_calls.which_part(cond[[1, 3]], cond, rows_of_part) == 1
    # The host repeats a shorter text.
    assert backend.patcher_calls.which_part(cond[[0, 2]].repeat(1, 2, 1), cond, rows_of_part) == 0
    assert backend.patcher_calls.which_part(cond[[0, 3]], cond, rows_of_part) is None


def call(images: int = 2) -> dict[str, Any]:
    """What the network is given for two chunks, unconditional rows first."""
    rows = 2 * images
    return {
        "c_crossattn": torch.arange(rows).reshape(rows, 1, 1).float(),
        "y": torch.arange(rows).reshape(rows, 1) * 10.0,
        "control": {"input": [torch.arange(rows).reshape(rows, 1) * 100.0], "middle": []},
        "transformer_options": {
            "cond_or_uncond": [1, 0],
            "sigmas": torch.full((images,), 14.0),
            "cond_mark": torch.tensor([1.0] * images + [0.0] * images),
            "cond_indices": [2, 3],
            "uncond_indices": [0, 1],
            "uuids": ["a", "b"],
            "patches": {"attn1_patch": [len]},
        },
    }


def test_some_rows_of_a_call(backend: SimpleNamespace) -> None:
    given = call()
    before = copy.deepcopy(given["transformer_options"])
    some = backend.patcher_calls.some_rows(given, [3, 0])
    assert some["c_crossattn"].flatten().tolist() == [3, 0]
    assert some["y"].flatten().tolist() == [30, 0]
    assert some["control"]["input"][0].flatten().tolist() == [300, 0]
    options = some["transformer_options"]
    assert options["cond_or_uncond"] == [0, 1] and options["cond_mark"].tolist() == [0, 1]
    assert (options["cond_indices"], options["uncond_indices"]) == ([0], [1])
    assert options["sigmas"].shape == (1,) and options["uuids"] == ["b", "a"]
    assert options["patches"] is given["transformer_options"]["patches"]
    # The call itself stays as it was, also what the network empties.
    some["control"]["input"].pop()
    assert len(given["control"]["input"]) == 1
    assert {**given["transformer_options"], "sigmas": 0, "cond_mark": 0} == {**before, "sigmas": 0, "cond_mark": 0}
    marked = backend.patcher_calls.some_rows(given, [2, 2], [1, 1])["transformer_options"]
    assert marked["cond_or_uncond"] == [1, 1] and marked["uncond_indices"] == [0, 1]


def test_a_state_leaves_the_gate_out(backend: SimpleNamespace) -> None:
    def inner() -> None: ...

    def gate() -> None: ...

    def patch() -> None: ...

    options: dict[str, Any] = {"transformer_options": {"patches": {"attn1_patch": [patch]}}}
    fingerprint, wrapper = backend.unet_patcher.fingerprint, backend.patcher_calls.WRAPPER
    bare = fingerprint(options)
    gate.memnoise_inner = None  # type: ignore[attr-defined]
    assert fingerprint({**options, wrapper: gate}) == bare
    gate.memnoise_inner = inner  # type: ignore[attr-defined]
    assert fingerprint({**options, wrapper: gate}) == fingerprint({**options, wrapper: inner})
    assert fingerprint({**options, wrapper: inner}) != bare
    assert fingerprint({"transformer_options": {"patches": {"attn1_patch": [gate]}}}) != bare


def test_token_merging_is_left_out_of_gradients_only(backend: SimpleNamespace) -> None:
    def merge() -> None: ...

    def patch() -> None: ...

    merge.__module__ = "backend.misc.tomesd"
    unet = SimpleNamespace(model_options={"transformer_options": {"patches": {"attn1_patch": [merge, patch]}}})
    with torch.no_grad():
        assert backend.unet_patcher.options_of(unet)["transformer_options"]["patches"]["attn1_patch"] == [merge, patch]
    with torch.enable_grad():
        assert backend.unet_patcher.options_of(unet)["transformer_options"]["patches"]["attn1_patch"] == [patch]
    assert unet.model_options["transformer_options"]["patches"]["attn1_patch"] == [merge, patch]


@pytest.mark.parametrize("scale", [7.0, None])
@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.5], [0.3, -0.2]])
def test_the_hosts_combination_is_what_is_wanted(
    backend: SimpleNamespace, scale: float | None, weights: list[float]
) -> None:
    gate = backend.patcher_guider.PatchGuider.__new__(backend.patcher_guider.PatchGuider)
    gate.step = SimpleNamespace(weights=[weights], scale=scale)
    torch.manual_seed(0)
    prompts, unconditional = torch.randn(len(weights), 4, 2, 2), torch.randn(4, 2, 2)

    def combined(rows: list[torch.Tensor]) -> torch.Tensor:
        """As the hosts do: the mean of the parts, then guidance times the sum of their weights."""
        strength = sum(weights)
        mean = sum(weight * row for weight, row in zip(weights, rows)) / strength
        strength = 1.0 if abs(strength - 1) < 1e-9 else strength
        if scale is None:
            return mean * strength
        return unconditional + (mean - unconditional) * scale * strength

    assert torch.allclose(combined(gate.unguided(0, unconditional)), unconditional, atol=1e-5)
    wanted = unconditional - 3 * sum(w * (row - unconditional) for w, row in zip(weights, prompts))
    assert torch.allclose(combined(gate.opposite(0, prompts, unconditional, 3.0)), wanted, atol=1e-4)


@pytest.mark.parametrize("patched", [False, True])
def test_the_u_net_of_a_pass_does_not_keep_what_belongs_to_the_request(backend: SimpleNamespace, patched: bool) -> None:
    def inner(apply_model: Callable[..., Any], args: dict[str, Any]) -> Any:
        return apply_model(2 * args["input"], args["timestep"], **args["c"])

    class Doubling:
        def called(self, apply_model: Callable[..., Any], args: dict[str, Any]) -> Any:
            return 10 * apply_model(args["input"], args["timestep"], **args["c"])

    gate = Doubling()
    wrapper = copy.deepcopy({"options": backend.patcher_guider.weak_wrapper(gate, inner if patched else None)})[
        "options"
    ]
    args = {"input": 3, "timestep": 1, "c": {"more": 5}, "cond_or_uncond": [0]}

    def apply_model(x: int, t: int, more: int) -> int:
        return x + t + more

    assert wrapper(apply_model, args) == 90
    gone = weakref.ref(gate)
    del gate
    assert gone() is None
    assert wrapper(apply_model, args) == (12 if patched else 9)


@pytest.mark.parametrize(
    ("host", "early", "floor", "every", "without"),
    [
        ("Forge", 0.0, 0.0, False, []),
        ("Forge", 0.3, 0.0, False, [0, 1, 2, 3]),
        ("Forge", 0.0, 5.0, False, [7, 9]),
        ("Forge", 0.0, 5.0, True, [6, 7, 8, 9]),
        ("Forge Classic", 0.0, 0.0, False, [0]),
        ("Forge Classic", 0.3, 0.0, False, [0, 1, 2, 3]),
        ("Forge Classic", 0.0, 5.0, False, [0, 6, 7, 8, 9]),
        ("reForge", 0.0, 0.0, False, []),
        ("reForge", 0.3, 0.0, False, [0, 1, 2, 3]),
        ("reForge", 3.0, 0.0, False, list(range(10))),
        ("reForge", 0.0, 5.0, False, [6, 8]),
        ("reForge", 0.0, 5.0, True, [6, 7, 8, 9]),
    ],
)
def test_the_steps_without_unconditional_rows(
    backend: SimpleNamespace, host: str, early: float, floor: float, every: bool, without: list[int]
) -> None:
    """Ten steps with the sigmas 10.5, 9.5 … 1.5, by the rules that the hosts' own denoisers have."""
    hosts = backend.patcher_hosts
    row = next(row for row in hosts.HOSTS if row.host.split(" ")[0 : len(host.split(" "))] == host.split(" "))
    options = SimpleNamespace(skip_early_cond=early, s_min_uncond=floor, s_min_uncond_all=every)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend.left_out_rows.shared, "opts", options)
        steps = [backend.left_out_rows.StepNow(number, 10, 10.5 - number, floor) for number in range(10)]
        assert [step.number for step in steps if row.leaves_out_uncond(step)] == without
