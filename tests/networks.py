"""Small nonlinear networks for tests."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SmallDelta(nn.Module):
    """Δ(x) = f(x, y) − f(x, y_null) of a random smooth network; nonlinear in x, and different between prompts."""

    def __init__(self, channels: int = 4, width: int = 8, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.second = nn.Conv2d(width, channels, 3, padding=1)
        self.prompt = nn.Parameter(torch.empty(width))
        for weight in self.parameters():
            with torch.no_grad():
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
        self.to(dtype)
        self.rows: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.rows.append(x.shape[0])
        x = x.to(self.first.weight.dtype)
        hidden = self.first(x)
        cond = self.second(torch.tanh(hidden + self.prompt.reshape(1, -1, 1, 1)))
        return cond - self.second(torch.tanh(hidden))


def noise(batch: int, size: int = 8, seed: int = 0) -> Tensor:
    """Each image from a seed of its own, so that an image is the same in any batch."""
    return torch.stack(
        [torch.randn(4, size, size, generator=torch.Generator().manual_seed(seed + i)) for i in range(batch)]
    )
