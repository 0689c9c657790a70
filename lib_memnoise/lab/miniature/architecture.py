"""Sizes of the miniature's networks, as the WebUI's YAML files name them, and SD's noise schedule."""

from __future__ import annotations

from typing import Any

from lib_memnoise.lab.miniature.networks import Autoencoder, TextEncoder, UNet
from lib_memnoise.lab.miniature.text import LENGTH

LATENT = 16
"""Width and height of a latent."""
SHAPE = (4, LATENT, LATENT)
"""Of one latent."""
SNR_SCALE = 4.0
"""Standard deviation of the latents that the U-Net sees.

A picture's signal-to-noise ratio grows with its number of latent values; SD's 64×64 has 16 times as many. Four times
the amplitude restores, at every timestep, the ratio of SD at 512 px, so that the paper's γ̃ and τ mean the same.
"""
TEXT_WIDTH = 64

UNET: dict[str, Any] = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 64,
    "attention_resolutions": [2, 4],
    "num_res_blocks": 1,
    "channel_mult": [1, 2, 2],
    "num_heads": 4,
    "use_spatial_transformer": True,
    "transformer_depth": 1,
    "context_dim": TEXT_WIDTH,
    "use_checkpoint": False,
    "legacy": False,
}
AUTOENCODER: dict[str, Any] = {
    "embed_dim": 4,
    "ddconfig": {
        "double_z": True,
        "z_channels": 4,
        "resolution": 128,
        "in_channels": 3,
        "out_ch": 3,
        # ldm's normalisation has 32 groups. With a channel to a group it takes every channel's mean away, and with
        # it the picture's colours, which then hide in a corner of the latent.
        "ch": 64,
        "ch_mult": [1, 1, 1, 1],
        "num_res_blocks": 0,
        "attn_resolutions": [],
        "dropout": 0.0,
    },
}
TEXT: dict[str, Any] = {
    "max_position_embeddings": LENGTH,
    "hidden_size": TEXT_WIDTH,
    "intermediate_size": 4 * TEXT_WIDTH,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
LINEAR_START, LINEAR_END = 0.00085, 0.012


def make_unet() -> UNet:
    return UNet(**UNET)


def make_autoencoder() -> Autoencoder:
    return Autoencoder(**AUTOENCODER)


def make_text_encoder(tokens: int) -> TextEncoder:
    return TextEncoder(vocab_size=tokens, **TEXT)
