"""Cross-attention that scales the start token and masks the padding, for some rows (Ren et al. 2024)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lib_memnoise.torch_utils.patching import standing_in


@dataclass(frozen=True)
class Attention:
    """What is asked for of a prompt."""

    scale: float
    """C, by which the start token's logit is multiplied."""
    mask_padding: bool
    """Tokens after the end token get no attention."""


@dataclass(frozen=True)
class Row:
    """What that means for one row of the network's batch."""

    scale: float = 1.0
    starts: tuple[int, ...] = ()
    """Places of start tokens: one for each chunk of 77 tokens."""
    kept: tuple[int, ...] | None = None
    """The places that get attention; None: all."""


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
    """Within, the network's evaluations of this batch attend as `rows` say; one entry for each row of the batch.

    A logit is q·k/√d, so multiplying it by C is multiplying k by C, and a token that is left out of the keys gets no
    attention: both hold whatever function computes attention, since it calls `to_k`, and the module's own `forward`
    is given fewer tokens. Rows with nothing to change are computed as they would be, to the bit.

    Raises:
        RuntimeError: no cross-attention is found, or, when the network is evaluated, its batch is another.
    """
    modules = cross_attentions(unet)
    if not modules:
        raise RuntimeError("no cross-attention was found in the network")
    every = [_Heard(rows, module) for module in modules]
    with contextlib.ExitStack() as restored:
        for module, stand_in in zip(modules, every):
            restored.enter_context(standing_in(module, stand_in))
            handle = module.to_k.register_forward_hook(stand_in.scale_keys)  # type: ignore[union-attr, operator]
            restored.callback(handle.remove)
        yield
    if not any(stand_in.called for stand_in in every):
        raise RuntimeError("the network was evaluated without its cross-attention, by another implementation of it")


class _Heard:
    """Stands for one cross-attention module's `forward`."""

    def __init__(self, rows: Sequence[Row], module: nn.Module) -> None:
        self.rows = rows
        self.inner: Callable[..., Tensor] = module.forward
        self.called = False
        self._asked: list[int] = []
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
        out = self._ask(every, None, x, context, kwargs) if len(masked) < len(every) else None
        for kept, group in groups.items():
            part = self._ask(group, kept, x[group], context[group][:, list(kept)], kwargs)
            if out is None:
                out = part.new_empty(len(every), *part.shape[1:])
            out = out.index_copy(0, torch.tensor(group, device=out.device), part)
        assert out is not None
        return out

    def _ask(
        self, rows: list[int], kept: tuple[int, ...] | None, x: Tensor, context: Tensor, kwargs: dict[str, Any]
    ) -> Tensor:
        self._asked, self._kept = rows, kept
        return self.inner(x, context=context, **kwargs)

    def scale_keys(self, module: nn.Module, args: Any, keys: Tensor) -> Tensor | None:
        """Forward hook of `to_k`: K of the start tokens, times C."""
        if keys.shape[0] != len(self._asked) or all(self.rows[row].scale == 1 for row in self._asked):
            return None
        factor = keys.new_ones(keys.shape[0], keys.shape[1], 1)
        for k, row in enumerate(self._asked):
            starts = self.rows[row].starts
            places = starts if self._kept is None else [p for p, place in enumerate(self._kept) if place in starts]
            factor[k, list(places)] = self.rows[row].scale
        return keys * factor
