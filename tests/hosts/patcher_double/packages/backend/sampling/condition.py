"""Conditions as the network's evaluation takes them: one entry for each part of the prompts, a row an image."""

from __future__ import annotations

import math
from typing import Any

import torch


class Condition:
    """Rows of something that the network is given."""

    def __init__(self, cond: torch.Tensor) -> None:
        self.cond = cond

    def process_cond(self, batch_size: int, device: Any, **kwargs: Any) -> Condition:
        """As many rows as there are images: repeated, or cut."""
        times = math.ceil(batch_size / len(self.cond))
        rows = self.cond.repeat(times, *[1] * (self.cond.ndim - 1))[:batch_size]
        return type(self)(rows.to(device))

    def can_concat(self, other: Condition) -> bool:
        return self.cond.shape == other.cond.shape

    def concat(self, others: list[Any]) -> torch.Tensor:
        return torch.cat([self.cond, *(other.cond for other in others)])


class ConditionCrossAttn(Condition):
    """A text. Of several lengths, each is repeated up to the smallest common one; at most to four times its length."""

    def can_concat(self, other: Condition) -> bool:
        (rows, length, width), (other_rows, other_length, other_width) = self.cond.shape, other.cond.shape
        alike = (rows, width) == (other_rows, other_width)
        return alike and math.lcm(length, other_length) <= 4 * min(length, other_length)

    def concat(self, others: list[Any]) -> torch.Tensor:
        every = [self.cond, *(other.cond for other in others)]
        longest = math.lcm(*(text.shape[1] for text in every))
        return torch.cat([text.repeat(1, longest // text.shape[1], 1) for text in every])


def compile_conditions(cond: Any) -> list[dict[str, Any]] | None:
    if cond is None:
        return None
    if isinstance(cond, torch.Tensor):
        return [{"cross_attn": cond, "model_conds": {"c_crossattn": ConditionCrossAttn(cond)}}]
    text, vector = cond["crossattn"], cond["vector"]
    given = {"c_crossattn": ConditionCrossAttn(text), "y": Condition(vector)}
    return [{"cross_attn": text, "pooled_output": vector, "model_conds": given}]


def compile_weighted_conditions(cond: Any, weights: list[list[tuple[int, float]]]) -> list[dict[str, Any]]:
    """The k-th parts of all images together, as many as the shortest prompt has, weighted as the last image's."""
    compiled = []
    for parts in zip(*weights):
        rows = [row for row, _ in parts]
        own = cond.advanced_indexing(rows) if hasattr(cond, "advanced_indexing") else cond[rows]
        (entry,) = compile_conditions(own) or []
        compiled.append({**entry, "strength": parts[-1][1]})
    return compiled
