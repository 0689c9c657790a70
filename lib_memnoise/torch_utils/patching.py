"""Temporary replacements of a module's `forward`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

_NOTHING = object()


class PatchedForward:
    """A function in the place of a module's `forward`, which remembers what was there before."""

    def __init__(self, function: Callable[..., Any], before: Callable[..., Any]) -> None:
        self.function = function
        self.before = before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def original(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The function behind any patches of ours."""
    while isinstance(forward, PatchedForward):
        forward = forward.before
    return forward


@contextlib.contextmanager
def patched_forward(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """A context in which `function` is the module's `forward`. Afterwards the previous one is put back."""
    before = module.__dict__.get("forward", _NOTHING)
    module.__dict__["forward"] = PatchedForward(function, module.forward)
    try:
        yield
    finally:
        if before is _NOTHING:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before


@contextlib.contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """A context in which the module's weights get no gradient."""
    weights = [weight for weight in module.parameters() if weight.requires_grad]
    try:
        for weight in weights:
            weight.requires_grad_(False)
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(True)
