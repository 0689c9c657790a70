"""Stable Diffusion 1's three networks at any width, with the names its checkpoints use.

Written for small sizes on a CPU: no options but those the miniature needs. The modules take the parameters of the
WebUI's YAML files by the same names, so one file configures both. Shapes: pictures `(B, 3, 8H, 8W)` in −1…1,
latents `(B, 4, H, W)`, text `(B, 77, width)`, timesteps `(B,)`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUPS = 32
"""Of every group normalisation in SD."""


def attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> Tensor:
    """Attention `(B, heads, N, width)`, spelled out: on a CPU torch's fused kernel is slow in the backward pass."""
    weights = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if causal:
        later = torch.ones(weights.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        weights = weights.masked_fill(later, -torch.inf)
    return weights.softmax(-1).to(v.dtype) @ v


def timestep_embedding(t: Tensor, width: int) -> Tensor:
    """Sinusoidal embedding `(B, width)` of timesteps `(B,)`: cosines, then sines."""
    half = width // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=t.device) / half)
    angles = t[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class ResBlock(nn.Module):
    """Two convolutions around the time embedding, and a shortcut."""

    def __init__(self, inner: int, time_width: int, outer: int):
        super().__init__()
        self.in_layers = nn.Sequential(nn.GroupNorm(GROUPS, inner), nn.SiLU(), nn.Conv2d(inner, outer, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time_width, outer))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(GROUPS, outer), nn.SiLU(), nn.Identity(), nn.Conv2d(outer, outer, 3, padding=1)
        )
        self.skip_connection = nn.Conv2d(inner, outer, 1) if inner != outer else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.in_layers(x) + self.emb_layers(time)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class Attention(nn.Module):
    """Multi-head attention of x `(B, N, width)` to a context `(B, M, context_width)`, or to itself."""

    def __init__(self, width: int, context_width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_width, width, bias=False)
        self.to_v = nn.Linear(context_width, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q, k, v = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for part in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        return self.to_out(attend(q, k, v).transpose(1, 2).flatten(2))


class GEGLU(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.net = nn.Sequential(GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Attention to itself, to the text, and a feed-forward layer."""

    def __init__(self, width: int, context_width: int, heads: int):
        super().__init__()
        self.attn1 = Attention(width, width, heads)
        self.ff = FeedForward(width)
        self.attn2 = Attention(width, context_width, heads)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the positions of a feature map."""

    def __init__(self, width: int, context_width: int, heads: int, depth: int = 1):
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, width, eps=1e-6)
        self.proj_in = nn.Conv2d(width, width, 1)
        blocks = (TransformerBlock(width, context_width, heads) for _ in range(depth))
        self.transformer_blocks = nn.ModuleList(blocks)
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h = self.proj_in(self.norm(x))
        tokens = h.flatten(2).transpose(1, 2)
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        return x + self.proj_out(tokens.transpose(1, 2).unflatten(2, x.shape[2:]))


class Downsample(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.op = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Stage(nn.Sequential):
    """Layers in order, each given what it takes: the time embedding, the text, or neither."""

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:  # type: ignore[override]
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, time)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            else:
                x = layer(x)
        return x


class UNet(nn.Module):
    """ldm's `UNetModel`: `unet(x, t, context)` gives ε or v in the shape of x."""

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int,
        model_channels: int,
        attention_resolutions: Sequence[int],
        num_res_blocks: int,
        channel_mult: Sequence[int],
        num_heads: int,
        context_dim: int,
        num_head_channels: int = -1,
        transformer_depth: int | Sequence[int] = 1,
        **_: Any,
    ):
        """`num_head_channels`, unless -1, takes the place of `num_heads`; a depth for every level, or one for all."""
        super().__init__()
        depths = [transformer_depth] * len(channel_mult) if isinstance(transformer_depth, int) else transformer_depth
        self.model_channels = model_channels
        time_width = 4 * model_channels
        self.time_embed = nn.Sequential(
            nn.Linear(model_channels, time_width), nn.SiLU(), nn.Linear(time_width, time_width)
        )

        def transformer(width: int, level: int) -> SpatialTransformer:
            heads = num_heads if num_head_channels == -1 else width // num_head_channels
            return SpatialTransformer(width, context_dim, heads, depths[level])

        width, down = model_channels, 1
        stages = [Stage(nn.Conv2d(in_channels, width, 3, padding=1))]
        skips = [width]
        for level, multiple in enumerate(channel_mult):
            for _block in range(num_res_blocks):
                layers: list[nn.Module] = [ResBlock(width, time_width, multiple * model_channels)]
                width = multiple * model_channels
                if down in attention_resolutions:
                    layers.append(transformer(width, level))
                stages.append(Stage(*layers))
                skips.append(width)
            if level < len(channel_mult) - 1:
                stages.append(Stage(Downsample(width)))
                skips.append(width)
                down *= 2
        self.input_blocks = nn.ModuleList(stages)
        self.middle_block = Stage(
            ResBlock(width, time_width, width), transformer(width, -1), ResBlock(width, time_width, width)
        )
        stages = []
        for level, multiple in reversed(list(enumerate(channel_mult))):
            for block in range(num_res_blocks + 1):
                layers = [ResBlock(width + skips.pop(), time_width, multiple * model_channels)]
                width = multiple * model_channels
                if down in attention_resolutions:
                    layers.append(transformer(width, level))
                if level and block == num_res_blocks:
                    layers.append(Upsample(width))
                    down //= 2
                stages.append(Stage(*layers))
        self.output_blocks = nn.ModuleList(stages)
        self.out = nn.Sequential(nn.GroupNorm(GROUPS, width), nn.SiLU(), nn.Conv2d(width, out_channels, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        time = self.time_embed(timestep_embedding(t, self.model_channels).to(x.dtype))
        skips = []
        for stage in self.input_blocks:
            x = stage(x, time, context)
            skips.append(x)
        x = self.middle_block(x, time, context)
        for stage in self.output_blocks:
            x = stage(torch.cat([x, skips.pop()], dim=1), time, context)
        return self.out(x)


class AutoencoderBlock(nn.Module):
    def __init__(self, inner: int, outer: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(GROUPS, inner, eps=1e-6)
        self.conv1 = nn.Conv2d(inner, outer, 3, padding=1)
        self.norm2 = nn.GroupNorm(GROUPS, outer, eps=1e-6)
        self.conv2 = nn.Conv2d(outer, outer, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(inner, outer, 1) if inner != outer else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class AutoencoderAttention(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, width, eps=1e-6)
        self.q, self.k, self.v = (nn.Conv2d(width, width, 1) for _ in range(3))
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (part(h).flatten(2).transpose(1, 2)[:, None] for part in (self.q, self.k, self.v))
        attended = attend(q, k, v)[:, 0]
        return x + self.proj_out(attended.transpose(1, 2).unflatten(2, x.shape[2:]))


class Middle(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.block_1 = AutoencoderBlock(width, width)
        self.attn_1 = AutoencoderAttention(width)
        self.block_2 = AutoencoderBlock(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class DownsampleInside(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # the autoencoder pads on one side only


class Level(nn.Module):
    """The blocks of one resolution, with what changes it."""

    def __init__(self, blocks: list[AutoencoderBlock]):
        super().__init__()
        self.block = nn.ModuleList(blocks)
        self.downsample: nn.Module = nn.Identity()
        self.upsample: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return self.upsample(self.downsample(x))


class Encoder(nn.Module):
    def __init__(self, *, in_channels: int, ch: int, ch_mult: Sequence[int], num_res_blocks: int, z_channels: int):
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1)
        width, levels = ch, []
        for multiple in ch_mult:
            blocks = []
            for _ in range(num_res_blocks):
                blocks.append(AutoencoderBlock(width, multiple * ch))
                width = multiple * ch
            levels.append(Level(blocks))
            levels[-1].downsample = DownsampleInside(width)
        levels[-1].downsample = nn.Identity()
        self.down = nn.ModuleList(levels)
        self.mid = Middle(width)
        self.norm_out = nn.GroupNorm(GROUPS, width, eps=1e-6)
        self.conv_out = nn.Conv2d(width, 2 * z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    def __init__(self, *, out_ch: int, ch: int, ch_mult: Sequence[int], num_res_blocks: int, z_channels: int):
        super().__init__()
        width = ch * ch_mult[-1]
        self.conv_in = nn.Conv2d(z_channels, width, 3, padding=1)
        self.mid = Middle(width)
        levels = []
        for multiple in reversed(ch_mult):
            blocks = []
            for _ in range(num_res_blocks + 1):
                blocks.append(AutoencoderBlock(width, multiple * ch))
                width = multiple * ch
            levels.append(Level(blocks))
            levels[-1].upsample = Upsample(width)
        levels[-1].upsample = nn.Identity()
        self.up = nn.ModuleList(reversed(levels))  # numbered from the finest
        self.norm_out = nn.GroupNorm(GROUPS, width, eps=1e-6)
        self.conv_out = nn.Conv2d(width, out_ch, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Autoencoder(nn.Module):
    """ldm's `AutoencoderKL`. Its latents are *before* the checkpoint's scale factor."""

    def __init__(self, *, embed_dim: int, ddconfig: dict[str, Any], **_: Any):
        super().__init__()
        shared = {key: ddconfig[key] for key in ("ch", "ch_mult", "num_res_blocks", "z_channels")}
        self.encoder = Encoder(in_channels=ddconfig["in_channels"], **shared)
        self.decoder = Decoder(out_ch=ddconfig["out_ch"], **shared)
        self.quant_conv = nn.Conv2d(2 * ddconfig["z_channels"], 2 * embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, ddconfig["z_channels"], 1)

    def encode(self, picture: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the latent, `(B, 4, H, W)` each."""
        mean, log_variance = self.quant_conv(self.encoder(picture)).chunk(2, dim=1)
        return mean, log_variance.clamp(-30, 20)

    def decode(self, latent: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(latent))


class CLIPAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended = attend(q, k, v, causal=True)
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class CLIPFeedForward(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x)
        return self.fc2(h * torch.sigmoid(1.702 * h))  # CLIP's "quick" GELU


class CLIPLayer(nn.Module):
    def __init__(self, width: int, inner: int, heads: int):
        super().__init__()
        self.self_attn = CLIPAttention(width, heads)
        self.layer_norm1 = nn.LayerNorm(width)
        self.mlp = CLIPFeedForward(width, inner)
        self.layer_norm2 = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class CLIPEmbeddings(nn.Module):
    def __init__(self, tokens: int, positions: int, width: int):
        super().__init__()
        self.token_embedding = nn.Embedding(tokens, width)
        self.position_embedding = nn.Embedding(positions, width)

    def forward(self, ids: Tensor) -> Tensor:
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]


class CLIPEncoder(nn.Module):
    def __init__(self, layers: list[CLIPLayer]):
        super().__init__()
        self.layers = nn.ModuleList(layers)


class TextEncoder(nn.Module):
    """transformers' `CLIPTextModel.text_model`: `text(ids)` gives the last hidden state `(B, 77, width)`."""

    def __init__(
        self,
        *,
        vocab_size: int,
        max_position_embeddings: int,
        hidden_size: int,
        intermediate_size: int,
        num_hidden_layers: int,
        num_attention_heads: int,
        **_: Any,
    ):
        super().__init__()
        self.embeddings = CLIPEmbeddings(vocab_size, max_position_embeddings, hidden_size)
        layers = [CLIPLayer(hidden_size, intermediate_size, num_attention_heads) for _ in range(num_hidden_layers)]
        self.encoder = CLIPEncoder(layers)
        self.final_layer_norm = nn.LayerNorm(hidden_size)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embeddings(ids)
        for layer in self.encoder.layers:
            x = layer(x)
        return cast(Tensor, self.final_layer_norm(x))
