"""Small networks with Stable Diffusion's structure and names; random, but fixed and well behaved.

The U-Net computes h(x, t, context) and returns it as the best prediction for unit Gaussian data, disturbed by h:
x0 = α·x + σ·h, hence ε = σ·x − α·h and v = −h. Guidance differences of ε therefore shrink with α towards t = 999,
as those of trained networks do, and one h gives equivalent ε and v models.

h is Wᵀ·sin(W·x + phase), where the phase comes from text and time, and little from x: the Jacobian of a guidance
difference is nearly symmetric, as that of a score is, and a difference can be lowered by moving x.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

CHANNELS = 32


def stable_diffusion_alphas_cumprod() -> torch.Tensor:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1.0 - betas, dim=0).float()


class Attention(nn.Module):
    """Multi-head attention with the parameter names of SD's CrossAttention."""

    def __init__(self, width: int, context: int | None = None, heads: int = 4, sharpness: float = 1.0) -> None:
        super().__init__()
        self.heads = heads
        self.scale = sharpness * (width // heads) ** -0.5
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context or width, width, bias=False)
        self.to_v = nn.Linear(context or width, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width), nn.Dropout(0.0))

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None, mask: Any = None) -> torch.Tensor:
        context = x if context is None else context

        def split(y: torch.Tensor) -> torch.Tensor:
            return y.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        q, k, v = split(self.to_q(x)), split(self.to_k(context)), split(self.to_v(context))
        out = nn.functional.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return self.to_out(out.transpose(1, 2).flatten(2))


