"""Checkpointing changes memory, and nothing else."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lib_memnoise.core.delta import magnitude
from lib_memnoise.lab.miniature.architecture import TEXT_WIDTH, make_unet
from lib_memnoise.methods.batch import BatchContext
from lib_memnoise.methods.pipeline import run, run_each
from lib_memnoise.settings import Settings
from lib_memnoise.torch_utils.checkpointing import blocks, checkpointed
from tests.networks import SmallDelta, noise


@pytest.fixture(scope="module")
def unet() -> nn.Module:
    torch.manual_seed(0)
    return make_unet().eval().requires_grad_(False)


def gradient(unet: nn.Module) -> tuple[Tensor, Tensor, int]:
    """‖out‖, its gradient, and how many numbers were kept for it."""
    x = noise(2, 16).requires_grad_()
    context = torch.randn(2, 77, TEXT_WIDTH, generator=torch.Generator().manual_seed(1))
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        value = magnitude(unet(x, torch.full((2,), 981.0), context)).sum()
    (found,) = torch.autograd.grad(value, x)
    return value.detach(), found, sum(kept.values())


def test_same_gradient_with_less_kept(unet: nn.Module) -> None:
    value, plain, kept = gradient(unet)
    with checkpointed(unet):
        again, mode, less = gradient(unet)
    assert torch.equal(value, again) and torch.equal(plain, mode)
    assert less < kept / 3


@pytest.mark.parametrize("fails", [False, True])
def test_blocks_are_as_before(unet: nn.Module, fails: bool) -> None:
    # Another extension's function is in a block's place.
    block = blocks(unet)[1]
    calls = []

    def other(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return type(block).forward(block, *args, **kwargs)

    block.forward = other  # type: ignore[method-assign]
    try:
        with pytest.raises(RuntimeError) if fails else contextlib.nullcontext(), checkpointed(unet):
            gradient(unet)
            if fails:
                raise RuntimeError
        assert len(calls) == 2  # forward, and again in the backward pass
        assert block.__dict__["forward"] is other
        assert not any("forward" in b.__dict__ for b in blocks(unet) if b is not block)
    finally:
        del block.__dict__["forward"]


@pytest.mark.parametrize(
    "settings",
    [
        Settings(enabled=True, preset="custom", gamma=0.5, rho=5.0, steps=2, tau=900.0),
        Settings(enabled=True, method="per_sample", preset="custom", lr=0.02, target=0.8, target_kind="fraction"),
    ],
)
def test_one_image_at_a_time_is_the_same(settings: Settings) -> None:
    x, delta = noise(3), SmallDelta()
    settings = settings.resolved("sd1")
    together, apart = (way(x, delta, settings, BatchContext("eps")) for way in (run, run_each))
    torch.testing.assert_close(together.x, apart.x)
    for name in ("before", "after", "steps", "norm"):
        first, second = getattr(together, name), getattr(apart, name)
        assert (first is None) == (second is None)
        if first is not None:
            torch.testing.assert_close(first, second)
    assert together.used == apart.used and together.notes == apart.notes and together.failed == apart.failed


def test_one_image_at_a_time_tells_images_apart() -> None:
    x, delta = noise(3), SmallDelta()
    x[1] = float("nan")
    settings = Settings(enabled=True, method="per_sample", preset="custom", lr=0.02, target=0.0, max_steps=2)
    together, apart = (way(x, delta, settings.resolved("sd1"), BatchContext("eps")) for way in (run, run_each))
    assert list(together.failed) == list(apart.failed) == [1]
    assert sorted(together.notes) == sorted(apart.notes) == [0, 2]
