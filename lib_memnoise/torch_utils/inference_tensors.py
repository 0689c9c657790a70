"""Ordinary tensors in place of those that were made in inference mode."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def normal_tensors(module: nn.Module) -> Iterator[None]:
    """A context in which a module's weights and buffers are ordinary tensors on the same memory, without gradients.

    A tensor made in inference mode cannot be saved for a backward pass, but an ordinary one that shares its storage
    can. Weights that others replace within the context stay replaced. Weights of a class of their own (quantised ones)
    are not changed.
    """
    replaced: list[tuple[dict[str, Tensor | None], str, Tensor, Tensor]] = []
    try:
        for part in module.modules():
            for tensors, kind in ((part._parameters, nn.Parameter), (part._buffers, Tensor)):
                for name, value in tensors.items():
                    if type(value) is kind and (value.is_inference() or value.requires_grad):
                        stand_in = normal(value)
                        if kind is nn.Parameter:
                            stand_in = nn.Parameter(stand_in, requires_grad=False)
                        tensors[name] = stand_in  # type: ignore[assignment]
                        replaced.append((tensors, name, value, stand_in))  # type: ignore[arg-type]
        yield
    finally:
        for tensors, name, value, stand_in in reversed(replaced):
            if tensors.get(name) is stand_in:
                tensors[name] = value


def normal(value: Tensor) -> Tensor:
    """An ordinary tensor that shares the memory of `value`."""
    with torch.inference_mode(False):
        tensor = torch.empty(0, dtype=value.dtype, device=value.device)
        return tensor.set_(value.untyped_storage(), value.storage_offset(), value.size(), value.stride())  # type: ignore[call-overload,no-any-return]
