"""Checkpoints and the loaded model."""

from __future__ import annotations

import enum
import hashlib
from typing import Any

import double_networks
from modules import errors, lowvram, script_callbacks, sd_hijack, shared
from modules._record import count_rows


class ModelType(enum.Enum):
    SD1 = 1
    SD2 = 2
    SDXL = 3
    SSD = 4
    SD3 = 5


class CheckpointInfo:
    """One of the double's variants, as if it were a file."""

    def __init__(self, variant: str) -> None:
        self.variant = variant
        self.filename = self.name = f"{variant}.safetensors"
        self.name_for_extra = self.model_name = variant
        self.sha256 = hashlib.sha256(variant.encode()).hexdigest()
        self.shorthash = self.sha256[:10]
        self.hash = self.sha256[-8:]
        self.is_safetensors = True
        self.metadata: dict[str, Any] = {}
        self.title = f"{self.name} [{self.shorthash}]"
        self.short_title = f"{self.name_for_extra} [{self.shorthash}]"
        self.ids = [
            self.hash,
            self.model_name,
            self.title,
            self.name,
            f"{self.name} [{self.hash}]",
            self.shorthash,
            self.sha256,
            self.short_title,
        ]

    def register(self) -> None:
        checkpoints_list[self.title] = self
        checkpoint_aliases.update(dict.fromkeys(self.ids, self))

    def calculate_shorthash(self) -> str:
        return self.shorthash


checkpoints_list: dict[str, CheckpointInfo] = {}
checkpoint_aliases: dict[str, CheckpointInfo] = {}
checkpoint_alisases = checkpoint_aliases


def list_models() -> None:
    checkpoints_list.clear()
    checkpoint_aliases.clear()
    for variant in double_networks.VARIANTS:
        CheckpointInfo(variant).register()


def checkpoint_tiles(use_short: bool = False) -> list[str]:
    return [x.short_title if use_short else x.title for x in checkpoints_list.values()]


def get_closet_checkpoint_match(search_string: str | None) -> CheckpointInfo | None:
    if not search_string:
        return None
    exact = checkpoint_aliases.get(search_string)
    if exact is not None:
        return exact
    for text in (search_string, search_string.rsplit(" [", 1)[0]):
        found = [info for info in checkpoints_list.values() if text in info.title]
        if found:
            return min(found, key=lambda info: len(info.title))
    return None


def select_checkpoint() -> CheckpointInfo:
    chosen = checkpoint_aliases.get(shared.opts.sd_model_checkpoint)
    return chosen or next(iter(checkpoints_list.values()))


class SkipWritingToConfig:
    """Within it, loading a checkpoint does not change the setting."""

    skip = False

    def __enter__(self) -> SkipWritingToConfig:
        self.previous = SkipWritingToConfig.skip
        SkipWritingToConfig.skip = True
        return self

    def __exit__(self, *args: Any) -> None:
        SkipWritingToConfig.skip = self.previous


class SdModelData:
    def __init__(self) -> None:
        self.sd_model: Any = None
        self.loaded_sd_models: list[Any] = []
        self.was_loaded_at_least_once = False

    def get_sd_model(self) -> Any:
        if self.sd_model is None and not self.was_loaded_at_least_once:
            try:
                reload_model_weights()
            except Exception as e:
                errors.display(e, "loading the model", full_traceback=True)
        return self.sd_model

    def set_sd_model(self, v: Any, already_loaded: bool = False) -> None:
        self.sd_model = v
        self.loaded_sd_models = [] if v is None else [v]


model_data = SdModelData()
_weights: dict[str, dict] = {}


def _state_dict(variant: str) -> dict:
    """The weights of a variant; made once, since building it costs more than copying."""
    if variant not in _weights:
        _weights[variant] = double_networks.build(variant, sd_hijack.model_hijack).state_dict()
    return _weights[variant]


def reload_model_weights(sd_model: Any = None, info: CheckpointInfo | None = None, forced_reload: bool = False) -> Any:
    """Load a checkpoint. As in the host, one of the same architecture is loaded into the same model object."""
    info = info or select_checkpoint()
    model = sd_model or model_data.sd_model
    if model is not None and model.sd_checkpoint_info is info and not forced_reload:
        return model
    architecture, _ = double_networks.VARIANTS[info.variant]
    if model is None or model.used_config != architecture:
        model = double_networks.build(info.variant, sd_hijack.model_hijack)
        model.used_config = architecture
        model.model.diffusion_model.register_forward_hook(count_rows, with_kwargs=True)
        model.model_type = next(
            ModelType[x] for x in ("SD3", "SDXL", "SD2", "SD1") if getattr(model, f"is_{x.lower()}")
        )
        model_data.was_loaded_at_least_once = True
    model.load_state_dict(_state_dict(info.variant))
    model.sd_model_checkpoint = info.filename
    model.sd_checkpoint_info = info
    model.sd_model_hash = info.shorthash
    if not SkipWritingToConfig.skip:
        shared.opts.data["sd_model_checkpoint"] = info.title
        shared.opts.data["sd_checkpoint_hash"] = info.sha256
    lowvram.apply(model)
    model_data.set_sd_model(model)
    script_callbacks.model_loaded_callback(model)
    model.cond_stage_model_empty_prompt = get_empty_cond(model)
    return model


def load_model(checkpoint_info: CheckpointInfo | None = None, already_loaded_state_dict: Any = None) -> Any:
    model_data.sd_model = None
    return reload_model_weights(info=checkpoint_info)


def get_empty_cond(sd_model: Any) -> Any:
    import torch

    with torch.no_grad():
        cond = sd_model.get_learned_conditioning([""])
    return cond["crossattn"] if isinstance(cond, dict) else cond


def unload_model_weights(sd_model: Any = None, info: Any = None) -> Any:
    return sd_model


def send_model_to_device(m: Any) -> None:
    lowvram.apply(m)


def send_model_to_cpu(m: Any) -> None:
    pass


def apply_token_merging(sd_model: Any, token_merging_ratio: float) -> None:
    """Notes the ratio where the host does; the double's network does not merge."""
    sd_model.applied_token_merged_ratio = token_merging_ratio


def apply_alpha_schedule_override(sd_model: Any, p: Any = None) -> None:
    if not hasattr(sd_model, "alphas_cumprod_original"):
        return
    alphas = sd_model.alphas_cumprod_original
    params = {} if p is None else p.extra_generation_params
    if shared.opts.use_downcasted_alpha_bar:
        params["Downcast alphas_cumprod"] = True
        alphas = alphas.half()
    if shared.opts.sd_noise_schedule == "Zero Terminal SNR":
        params["Noise Schedule"] = shared.opts.sd_noise_schedule
        alphas = rescale_zero_terminal_snr_abar(alphas)
    sd_model.alphas_cumprod = alphas


def rescale_zero_terminal_snr_abar(alphas_cumprod: Any) -> Any:
    """Shift and scale √ᾱ so that the last value is (nearly) zero and the first stays."""
    root = alphas_cumprod.sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    rescaled = root**2
    rescaled[-1] = 4.8973451890853435e-08
    return rescaled


list_models()
