"""`x += y` as `x = x + y`, for networks that are written for inference."""

from __future__ import annotations

import contextlib
import dis
import functools
import operator
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lib_memnoise.torch_utils.checkpointing import blocks
from lib_memnoise.torch_utils.patching import standing_in

OPERATORS: dict[str, tuple[str, Callable[[Any, Any], Any]]] = {
    "add_": ("+=", operator.add),
    "sub_": ("-=", operator.sub),
    "mul_": ("*=", operator.mul),
    "div_": ("/=", operator.truediv),
}
"""By the function that torch calls for each."""
OPCODES = {"INPLACE_ADD": "+=", "INPLACE_SUBTRACT": "-=", "INPLACE_MULTIPLY": "*=", "INPLACE_TRUE_DIVIDE": "/="}
"""Of Python 3.10; later ones have one for all."""


def augmented(frame: FrameType) -> str | None:
    """The augmented assignment that a frame is at, such as "+="; None: it is at something else."""
    code, at = frame.f_code.co_code, frame.f_lasti
    name = dis.opname[code[at]]
    if name == "BINARY_OP":
        return str(dis._nb_ops[code[at + 1]][1])  # type: ignore[attr-defined]
    return OPCODES.get(name)


class OutOfPlace(TorchFunctionMode):
    """Within, augmented assignments make new tensors, so that those saved for a backward pass stay as they are.

    The statement binds its result, which is all that it promises; the values are the same, to the bit. A method such as
    `x.add_(y)` changes x as ever.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        sign, made = OPERATORS.get(getattr(func, "__name__", ""), ("", None))
        if made is not None and isinstance(args[0], Tensor) and augmented(sys._getframe(1)) == sign:
            result = made(*args)
            # A tensor that is changed in place keeps its type and its shape.
            if result.dtype == args[0].dtype and result.shape == args[0].shape:
                return result
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def out_of_place(unet: nn.Module) -> Iterator[None]:
    """Within, an ldm or sgm U-Net is evaluated with `OutOfPlace`, and nothing else is.

    So are its blocks, each by itself, which a backward pass may evaluate again, in a thread of its own.
    """
    with contextlib.ExitStack() as restored:
        for part in (unet, *blocks(unet)):
            restored.enter_context(standing_in(part, functools.partial(_within, part.forward)))
        yield


def _within(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with OutOfPlace():
        return forward(*args, **kwargs)
