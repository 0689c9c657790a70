"""Cross-attention with a scaled start token and masked padding, for some rows (Ren et al. 2024)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lib_memnoise.torch_utils.patching import patched_forward


@dataclass(frozen=True)
class Attention:
    """How a prompt is attended to."""

    scale: float
    """The factor C of the start token's logit."""
    mask_padding: bool
    """Whether tokens after the end token get no attention."""


@dataclass(frozen=True)
class Row:
    """How one row of the network's batch attends to its prompt."""

    scale: float = 1.0
    """The factor C of the start tokens' logits."""
    starts: tuple[int, ...] = ()
    """The places of the start tokens, one for each chunk of 77 tokens."""
    kept: tuple[int, ...] | None = None
    """The places that get attention; None means all."""


PLAIN = Row()
"""Attention as usual."""


def cross_attentions(unet: nn.Module) -> list[nn.Module]:
    """The modules of an ldm or sgm U-Net in which pictures attend to text."""
    return [
        module
        for name, module in unet.named_modules()
        if name.rsplit(".", 1)[-1] == "attn2" and isinstance(getattr(module, "to_k", None), nn.Module)
    ]


@contextlib.contextmanager
def scaled(unet: nn.Module, rows: Sequence[Row]) -> Iterator[None]:
    """A context in which each row of the network's batch attends to its prompt as the entry of `rows` says.

    A logit is q·k/√d, so multiplying it by C means multiplying k by C, and a token that is left out of the keys gets no
    attention. Both work with any implementation of attention that calls `to_k`: a hook scales the keys, and the
    module's own `forward` receives fewer tokens. Rows with nothing to change are computed as without this, bit for bit.

    Raises:
        RuntimeError: the network has no cross-attention, or was evaluated without it, or with another batch.
    """
    modules = cross_attentions(unet)
    if not modules:
        raise RuntimeError("no cross-attention was found in the network")
    every = [_ScaledAttention(rows, module) for module in modules]
    with contextlib.ExitStack() as restored:
        for module, stand_in in zip(modules, every):
            restored.enter_context(patched_forward(module, stand_in))
            handle = module.to_k.register_forward_hook(stand_in.scale_keys)  # type: ignore[union-attr, operator]
            restored.callback(handle.remove)
        yield
    if not any(stand_in.called for stand_in in every):
        raise RuntimeError("the network was evaluated without its cross-attention, by another implementation of it")


class _ScaledAttention:
    """Replaces the `forward` of one cross-attention module."""

    def __init__(self, rows: Sequence[Row], module: nn.Module) -> None:
        self.rows = rows
        self.inner: Callable[..., Tensor] = module.forward
        self.called = False
        self._rows: list[int] = []
        """The rows of the evaluation under way."""
        self._kept: tuple[int, ...] | None = None

    def __call__(self, x: Tensor, context: Tensor | None = None, **kwargs: Any) -> Tensor:
        if context is None:
            return self.inner(x, **kwargs)
        self.called = True
        if x.shape[0] != len(self.rows) or context.shape[0] != len(self.rows):
            raise RuntimeError("another extension changed the batch inside the network")
        groups: dict[tuple[int, ...], list[int]] = {}
        for row, scale in enumerate(self.rows):
            if scale.kept is not None:
                groups.setdefault(scale.kept, []).append(row)
        masked = [row for group in groups.values() for row in group]
        every = list(range(len(self.rows)))
        out = self._attend(every, None, x, context, kwargs) if len(masked) < len(every) else None
        for kept, group in groups.items():
            part = self._attend(group, kept, x[group], context[group][:, list(kept)], kwargs)
            if out is None:
                out = part.new_empty(len(every), *part.shape[1:])
            out = out.index_copy(0, torch.tensor(group, device=out.device), part)
        assert out is not None
        return out

    def _attend(
        self, rows: list[int], kept: tuple[int, ...] | None, x: Tensor, context: Tensor, kwargs: dict[str, Any]
    ) -> Tensor:
        self._rows, self._kept = rows, kept
        return self.inner(x, context=context, **kwargs)

    def scale_keys(self, module: nn.Module, args: Any, keys: Tensor) -> Tensor | None:
        """Forward hook of `to_k`: K of the start tokens, times C."""
        if keys.shape[0] != len(self._rows) or all(self.rows[row].scale == 1 for row in self._rows):
            return None
        factor = keys.new_ones(keys.shape[0], keys.shape[1], 1)
        for k, row in enumerate(self._rows):
            starts = self.rows[row].starts
            places = starts if self._kept is None else [p for p, place in enumerate(self._kept) if place in starts]
            factor[k, list(places)] = self.rows[row].scale
        return keys * factor
