"""Activation checkpointing over a U-Net's blocks: less memory for a gradient, for one more forward evaluation."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from lib_memnoise.torch_utils.patching import standing_in


def blocks(unet: nn.Module) -> list[nn.Module]:
    """The blocks of an ldm or sgm U-Net, in the order in which they are evaluated."""
    parts = (getattr(unet, name, None) for name in ("input_blocks", "middle_block", "output_blocks"))
    return [
        block for part in parts if part is not None for block in (part if isinstance(part, nn.ModuleList) else [part])
    ]


@contextlib.contextmanager
def checkpointed(unet: nn.Module) -> Iterator[None]:
    """Within, only the blocks' inputs are kept for the backward pass, in which each block is evaluated again.

    Args:
        unet: has `input_blocks`, `middle_block` and `output_blocks`; those it lacks are passed over. They draw no
            random numbers (evaluation mode). Whatever function stands in for a block's `forward` is called, and
            stands there again afterwards.
    """
    with contextlib.ExitStack() as restored:
        for block in blocks(unet):
            restored.enter_context(standing_in(block, functools.partial(_again, block.forward)))
        yield


def _again(forward: Any, *args: Any, **kwargs: Any) -> Any:
    # Some networks tell their blocks in a dict where in the network they are, and go on to write into it.
    kept = [dict(value) if type(value) is dict else value for value in args]
    given = [args]

    def block() -> Any:
        return forward(*(given.pop() if given else kept), **kwargs)

    return checkpoint(block, use_reentrant=False, preserve_rng_state=False)
