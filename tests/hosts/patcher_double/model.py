"""A checkpoint as hosts that patch a U-Net hold it, with the networks of the A1111 double."""

from __future__ import annotations

import copy
from typing import Any

import double_networks
import torch
from backend.sampling.sampling_function import displaced
from modules import sd_hijack
from modules._record import count_rows
from torch import nn


class Prediction(nn.Module):
    """Between sigmas and timesteps, and between the network's own outputs and denoised latents."""

    def __init__(self, kind: str, sigmas: torch.Tensor) -> None:
        super().__init__()
        self.kind = kind
        self.set_sigmas(sigmas)

    def set_sigmas(self, sigmas: torch.Tensor) -> None:
        self.register_buffer("sigmas", sigmas.float())
        self.register_buffer("log_sigmas", sigmas.log().float())

    def timestep(self, sigma: torch.Tensor) -> torch.Tensor:
        if self.kind == "flow":
            return sigma * 1000
        return (sigma.log() - self.log_sigmas[:, None]).abs().argmin(dim=0).view(sigma.shape)

    def sigma(self, timestep: torch.Tensor) -> torch.Tensor:
        t = timestep.float().clamp(0, len(self.sigmas) - 1)
        return torch.lerp(self.log_sigmas[t.floor().long()], self.log_sigmas[t.ceil().long()], t.frac()).exp()

    def calculate_input(self, sigma: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return noise if self.kind == "flow" else noise / (sigma.view(-1, 1, 1, 1) ** 2 + 1) ** 0.5

    def calculate_denoised(self, sigma: torch.Tensor, model_output: Any, model_input: Any) -> torch.Tensor:
        sigma = sigma.view(-1, 1, 1, 1)
        if self.kind == "v":
            return model_input / (sigma**2 + 1) - model_output * sigma / (sigma**2 + 1) ** 0.5
        return model_input - model_output * sigma

    def noise_scaling(self, sigma: Any, noise: Any, latent_image: Any, max_denoise: bool = False) -> torch.Tensor:
        """Where sampling starts."""
        if self.kind == "flow":
            return sigma * noise + (1.0 - sigma) * latent_image
        return noise * ((1 + sigma**2) ** 0.5 if max_denoise else sigma) + latent_image


class BasicTransformerBlock(double_networks.BasicTransformerBlock):
    """Written for inference: it changes its input in place. And its self-attention can be patched."""

    def forward(self, x: torch.Tensor, context: Any = None, transformer_options: Any = None) -> torch.Tensor:
        queries = keys = values = self.norm1(x)
        for patch in (transformer_options or {}).get("patches", {}).get("attn1_patch", []):
            queries, keys, values = patch(queries, keys, values, {})
        x += self.attn1(queries, keys)
        x += 4.0 * self.attn2(self.norm2(x), context=context)
        x += self.ff(self.norm3(x))
        return x


class UNetModel(double_networks.UNetModel):
    def forward(self, x: Any, timesteps: Any, context: Any, control: Any = None, **more: Any) -> torch.Tensor:
        out = super().forward(x, timesteps, context, **more)
        if control is not None and control["output"]:
            out += control["output"].pop()
        return out


class KModel(nn.Module):
    """Takes sigmas and gives denoised latents."""

    def __init__(self, diffusion_model: nn.Module, predictor: Prediction) -> None:
        super().__init__()
        self.diffusion_model, self.predictor = diffusion_model, predictor
        displaced.add(self)

    def apply_model(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        c_concat: Any = None,
        c_crossattn: Any = None,
        control: Any = None,
        transformer_options: Any = None,
        **given: Any,
    ) -> torch.Tensor:
        if self in displaced:
            raise RuntimeError("the network is not loaded")
        inputs = self.predictor.calculate_input(t, x)
        if c_concat is not None:
            inputs = torch.cat([inputs, c_concat], dim=1)
        given = {"y": given["y"]} if "y" in given else {}
        timestep = self.predictor.timestep(t).float()
        out = self.diffusion_model(
            inputs, timestep, context=c_crossattn, control=control, transformer_options=transformer_options, **given
        )
        return self.predictor.calculate_denoised(t, out, x)


class UnetPatcher:
    """The network, with what extensions put before it or into it. A clone has options of its own."""

    def __init__(self, model: KModel) -> None:
        self.model = model
        self.model_options: dict[str, Any] = {"transformer_options": {}}
        self.controlnet_linked_list: Any = None
        self.extra_concat_condition: Any = None

    def clone(self) -> UnetPatcher:
        made = copy.copy(self)
        made.model_options = copy.deepcopy(self.model_options)
        return made

    def set_model_unet_function_wrapper(self, function: Any) -> None:
        self.model_options["model_function_wrapper"] = function

    def add_patched_controlnet(self, control: Any) -> None:
        control.previous_controlnet = self.controlnet_linked_list
        self.controlnet_linked_list = control


class ForgeObjects:
    def __init__(self, unet: UnetPatcher) -> None:
        self.unet = unet

    def shallow_copy(self) -> ForgeObjects:
        return ForgeObjects(self.unet)


class DiffusionEngine:
    """What the host knows as `shared.sd_model`. It has no `model`, no `apply_model` and no encoder under old names."""

    first_stage_model = cond_stage_model = None
    tiling_enabled = False

    def __init__(self, info: Any) -> None:
        self._model = double_networks.build(info.variant, sd_hijack.model_hijack)
        self.latent_channels = self._model.latent_channels
        for name in ("is_sd1", "is_sd2", "is_sdxl", "is_sd3"):
            setattr(self, name, getattr(self._model, name))
        self.is_inpaint = self._model.model.conditioning_key == "hybrid"
        encoders = getattr(self._model.cond_stage_model, "embedders", [self._model.cond_stage_model])
        for encoder, suffix in zip(encoders, ("_l", "_g") if len(encoders) > 1 else ("",)):
            setattr(self, f"text_processing_engine{suffix}", encoder)
        unet = self._model.model.diffusion_model
        unet.__class__ = UNetModel
        for module in unet.modules():
            if isinstance(module, double_networks.BasicTransformerBlock):
                module.__class__ = BasicTransformerBlock
        unet.register_forward_hook(count_rows, with_kwargs=True)
        if self.is_sd3:
            self._sigmas = self._model.flow_sigmas
            self.add_noise_to_latent = self._model.add_noise_to_latent
        else:
            self._sigmas = ((1 - self._model.alphas_cumprod) / self._model.alphas_cumprod).sqrt()
        self._network = KModel(unet, Prediction(unet.native, self._sigmas))
        self.forge_objects = ForgeObjects(UnetPatcher(self._network))
        self.forge_objects_original = self.forge_objects.shallow_copy()
        self.forge_objects_after_applying_lora = self.forge_objects.shallow_copy()
        self.extra_generation_params: dict[str, Any] = {}
        self.comments: list[str] = []
        self.sd_checkpoint_info, self.filename, self.sd_model_hash = info, info.filename, info.calculate_shorthash()

    def _other_model_used(self) -> None:
        displaced.add(self._network)

    @torch.inference_mode()
    def get_learned_conditioning(self, prompt: Any) -> Any:
        self._other_model_used()
        return self._model.get_learned_conditioning(prompt)

    @torch.inference_mode()
    def encode_first_stage(self, x: torch.Tensor) -> torch.Tensor:
        self._other_model_used()
        return self._model.encode_first_stage(x)

    @torch.inference_mode()
    def decode_first_stage(self, x: torch.Tensor) -> torch.Tensor:
        self._other_model_used()
        return self._model.decode_first_stage(x)

    def get_first_stage_encoding(self, x: torch.Tensor) -> torch.Tensor:
        return x
