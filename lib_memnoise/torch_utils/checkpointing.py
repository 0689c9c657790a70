"""Activation checkpointing over a U-Net's blocks: a gradient in less memory, at the cost of one more evaluation."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from lib_memnoise.torch_utils.patching import patched_forward


def blocks(unet: nn.Module) -> list[nn.Module]:
    """The blocks of an ldm or sgm U-Net, in the order in which they are evaluated."""
    parts = (getattr(unet, name, None) for name in ("input_blocks", "middle_block", "output_blocks"))
    return [
        block for part in parts if part is not None for block in (part if isinstance(part, nn.ModuleList) else [part])
    ]


@contextlib.contextmanager
def checkpointed(unet: nn.Module) -> Iterator[None]:
    """A context in which only the blocks' inputs are kept for the backward pass, which evaluates each block again.

    Args:
        unet: has `input_blocks`, `middle_block` and `output_blocks`; missing ones are skipped. Blocks must not use
            random numbers (evaluation mode). A function that was already patched in as a block's `forward` is called,
            and is put back afterwards.
    """
    with contextlib.ExitStack() as restored:
        for block in blocks(unet):
            restored.enter_context(patched_forward(block, functools.partial(_again, block.forward)))
        yield


def _again(forward: Any, *args: Any, **kwargs: Any) -> Any:
    # Some networks pass their blocks a dict that says where in the network they are, and write into it later.
    kept = [dict(value) if type(value) is dict else value for value in args]
    given = [args]

    def block() -> Any:
        return forward(*(given.pop() if given else kept), **kwargs)

    return checkpoint(block, use_reentrant=False, preserve_rng_state=False)
