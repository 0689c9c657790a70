"""Functions that stand in for a module's `forward` for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

_NOTHING = object()


@contextlib.contextmanager
def standing_in(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """Within, `function` answers for the module. Whatever stood there before stands there again afterwards."""
    before = module.__dict__.get("forward", _NOTHING)
    module.__dict__["forward"] = function
    try:
        yield
    finally:
        if before is _NOTHING:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before
