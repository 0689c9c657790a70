"""Independent float64 implementations of the paper's pseudocode, one image at a time, straight from the page."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Delta = Callable[[Tensor], Tensor]


@torch.no_grad()
def algorithm_1(x: Tensor, delta: Delta, *, gamma: float, rho: float, M: int) -> Tensor:
    """The first loop of Algorithm 1 for one `(C, H, W)` sample."""
    x = x.double()
    for _ in range(M):
        e = delta(x[None])[0]
        d_hat = e * (rho / math.sqrt(float((e * e).sum())))
        x = x - gamma * (delta((x + d_hat)[None])[0] - delta(x[None])[0])
    return x


def figure_7(
    x: Tensor, delta: Delta, *, lr: float, target_loss: float, most: int = 10_000, weight_decay: float = 0.01
) -> tuple[Tensor, int, float, float]:
    """`adj_latent` of Figure 7 for one sample, AdamW written out: latent, steps, first and last loss."""
    x = x.double().clone()
    m, v = torch.zeros_like(x), torch.zeros_like(x)
    first, step = math.nan, 0
    while True:
        leaf = x.clone().requires_grad_()
        loss = delta(leaf[None]).pow(2).sum().sqrt()
        first = loss.item() if step == 0 else first
        if loss.item() < target_loss or step == most:
            return x, step, first, loss.item()
        (g,) = torch.autograd.grad(loss, leaf)
        step += 1
        x = x - lr * weight_decay * x
        m = 0.9 * m + 0.1 * g
        v = 0.999 * v + 0.001 * g * g
        x = x - lr * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)


def adam(
    loss: Callable[[Tensor], Tensor], start: Tensor, *, lr: float, target: float, most: int, decay: float = 0.0
) -> tuple[Tensor, int, float]:
    """Adam (AdamW with a decay) on one image's variable until its loss is below the target: best, steps, its loss."""
    x, m, v = start.double().clone(), 0.0, 0.0
    best, least = x, math.inf
    for step in range(most + 1):
        leaf = x.clone().requires_grad_()
        value = loss(leaf)
        if value.item() <= least:
            best, least = x, value.item()
        if value.item() < target or step == most:
            return best, step, least
        (g,) = torch.autograd.grad(value, leaf)
        x = x * (1 - lr * decay)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        x = x - lr * (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
    raise AssertionError


def attention(q: Tensor, k: Tensor, v: Tensor, *, start: int = 0, c: float = 1.0, heard: int | None = None) -> Tensor:
    """One head of one row: the start token's logit times c, and logits from place `heard` on at minus infinity."""
    logits = q @ k.T / math.sqrt(q.shape[1])
    logits[:, start] *= c
    if heard is not None:
        logits[:, heard:] = -math.inf
    weights = logits.exp() / logits.exp().sum(1, keepdim=True)
    return weights @ v