class BasicTransformerBlock(nn.Module):
    def __init__(self, width: int, context: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.attn1 = Attention(width)
        self.attn2 = Attention(width, context, sharpness=3.0)
        self.ff = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + 4.0 * self.attn2(self.norm2(x), context=context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    def __init__(self, width: int, context: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, width)
        self.transformer_blocks = nn.ModuleList([BasicTransformerBlock(width, context)])

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
        y = self.norm(x).flatten(2).transpose(1, 2)
        for block in self.transformer_blocks:
            y = block(y, context=context, **options)
        return x + y.transpose(1, 2).unflatten(2, x.shape[2:])


class ResBlock(nn.Module):
    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(nn.GroupNorm(8, inputs), nn.SiLU(), nn.Conv2d(inputs, width, 3, padding=1))
        self.emb_layers = nn.Linear(width, width)
        self.skip_connection = nn.Conv2d(inputs, width, 1) if inputs != width else nn.Identity()

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        return self.skip_connection(x) + self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]


class UNetModel(nn.Module):
    """`forward(x, timesteps, context, y)` gives the native output: `eps`, `v` or `flow`."""

    def __init__(
        self,
        native: str = "eps",
        in_channels: int = 4,
        out_channels: int = 4,
        context: int = 32,
        vector: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.native = native
        self.out_channels = out_channels
        self.dtype = torch.float32
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.time_embed = nn.Sequential(nn.Linear(CHANNELS, CHANNELS), nn.SiLU(), nn.Linear(CHANNELS, CHANNELS))
            self.label_emb = nn.Linear(vector, CHANNELS) if vector else None
            self.input_blocks = nn.ModuleList(
                [
                    nn.Conv2d(in_channels, CHANNELS, 3, padding=1),
                    nn.Conv2d(CHANNELS, CHANNELS, 3, 2, 1),
                ]
            )
            self.middle_block = nn.ModuleList(
                [
                    ResBlock(CHANNELS, CHANNELS),
                    SpatialTransformer(CHANNELS, context),
                    ResBlock(CHANNELS, CHANNELS),
                ]
            )
            self.out = nn.Conv2d(CHANNELS, CHANNELS, 1)
        self.register_buffer("gain", torch.ones(()))
        self.register_buffer("alphas_cumprod", stable_diffusion_alphas_cumprod())

    def disturbance(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        context: torch.Tensor,
        y: torch.Tensor | None = None,
        **options: Any,
    ) -> torch.Tensor:
        frequencies = torch.exp(-math.log(10000.0) * torch.arange(CHANNELS // 2, device=x.device) / (CHANNELS // 2))
        angles = timesteps.float()[:, None] * frequencies
        emb = self.time_embed(torch.cat([angles.cos(), angles.sin()], dim=-1))
        if self.label_emb is not None:
            emb = emb + self.label_emb(y)
        features = self.input_blocks[0](x)
        h = self.input_blocks[1](0.3 * features)
        h = self.middle_block[0](h, emb)
        h = self.middle_block[1](h, context=context, **options)
        h = self.middle_block[2](h, emb)
        phase = nn.functional.interpolate(self.out(h), size=features.shape[2:], mode="nearest")
        weight = self.input_blocks[0].weight[:, : self.out_channels]
        return self.gain * nn.functional.conv_transpose2d(torch.sin(2.5 * features + 2.0 * phase), weight, padding=1)

    def forward(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        context: torch.Tensor,
        y: torch.Tensor | None = None,
        **options: Any,
    ) -> torch.Tensor:
        h = self.disturbance(x, timesteps, context, y, **options)
        if self.native == "v":
            return -h
        latent = x[:, : self.out_channels]
        if self.native == "flow":
            t = (timesteps.float() / 1000)[:, None, None, None]
            return (latent * (2 * t - 1) - h) / (t**2 + (1 - t) ** 2)
        t = timesteps.float().clamp(0, 999)
        low, part = t.floor().long(), t - t.floor()
        bar = torch.lerp(self.alphas_cumprod[low], self.alphas_cumprod[(low + 1).clamp(max=999)], part)
        bar = bar[:, None, None, None]
        return (1 - bar).sqrt() * latent - bar.sqrt() * h

    @torch.no_grad()
    def calibrate(self, cond: torch.Tensor, uncond: torch.Tensor, y: torch.Tensor | None = None) -> None:
        """Make the prompt matter: a typical difference of 0.3 between these two conditions."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(4, self.input_blocks[0].in_channels, 8, 8, generator=generator)
        t = torch.tensor([999.0, 700.0, 400.0, 100.0])
        ys = None if y is None else y.expand(4, -1)
        a = self.disturbance(x, t, cond.expand(4, -1, -1), ys)
        b = self.disturbance(x, t, uncond.expand(4, -1, -1), ys)
        self.gain.copy_(0.3 / (a - b).std())


class DiffusionWrapper(nn.Module):
    """Hands the conditions to the U-Net, as the model's `conditioning_key` says."""

    def __init__(self, diffusion_model: UNetModel, conditioning_key: str) -> None:
        super().__init__()
        self.diffusion_model = diffusion_model
        self.conditioning_key = conditioning_key

    def forward(
        self, x: torch.Tensor, t: torch.Tensor, c_concat: Sequence | None = None, c_crossattn: Sequence | None = None
    ) -> torch.Tensor:
        if self.conditioning_key == "hybrid":
            x = torch.cat([x, *(c_concat or [])], dim=1)
        return self.diffusion_model(x, t, context=torch.cat(list(c_crossattn or []), dim=1))


class Autoencoder(nn.Module):
    """A linear picture of the latent, eight times enlarged; the encoder inverts it as well as it can."""

    def __init__(self, channels: int, seed: int = 7) -> None:
        super().__init__()
        self.dtype = torch.float32
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(0.35 * torch.randn(3, channels, generator=generator))

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        image = torch.einsum("oc,bchw->bohw", self.weight, z)
        return nn.functional.interpolate(image, scale_factor=8, mode="nearest")

    def encode(self, image: torch.Tensor) -> torch.Tensor:
        small = nn.functional.avg_pool2d(image, 8)
        return torch.einsum("co,bohw->bchw", torch.linalg.pinv(self.weight), small)


class DiffusionModel(nn.Module):
    """What the host knows as `shared.sd_model`."""

    is_sd1 = is_sd2 = is_sdxl = is_ssd = is_sd3 = is_sdxl_inpaint = False
    lowvram = False
    latent_channels = 4
    parameterization = "eps"
    cond_stage_key = "txt"
    sd_checkpoint_info: Any
    sd_model_hash: str
    sd_model_checkpoint: str
    cond_stage_model_empty_prompt: torch.Tensor

    def __init__(self, unet: UNetModel, encoder: nn.Module, conditioning_key: str = "crossattn") -> None:
        super().__init__()
        self.model = DiffusionWrapper(unet, conditioning_key)
        self.cond_stage_model = encoder
        self.first_stage_model = Autoencoder(self.latent_channels)
        self.register_buffer("alphas_cumprod_original", stable_diffusion_alphas_cumprod())
        self.alphas_cumprod = self.alphas_cumprod_original

    @property
    def device(self) -> torch.device:
        return self.alphas_cumprod_original.device

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def ema_scope(self, context: Any = None) -> Any:
        return contextlib.nullcontext()

    def get_learned_conditioning(self, c: Any) -> Any:
        return self.cond_stage_model(c)

    def apply_model(self, x_noisy: torch.Tensor, t: torch.Tensor, cond: Any) -> torch.Tensor:
        if not isinstance(cond, dict):
            cond = {"c_crossattn": cond if isinstance(cond, list) else [cond]}
        return self.model(x_noisy, t, c_concat=cond.get("c_concat"), c_crossattn=cond["c_crossattn"])

    def decode_first_stage(self, z: torch.Tensor) -> torch.Tensor:
        return self.first_stage_model.decode(z)

    def encode_first_stage(self, x: torch.Tensor) -> torch.Tensor:
        return self.first_stage_model.encode(x)

    def get_first_stage_encoding(self, encoder_posterior: torch.Tensor) -> torch.Tensor:
        return encoder_posterior


class SdxlModel(DiffusionModel):
    is_sdxl = True

    def __init__(self, unet: UNetModel, encoder: nn.Module) -> None:
        super().__init__(unet, encoder)
        self.conditioner = encoder

    def get_learned_conditioning(self, c: Any) -> Any:
        negative = getattr(c, "is_negative_prompt", False)
        return self.conditioner(c, force_zero_text=negative and all(text == "" for text in c))

    def apply_model(self, x_noisy: torch.Tensor, t: torch.Tensor, cond: Any) -> torch.Tensor:
        return self.model.diffusion_model(x_noisy, t, context=cond["crossattn"], y=cond["vector"])


class Sd3Model(DiffusionModel):
    """A flow model: x_t = (1 − σ)·x0 + σ·noise, σ from 0 to 1."""

    is_sd3 = True
    latent_channels = 16
    shift = 3.0

    def __init__(self, unet: UNetModel, encoder: nn.Module) -> None:
        super().__init__(unet, encoder)
        t = torch.arange(1, 1001) / 1000
        self.register_buffer("flow_sigmas", self.shift * t / (1 + (self.shift - 1) * t))
        del self.alphas_cumprod_original
        self.alphas_cumprod = 1 / (self.flow_sigmas**2 + 1)

    @property
    def device(self) -> torch.device:
        return self.flow_sigmas.device

    def apply_model(self, x_noisy: torch.Tensor, t: torch.Tensor, cond: Any) -> torch.Tensor:
        sigma = t.view(-1, 1, 1, 1)
        flow = self.model.diffusion_model(x_noisy, t.float() * 1000, context=cond["crossattn"], y=cond["vector"])
        return x_noisy - flow * sigma

    def create_denoiser(self) -> Any:
        import k_diffusion

        class Denoiser(k_diffusion.external.DiscreteSchedule):
            def __init__(self, inner_model: Any, sigmas: torch.Tensor) -> None:
                super().__init__(sigmas, quantize=False)
                self.inner_model = inner_model

            def forward(self, input: torch.Tensor, sigma: torch.Tensor, **kwargs: Any) -> torch.Tensor:
                return self.inner_model.apply_model(input, sigma, **kwargs)

        return Denoiser(self, self.flow_sigmas)

    def add_noise_to_latent(self, x: torch.Tensor, noise: torch.Tensor, amount: Any) -> torch.Tensor:
        return torch.lerp(x, noise, amount)

    def fix_dimensions(self, width: int, height: int) -> tuple[int, int]:
        return width // 16 * 16, height // 16 * 16


# The variants: architecture (checkpoints of one architecture share one model object, as in the host), and seed.
VARIANTS = {
    "sd1": ("v1", 2),
    "sd1-b": ("v1", 7),
    "sd2-v": ("v2-v", 3),
    "sdxl": ("sdxl", 4),
    "sd1-inpainting": ("v1-inpainting", 8),
    "sd3": ("sd3", 6),
}


def build(variant: str, hijack: Any) -> DiffusionModel:
    """Make the model of a variant."""
    from modules.sd_hijack_clip import Conditioner, FrozenCLIPEmbedderWithCustomWords

    architecture, seed = VARIANTS[variant]
    model: DiffusionModel
    if architecture in ("sdxl", "sd3"):
        conditioner = Conditioner(hijack, seed)
        if architecture == "sdxl":
            model = SdxlModel(UNetModel(context=48, vector=22, seed=seed), conditioner)
        else:
            model = Sd3Model(UNetModel("flow", 16, 16, context=48, vector=22, seed=seed), conditioner)
    else:
        encoder = FrozenCLIPEmbedderWithCustomWords(hijack, 32, seed, openclip=architecture == "v2-v")
        inpainting = architecture == "v1-inpainting"
        native = "v" if architecture == "v2-v" else "eps"
        unet = UNetModel(native, in_channels=9 if inpainting else 4, seed=seed)
        model = DiffusionModel(unet, encoder, "hybrid" if inpainting else "crossattn")
        model.parameterization = native
        model.is_sd1, model.is_sd2 = architecture != "v2-v", architecture == "v2-v"
    with torch.no_grad():
        cond, uncond = (model.get_learned_conditioning([text]) for text in ("a photo of a fox in the snow", ""))
    if isinstance(cond, dict):
        model.model.diffusion_model.calibrate(cond["crossattn"], uncond["crossattn"], cond["vector"])
    else:
        model.model.diffusion_model.calibrate(cond, uncond)
    return model.eval()
