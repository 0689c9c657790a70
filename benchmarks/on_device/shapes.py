"""Networks of Stable Diffusion's shapes with random weights that behave as a network's do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lib_memnoise.core.delta import magnitude
from lib_memnoise.lab.miniature import networks

TOKENS = 77
REFERENCE = 16384
"""Numbers of a latent at 512 px."""
DELTA = 2.5
"""‖Δ‖ that the prompts are given at 512 px: in SD 1.4 the paper descends from such values to 0.7 to 1.5."""

SHAPES: dict[str, dict[str, Any]] = {
    "SD 1.4": {
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 320,
        "attention_resolutions": [4, 2, 1],
        "num_res_blocks": 2,
        "channel_mult": [1, 2, 4, 4],
        "num_heads": 8,
        "context_dim": 768,
    },
    # Without the embedding of sizes and pooled text, which is one vector added to the time's.
    "SDXL": {
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 320,
        "attention_resolutions": [4, 2],
        "num_res_blocks": 2,
        "channel_mult": [1, 2, 4],
        "num_heads": -1,
        "num_head_channels": 64,
        "transformer_depth": [1, 2, 10],
        "context_dim": 2048,
    },
    "small": {
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 32,
        "attention_resolutions": [1],
        "num_res_blocks": 1,
        "channel_mult": [1],
        "num_heads": 2,
        "context_dim": 32,
    },
}

AFTER_SILU = 0.3557**-0.5
"""SiLU leaves this part of a standard normal variable's variance (its second moment)."""
BRANCH = 0.5
"""What residual branches end in is so much smaller, so that a sum over many of them stays of the order of one."""


@contextlib.contextmanager
def _uninitialised() -> Iterator[None]:
    """Skip the usual initialisation, all of which is replaced."""
    with contextlib.ExitStack() as stack:
        for kind in (nn.Linear, nn.Conv2d):
            stack.callback(setattr, kind, "reset_parameters", kind.reset_parameters)
            kind.reset_parameters = lambda self: None  # type: ignore[method-assign]
        yield


def _gain(name: str) -> float:
    if name.endswith(("proj_out", "to_out.0", "ff.net.2")):
        return BRANCH
    if name.endswith("out_layers.3"):
        return BRANCH * AFTER_SILU
    return AFTER_SILU if name.endswith(("in_layers.2", "emb_layers.1", "time_embed.2")) or name == "out.2" else 1.0


@torch.no_grad()
def initialise(unet: nn.Module, device: str, seed: int = 0) -> None:
    """Every matrix by its fan-in, so that unit variance in gives about unit variance out, in every layer.

    What comes after a SiLU makes up for what that takes away; residual branches end smaller; biases are zero and norms
    as they are born. Stays within half precision by construction, as trained networks do.
    """
    generator = torch.Generator(device).manual_seed(seed)
    for name, module in unet.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            std = _gain(name) * module.weight[0].numel() ** -0.5
            module.weight.normal_(std=std, generator=generator)
            if module.bias is not None:
                module.bias.zero_()


def make_unet(shape: str, device: str, dtype: torch.dtype) -> nn.Module:
    """The same weights in every precision: those of a checkpoint stored in float16."""
    with _uninitialised(), torch.device(device):
        unet = networks.UNet(**SHAPES[shape])
    initialise(unet, device)
    return unet.eval().requires_grad_(False).half().to(dtype)


@contextlib.contextmanager
def fused_attention() -> Iterator[None]:
    """Within, the networks attend by torch's fused kernel, as hosts do on a GPU, and keep no square matrices."""

    def attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    before = networks.attend
    networks.attend = attend
    try:
        # Always the same kernels, whatever else a version of torch may prefer.
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            yield
    finally:
        networks.attend = before


@dataclass(frozen=True)
class Model:
    """A U-Net as the bench asks it: latents in float32, what is computed of them in the network's precision."""

    unet: nn.Module
    dtype: torch.dtype
    cond: Tensor
    """`(B, 77, width)`."""
    uncond: Tensor

    def __call__(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return self.unet(x.to(self.dtype), t, context.to(self.dtype)).to(x.dtype)

    @property
    def weights(self) -> int:
        """Bytes."""
        return sum(weight.nbytes for weight in self.unet.parameters())


def noise(batch: int, size: int, device: str) -> Tensor:
    """`(B, 4, size, size)`, an image's from its own seed on the CPU."""
    drawn = [torch.randn(4, size, size, generator=torch.Generator().manual_seed(seed)) for seed in range(batch)]
    return torch.stack(drawn).to(device)


@torch.no_grad()
def make_model(shape: str, size: int, batch: int, device: str, dtype: torch.dtype) -> Model:
    """A network with prompts for a batch, as far from the empty one as makes ‖Δ(x_T, T)‖ `DELTA`·√(d/16384).

    The distance is found in the network itself by a few steps of a secant's kind.
    """
    unet = make_unet(shape, device, dtype)
    width = SHAPES[shape]["context_dim"]
    random = torch.Generator().manual_seed(1)
    empty, other = torch.randn(2, batch, TOKENS, width, generator=random).to(device)
    uncond = empty[:1].expand(batch, -1, -1).contiguous()
    x, t = noise(batch, size, device), torch.full((batch,), 981.0, device=device)
    wanted = DELTA * (x[0].numel() / REFERENCE) ** 0.5
    far = torch.full((batch, 1, 1), 0.1, device=device)
    model = Model(unet, dtype, uncond, uncond)
    nothing = model(x, t, uncond)
    for _ in range(4):
        delta = model(x, t, uncond + far * other) - nothing
        far = far * (wanted / magnitude(delta)).clamp(0.1, 10).reshape(-1, 1, 1)
    return Model(unet, dtype, uncond + far * other, uncond)
