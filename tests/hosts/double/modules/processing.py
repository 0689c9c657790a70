"""A generation: its parameters, its loop over batches, its infotext."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from modules import (
    devices,
    errors,
    extra_networks,
    images,
    infotext_utils,
    lowvram,
    prompt_parser,
    rng,
    scripts,
    sd_models,
    sd_samplers,
    sd_samplers_common,
    sd_vae,
    shared,
)
from modules._record import record
from modules.rng import slerp  # noqa: F401
from modules.sd_hijack import model_hijack
from modules.sd_samplers_common import decode_first_stage, images_tensor_to_samples
from modules.shared import opts, state
from PIL import Image

opt_C = 4
opt_f = 8


def _sees_picture(sd_model: Any) -> bool:
    """Whether the network is given a picture beside the latent, as inpainting models are."""
    return sd_model.model.conditioning_key in ("hybrid", "concat") or sd_model.is_sdxl_inpaint


def _load_checkpoint(info: Any = None) -> None:
    """The chosen one, unless another is named."""
    sd_models.reload_model_weights(info=info)


@contextlib.contextmanager
def _sampling(sd_model: Any) -> Iterator[None]:
    """What batches are made in."""
    with torch.no_grad(), sd_model.ema_scope():
        yield


def txt2img_image_conditioning(sd_model: Any, x: torch.Tensor, width: int, height: int) -> torch.Tensor:
    """What inpainting models see beside the latent: everything masked, on grey. Others get a placeholder."""
    if not _sees_picture(sd_model):
        return x.new_zeros(x.shape[0], 5, 1, 1)
    grey = images_tensor_to_samples(torch.full((x.shape[0], 3, height, width), 0.5))
    return torch.cat([torch.ones_like(grey[:, :1]), grey], dim=1).to(x.dtype)


def _internal(default: Any = None) -> Any:
    """A field that is no argument."""
    return field(default=default, init=False)


@dataclass(repr=False)
class StableDiffusionProcessing:
    sd_model: object = None
    outpath_samples: str = None  # type: ignore[assignment]
    outpath_grids: str = None  # type: ignore[assignment]
    prompt: str = ""
    prompt_for_display: str = None  # type: ignore[assignment]
    negative_prompt: str = ""
    styles: list[str] = None  # type: ignore[assignment]
    seed: int = -1
    subseed: int = -1
    subseed_strength: float = 0
    seed_resize_from_h: int = -1
    seed_resize_from_w: int = -1
    seed_enable_extras: bool = True
    sampler_name: str = None  # type: ignore[assignment]
    scheduler: str = None  # type: ignore[assignment]
    batch_size: int = 1
    n_iter: int = 1
    steps: int = 50
    cfg_scale: float = 7.0
    width: int = 512
    height: int = 512
    restore_faces: bool = None  # type: ignore[assignment]
    tiling: bool = None  # type: ignore[assignment]
    do_not_save_samples: bool = False
    do_not_save_grid: bool = False
    extra_generation_params: dict[str, Any] = None  # type: ignore[assignment]
    overlay_images: list = None  # type: ignore[assignment]
    eta: float = None  # type: ignore[assignment]
    do_not_reload_embeddings: bool = False
    denoising_strength: float = None  # type: ignore[assignment]
    ddim_discretize: str = None  # type: ignore[assignment]
    s_min_uncond: float = None  # type: ignore[assignment]
    s_churn: float = None  # type: ignore[assignment]
    s_tmax: float = None  # type: ignore[assignment]
    s_tmin: float = None  # type: ignore[assignment]
    s_noise: float = None  # type: ignore[assignment]
    override_settings: dict[str, Any] = None  # type: ignore[assignment]
    override_settings_restore_afterwards: bool = True
    sampler_index: int = None  # type: ignore[assignment]
    refiner_checkpoint: str = None  # type: ignore[assignment]
    refiner_switch_at: float = None  # type: ignore[assignment]
    disable_extra_networks: bool = False
    firstpass_image: str = None  # type: ignore[assignment]

    scripts_value: Any = _internal()
    script_args_value: Any = _internal()
    scripts_setup_complete: bool = _internal(False)
    comments: Any = None
    sampler: Any = _internal()
    is_using_inpainting_conditioning: bool = _internal(False)
    paste_to: Any = _internal()
    is_hr_pass: bool = _internal(False)
    c: Any = _internal()
    uc: Any = _internal()
    rng: Any = _internal()
    step_multiplier: int = _internal(1)
    color_corrections: Any = _internal()
    all_prompts: Any = _internal()
    all_negative_prompts: Any = _internal()
    all_seeds: Any = _internal()
    all_subseeds: Any = _internal()
    iteration: int = _internal(0)
    main_prompt: Any = _internal()
    main_negative_prompt: Any = _internal()
    prompts: Any = _internal()
    negative_prompts: Any = _internal()
    seeds: Any = _internal()
    subseeds: Any = _internal()
    extra_network_data: Any = _internal()
    user: Any = _internal()
    sd_model_name: Any = _internal()
    sd_model_hash: Any = _internal()
    sd_vae_name: Any = _internal()
    sd_vae_hash: Any = _internal()
    is_api: bool = _internal(False)

    # Not annotated: shared by all generations, or constants.
    token_merging_ratio = 0
    token_merging_ratio_hr = 0
    cached_uc = [None, None]
    cached_c = [None, None]

    def __post_init__(self) -> None:
        self.comments = {}
        self.styles = self.styles or []
        self.sampler_noise_scheduler_override = None
        self.extra_generation_params = self.extra_generation_params or {}
        self.override_settings = self.override_settings or {}
        self.script_args = self.script_args or {}
        self.refiner_checkpoint_info: Any = None
        if not self.seed_enable_extras:
            self.subseed, self.subseed_strength = -1, 0
            self.seed_resize_from_h = self.seed_resize_from_w = 0
        self.cached_uc = StableDiffusionProcessing.cached_uc
        self.cached_c = StableDiffusionProcessing.cached_c

    def fill_fields_from_opts(self) -> None:
        for name in ("s_min_uncond", "s_churn", "s_tmin", "s_tmax", "s_noise"):
            if getattr(self, name) is None:
                setattr(self, name, getattr(opts, name))
        self.s_tmax = self.s_tmax or float("inf")

    @property
    def scripts(self) -> Any:
        return self.scripts_value

    @scripts.setter
    def scripts(self, value: Any) -> None:
        self.scripts_value = value
        self._maybe_setup_scripts()

    @property
    def script_args(self) -> Any:
        return self.script_args_value

    @script_args.setter
    def script_args(self, value: Any) -> None:
        self.script_args_value = value
        self._maybe_setup_scripts()

    def _maybe_setup_scripts(self) -> None:
        if self.scripts_value and self.script_args_value and not self.scripts_setup_complete:
            self.setup_scripts()

    def setup_scripts(self) -> None:
        self.scripts_setup_complete = True
        self.scripts.setup_scrips(self, is_ui=not self.is_api)

    def comment(self, text: str) -> None:
        self.comments[text] = 1

    def txt2img_image_conditioning(
        self, x: torch.Tensor, width: int | None = None, height: int | None = None
    ) -> torch.Tensor:
        self.is_using_inpainting_conditioning = _sees_picture(self.sd_model)
        return txt2img_image_conditioning(self.sd_model, x, width or self.width, height or self.height)

    def inpainting_image_conditioning(
        self,
        source_image: torch.Tensor,
        latent_image: torch.Tensor,
        image_mask: Any = None,
        round_image_mask: bool = True,
    ) -> torch.Tensor:
        """The whole picture masked; the double has no masks."""
        self.is_using_inpainting_conditioning = True
        weight = getattr(self, "inpainting_mask_weight", opts.inpainting_mask_weight)
        encoded = self.sd_model.encode_first_stage(source_image * (1.0 - weight))
        return torch.cat([torch.ones_like(encoded[:, :1]), encoded], dim=1)

    def img2img_image_conditioning(
        self,
        source_image: torch.Tensor,
        latent_image: torch.Tensor,
        image_mask: Any = None,
        round_image_mask: bool = True,
    ) -> torch.Tensor:
        if _sees_picture(self.sd_model):
            return self.inpainting_image_conditioning(source_image, latent_image, image_mask, round_image_mask)
        return latent_image.new_zeros(latent_image.shape[0], 5, 1, 1)

    def init(self, all_prompts: list, all_seeds: list, all_subseeds: list) -> None:
        pass

    def sample(
        self,
        conditioning: Any,
        unconditional_conditioning: Any,
        seeds: list,
        subseeds: list,
        subseed_strength: float,
        prompts: list,
    ) -> Any:
        raise NotImplementedError()

    def _noise_to_sample(self, x: torch.Tensor, noise: torch.Tensor, c: Any, uc: Any) -> torch.Tensor:
        """The noise of a pass after the hook before its sampling."""
        if self.scripts is not None:
            self.scripts.process_before_every_sampling(p=self, x=x, noise=noise, c=c, uc=uc)
        return noise

    def close(self) -> None:
        self.sampler = self.c = self.uc = None
        if not opts.persistent_cond_cache:
            StableDiffusionProcessing.cached_c = [None, None]
            StableDiffusionProcessing.cached_uc = [None, None]

    def get_token_merging_ratio(self, for_hr: bool = False) -> float:
        first = self.token_merging_ratio or opts.token_merging_ratio
        return (self.token_merging_ratio_hr or opts.token_merging_ratio_hr or first) if for_hr else first

    def setup_prompts(self) -> None:
        if isinstance(self.prompt, list):
            self.all_prompts = self.prompt
        elif isinstance(self.negative_prompt, list):
            self.all_prompts = [self.prompt] * len(self.negative_prompt)
        else:
            self.all_prompts = [self.prompt] * (self.batch_size * self.n_iter)
        negative = self.negative_prompt
        self.all_negative_prompts = negative if isinstance(negative, list) else [negative] * len(self.all_prompts)
        if len(self.all_prompts) != len(self.all_negative_prompts):
            raise RuntimeError(
                f"there are {len(self.all_prompts)} prompts, but {len(self.all_negative_prompts)} negative prompts"
            )
        styles = shared.prompt_styles
        self.all_prompts = [styles.apply_styles_to_prompt(x, self.styles) for x in self.all_prompts]
        self.all_negative_prompts = [
            styles.apply_negative_styles_to_prompt(x, self.styles) for x in self.all_negative_prompts
        ]
        self.main_prompt = self.all_prompts[0]
        self.main_negative_prompt = self.all_negative_prompts[0]

    def cached_params(
        self,
        required_prompts: Any,
        steps: int,
        extra_network_data: Any,
        hires_steps: int | None = None,
        use_old_scheduling: bool = False,
    ) -> tuple:
        """All that conditions depend on."""
        settings = (
            "CLIP_stop_at_last_layers sdxl_crop_left sdxl_crop_top fp8_storage cache_fp16_weight emphasis"
        ).split()
        return (
            required_prompts,
            steps,
            hires_steps,
            use_old_scheduling,
            shared.sd_model.sd_checkpoint_info,
            extra_network_data,
            self.width,
            self.height,
            *(getattr(opts, name) for name in settings),
        )

    def get_conds_with_caching(
        self,
        function: Callable,
        required_prompts: Any,
        steps: int,
        caches: list,
        extra_network_data: Any,
        hires_steps: int | None = None,
    ) -> Any:
        """Conditions from one of the caches, or new ones, put into the first; caches outlive the request."""
        key = self.cached_params(required_prompts, steps, extra_network_data, hires_steps, opts.use_old_scheduling)
        for cache in caches:
            if cache[0] is not None and cache[0] == key:
                return cache[1]
        conds = function(shared.sd_model, required_prompts, steps, hires_steps, opts.use_old_scheduling)
        caches[0][:] = [key, conds]
        return conds

    def setup_conds(self) -> None:
        size = {"width": self.width, "height": self.height}
        prompts = prompt_parser.SdConditioning(self.prompts, **size)
        negative = prompt_parser.SdConditioning(self.negative_prompts, is_negative_prompt=True, **size)
        config = sd_samplers.find_sampler_config(self.sampler_name)
        total = config.total_steps(self.steps) if config else self.steps
        self.step_multiplier = total // self.steps
        self.firstpass_steps = total
        data = self.extra_network_data
        uncond, multicond = prompt_parser.get_learned_conditioning, prompt_parser.get_multicond_learned_conditioning
        self.uc = self.get_conds_with_caching(uncond, negative, total, [self.cached_uc], data)
        self.c = self.get_conds_with_caching(multicond, prompts, total, [self.cached_c], data)

    def get_conds(self) -> tuple[Any, Any]:
        return self.c, self.uc

    def parse_extra_network_prompts(self) -> None:
        self.prompts, self.extra_network_data = extra_networks.parse_prompts(self.prompts)

    def save_samples(self) -> bool:
        return False


# A property that ignores being set; not in the class body, where the dataclass would take it for the default.
StableDiffusionProcessing.sd_model = property(  # type: ignore[assignment]
    lambda self: shared.sd_model, lambda self, value: None
)


class Processed:
    """The result of a generation."""

    _COPIED = (
        "prompt negative_prompt subseed_strength width height sampler_name cfg_scale steps batch_size restore_faces "
        "sd_model_name sd_model_hash sd_vae_name sd_vae_hash seed_resize_from_w seed_resize_from_h "
        "extra_generation_params styles token_merging_ratio token_merging_ratio_hr eta ddim_discretize s_churn s_tmin "
        "s_tmax s_noise s_min_uncond sampler_noise_scheduler_override is_using_inpainting_conditioning"
    ).split()
    _JSON = (
        "prompt all_prompts negative_prompt all_negative_prompts seed all_seeds subseed all_subseeds "
        "subseed_strength width height sampler_name cfg_scale steps batch_size restore_faces "
        "face_restoration_model sd_model_name sd_model_hash sd_vae_name sd_vae_hash seed_resize_from_w "
        "seed_resize_from_h denoising_strength extra_generation_params index_of_first_image infotexts styles "
        "job_timestamp clip_skip is_using_inpainting_conditioning version"
    ).split()

    def __init__(
        self,
        p: Any,
        images_list: list,
        seed: Any = -1,
        info: str = "",
        subseed: Any = None,
        all_prompts: Any = None,
        all_negative_prompts: Any = None,
        all_seeds: Any = None,
        all_subseeds: Any = None,
        index_of_first_image: int = 0,
        infotexts: Any = None,
        comments: str = "",
    ) -> None:
        def first(x: Any) -> Any:
            return x[0] if isinstance(x, list) else x

        for name in self._COPIED:
            setattr(self, name, getattr(p, name))
        self.images = images_list
        self.prompt, self.negative_prompt = first(p.prompt), first(p.negative_prompt)
        self.seed = int(first(seed)) if first(seed) is not None else -1
        self.subseed = int(first(subseed)) if first(subseed) is not None else -1
        self.info = info
        self.comments = "".join(f"{comment}\n" for comment in p.comments)
        self.image_cfg_scale = getattr(p, "image_cfg_scale", None)
        self.denoising_strength = getattr(p, "denoising_strength", None)
        self.face_restoration_model = opts.face_restoration_model if p.restore_faces else None
        self.index_of_first_image = index_of_first_image
        self.job_timestamp = state.job_timestamp
        self.clip_skip = opts.CLIP_stop_at_last_layers
        self.all_prompts = all_prompts or p.all_prompts or [self.prompt]
        self.all_negative_prompts = all_negative_prompts or p.all_negative_prompts or [self.negative_prompt]
        self.all_seeds = all_seeds or p.all_seeds or [self.seed]
        self.all_subseeds = all_subseeds or p.all_subseeds or [self.subseed]
        self.infotexts = infotexts or [info] * len(images_list)
        self.version = program_version()

    def js(self) -> str:
        values = {name: getattr(self, name) for name in self._JSON}
        values["prompt"], values["negative_prompt"] = self.all_prompts[0], self.all_negative_prompts[0]
        return json.dumps(values, default=lambda _: None)

    def infotext(self, p: Any, index: int) -> str:
        return create_infotext(
            p,
            self.all_prompts,
            self.all_seeds,
            self.all_subseeds,
            comments=[],
            position_in_batch=index % self.batch_size,
            iteration=index // self.batch_size,  # type: ignore[attr-defined]
        )

    def get_token_merging_ratio(self, for_hr: bool = False) -> float:
        return self.token_merging_ratio_hr if for_hr else self.token_merging_ratio  # type: ignore[attr-defined]


def create_random_tensors(
    shape: Any,
    seeds: list,
    subseeds: Any = None,
    subseed_strength: float = 0.0,
    seed_resize_from_h: int = 0,
    seed_resize_from_w: int = 0,
    p: Any = None,
) -> torch.Tensor:
    return rng.ImageRNG(shape, seeds, subseeds, subseed_strength, seed_resize_from_h, seed_resize_from_w).next()


class DecodedSamples(list):
    already_decoded = True


def decode_latent_batch(
    model: Any, batch: torch.Tensor, target_device: Any = None, check_for_nans: bool = False
) -> DecodedSamples:
    if check_for_nans:
        devices.test_for_nans(batch, "unet")
    return DecodedSamples(decode_first_stage(model, x[None])[0] for x in batch)


def get_fixed_seed(seed: Any) -> Any:
    if isinstance(seed, str):
        seed = int(seed) if seed.strip().lstrip("+-").isdigit() else -1
    return random.randrange(4294967294) if seed in (None, -1) else seed


def fix_seed(p: Any) -> None:
    p.seed = get_fixed_seed(p.seed)
    p.subseed = get_fixed_seed(p.subseed)


def program_version() -> str:
    return "v1.10.1"


def create_infotext(
    p: Any,
    all_prompts: list,
    all_seeds: list,
    all_subseeds: list,
    comments: Any = None,
    iteration: int = 0,
    position_in_batch: int = 0,
    use_main_prompt: bool = False,
    index: int | None = None,
    all_negative_prompts: Any = None,
) -> str:
    """The prompt, the negative prompt, and `Key: value` pairs; values of None are left out.

    A value of `p.extra_generation_params` may be a list (one an image) or a function of this call's arguments.
    """
    if use_main_prompt:
        index = 0
    elif index is None:
        index = position_in_batch + iteration * p.batch_size
    if all_negative_prompts is None:
        all_negative_prompts = p.all_negative_prompts
    prompt_text = p.main_prompt if use_main_prompt else all_prompts[index]
    negative_prompt = p.main_negative_prompt if use_main_prompt else all_negative_prompts[index]
    ensd = opts.eta_noise_seed_delta
    clip_skip = getattr(p, "clip_skip", opts.CLIP_stop_at_last_layers)
    resized = p.seed_resize_from_w > 0 and p.seed_resize_from_h > 0
    varied = p.subseed_strength != 0

    params: dict[str, Any] = {
        "Steps": p.steps,
        "Sampler": p.sampler_name,
        "Schedule type": p.scheduler,
        "CFG scale": p.cfg_scale,
        "Image CFG scale": getattr(p, "image_cfg_scale", None),
        "Seed": p.all_seeds[0] if use_main_prompt else all_seeds[index],
        "Face restoration": opts.face_restoration_model if p.restore_faces else None,
        "Size": f"{p.width}x{p.height}",
        "Model hash": p.sd_model_hash if opts.add_model_hash_to_info else None,
        "Model": p.sd_model_name if opts.add_model_name_to_info else None,
        "VAE hash": p.sd_vae_hash if opts.add_vae_hash_to_info else None,
        "VAE": p.sd_vae_name if opts.add_vae_name_to_info else None,
        "Variation seed": (p.all_subseeds[0] if use_main_prompt else all_subseeds[index]) if varied else None,
        "Variation seed strength": p.subseed_strength if varied else None,
        "Seed resize from": f"{p.seed_resize_from_w}x{p.seed_resize_from_h}" if resized else None,
        "Denoising strength": p.extra_generation_params.get("Denoising strength"),
        "Conditional mask weight": (
            getattr(p, "inpainting_mask_weight", opts.inpainting_mask_weight)
            if p.is_using_inpainting_conditioning
            else None
        ),
        "Clip skip": clip_skip if clip_skip > 1 else None,
        "ENSD": ensd if ensd and sd_samplers_common.is_sampler_using_eta_noise_seed_delta(p) else None,
        "Token merging ratio": p.get_token_merging_ratio() or None,
        "Token merging ratio hr": (
            (p.get_token_merging_ratio(for_hr=True) or None) if getattr(p, "enable_hr", False) else None
        ),
        "Init image hash": getattr(p, "init_img_hash", None),
        "RNG": opts.randn_source if opts.randn_source != "GPU" else None,
        "Tiling": "True" if p.tiling else None,
        **p.extra_generation_params,
        "Version": program_version() if opts.add_version_to_infotext else None,
        "User": p.user if opts.add_user_name_to_info else None,
    }
    offered = dict(
        p=p,
        all_prompts=all_prompts,
        all_seeds=all_seeds,
        all_subseeds=all_subseeds,
        comments=comments,
        iteration=iteration,
        position_in_batch=position_in_batch,
        use_main_prompt=use_main_prompt,
        index=index,
        all_negative_prompts=all_negative_prompts,
        prompt_text=prompt_text,
        negative_prompt=negative_prompt,
        generation_params=params,
    )
    pairs = []
    for key, value in params.items():
        try:
            if isinstance(value, list):
                value = value[index]
            elif callable(value):
                value = value(**offered)
        except Exception:
            errors.report(f"infotext value {key!r} failed", exc_info=True)
            value = None
        if value is not None:
            pairs.append(key if key == value else f"{key}: {infotext_utils.quote(value)}")
    negative_line = f"\nNegative prompt: {negative_prompt}" if negative_prompt else ""
    return f"{prompt_text}{negative_line}\n{', '.join(pairs)}".strip()


def process_images(p: StableDiffusionProcessing) -> Processed:
    """Generate, with the request's settings in force meanwhile."""
    if p.scripts is not None:
        p.scripts.before_process(p)
    overrides = p.override_settings
    # Settings that are not stored yet are not restored either, as in the host.
    stored = {key: opts.data[key] for key in overrides if key in opts.data}
    try:
        if sd_models.checkpoint_aliases.get(overrides.get("sd_model_checkpoint")) is None:
            overrides.pop("sd_model_checkpoint", None)
            _load_checkpoint()
        for key, value in overrides.items():
            opts.set(key, value, is_api=True, run_callbacks=False)
            if key == "sd_model_checkpoint":
                _load_checkpoint()
        sd_models.apply_token_merging(p.sd_model, p.get_token_merging_ratio())
        sd_samplers.fix_p_invalid_sampler_and_scheduler(p)
        return process_images_inner(p)
    finally:
        sd_models.apply_token_merging(p.sd_model, 0)
        if p.override_settings_restore_afterwards:
            for key, value in stored.items():
                setattr(opts, key, value)


def _seeds(seed: Any, count: int, rising: bool = True) -> list[int]:
    return seed if isinstance(seed, list) else [int(seed) + (i if rising else 0) for i in range(count)]


def _prepare(p: Any) -> None:
    seed, subseed = get_fixed_seed(p.seed), get_fixed_seed(p.subseed)
    p.restore_faces = opts.face_restoration if p.restore_faces is None else p.restore_faces
    p.tiling = opts.tiling if p.tiling is None else p.tiling
    if p.refiner_checkpoint not in (None, "", "None", "none"):
        p.refiner_checkpoint_info = sd_models.get_closet_checkpoint_match(p.refiner_checkpoint)
        if p.refiner_checkpoint_info is None:
            raise Exception(f"there is no checkpoint named {p.refiner_checkpoint}")
    if hasattr(shared.sd_model, "fix_dimensions"):
        p.width, p.height = shared.sd_model.fix_dimensions(p.width, p.height)
    p.sd_model_name = shared.sd_model.sd_checkpoint_info.name_for_extra
    p.sd_model_hash = shared.sd_model.sd_model_hash
    p.sd_vae_name, p.sd_vae_hash = sd_vae.get_loaded_vae_name(), sd_vae.get_loaded_vae_hash()
    model_hijack.apply_circular(p.tiling)
    model_hijack.clear_comments()
    p.fill_fields_from_opts()
    p.setup_prompts()
    p.all_seeds = _seeds(seed, len(p.all_prompts), p.subseed_strength == 0)
    p.all_subseeds = _seeds(subseed, len(p.all_prompts))


def _sample_batch(p: Any, n: int) -> Any:
    """One batch, up to its pictures as tensors from 0 to 1; None if there is nothing to do."""
    batch = slice(n * p.batch_size, (n + 1) * p.batch_size)
    p.prompts, p.negative_prompts = p.all_prompts[batch], p.all_negative_prompts[batch]
    p.seeds, p.subseeds = p.all_seeds[batch], p.all_subseeds[batch]
    shape = (getattr(shared.sd_model, "latent_channels", opt_C), p.height // opt_f, p.width // opt_f)
    p.rng = rng.ImageRNG(shape, p.seeds, p.subseeds, p.subseed_strength, p.seed_resize_from_h, p.seed_resize_from_w)

    def told() -> dict[str, Any]:
        return dict(batch_number=n, prompts=p.prompts, seeds=p.seeds, subseeds=p.subseeds)

    if p.scripts is not None:
        p.scripts.before_process_batch(p, **told())
    if len(p.prompts) == 0:
        return None
    p.parse_extra_network_prompts()
    if not p.disable_extra_networks:
        extra_networks.activate(p, p.extra_network_data)
    if p.scripts is not None:
        p.scripts.process_batch(p, **told())
    p.setup_conds()
    p.extra_generation_params.update(model_hijack.extra_generation_params)
    for comment in model_hijack.comments:
        p.comment(comment)
    if p.n_iter > 1:
        state.job = f"Batch {n + 1} out of {p.n_iter}"
    sd_models.apply_alpha_schedule_override(p.sd_model, p)

    samples = p.sample(
        conditioning=p.c,
        unconditional_conditioning=p.uc,
        seeds=p.seeds,
        subseeds=p.subseeds,
        subseed_strength=p.subseed_strength,
        prompts=p.prompts,
    )
    if p.scripts is not None:
        args = scripts.PostSampleArgs(samples)
        p.scripts.post_sample(p, args)
        samples = args.samples
    if not getattr(samples, "already_decoded", False):
        devices.test_for_nans(samples, "unet")
        record.latents.append(samples.detach().clone())
        samples = decode_latent_batch(p.sd_model, samples, check_for_nans=True)
    pictures: Any = ((torch.stack(list(samples)).float() + 1.0) / 2.0).clamp(0.0, 1.0)
    if lowvram.is_enabled(shared.sd_model):
        lowvram.send_everything_to_cpu()
    state.nextjob()
    if p.scripts is not None:
        p.scripts.postprocess_batch(p, pictures, batch_number=n)
        p.prompts, p.negative_prompts = p.all_prompts[batch], p.all_negative_prompts[batch]
        listed = scripts.PostprocessBatchListArgs(list(pictures))
        p.scripts.postprocess_batch_list(p, listed, batch_number=n)
        pictures = listed.images
    return pictures


def _finish_image(p: Any, i: int, picture: torch.Tensor) -> Image.Image:
    p.batch_index = i
    pixels = (255.0 * picture.permute(1, 2, 0).cpu().numpy()).astype(np.uint8)
    image = Image.fromarray(pixels)
    if p.scripts is not None:
        for hook in ("postprocess_image", "postprocess_maskoverlay", "postprocess_image_after_composite"):
            if hook == "postprocess_maskoverlay":
                p.scripts.postprocess_maskoverlay(p, scripts.PostProcessMaskOverlayArgs(i, None, None))
                continue
            args = scripts.PostprocessImageArgs(image)
            getattr(p.scripts, hook)(p, args)
            image = args.image
    return image


def process_images_inner(p: Any) -> Processed:
    """The loop over batches."""
    assert p.prompt is not None and p.prompt != []
    record.last_p = p
    _prepare(p)
    if p.scripts is not None:
        p.scripts.process(p)

    infotexts: list[str] = []
    output: list[Image.Image] = []

    def infotext(index: int = 0, use_main_prompt: bool = False) -> str:
        return create_infotext(
            p,
            p.prompts,
            p.seeds,
            p.subseeds,
            use_main_prompt=use_main_prompt,
            index=index,
            all_negative_prompts=p.negative_prompts,
        )

    def add(image: Image.Image, text: str, at: int) -> None:
        if opts.enable_pnginfo:
            image.info["parameters"] = text
        infotexts.insert(at, text)
        output.insert(at, image)

    index_of_first_image = 0
    with _sampling(p.sd_model):
        p.init(p.all_prompts, p.all_seeds, p.all_subseeds)
        if state.job_count == -1:
            state.job_count = p.n_iter
        for n in range(p.n_iter):
            p.iteration = n
            state.skipped = False
            if state.interrupted or state.stopping_generation:
                break
            _load_checkpoint()  # the refiner may have left another one
            pictures = _sample_batch(p, n)
            if pictures is None:
                break
            for i, picture in enumerate(pictures):
                image = _finish_image(p, i, picture)
                add(image, infotext(i), len(output))
        if not infotexts:
            infotexts.append(Processed(p, []).infotext(p, 0))
        p.color_corrections = None
        wanted = len(output) >= 2 or not opts.grid_only_if_multiple
        if opts.return_grid and not p.do_not_save_grid and wanted and output:
            add(images.image_grid(output, p.batch_size), infotext(use_main_prompt=True), 0)
            index_of_first_image = 1
    if not p.disable_extra_networks and p.extra_network_data:
        extra_networks.deactivate(p, p.extra_network_data)
    result = Processed(
        p,
        images_list=output,
        seed=p.all_seeds[0],
        info=infotexts[0],
        subseed=p.all_subseeds[0],
        index_of_first_image=index_of_first_image,
        infotexts=infotexts,
    )
    if p.scripts is not None:
        p.scripts.postprocess(p, result)
    return result


def old_hires_fix_first_pass_dimensions(width: int, height: int) -> tuple[int, int]:
    scale = (512 * 512 / (width * height)) ** 0.5
    return -int(-scale * width // 64) * 64, -int(-scale * height // 64) * 64


@dataclass(repr=False)
class StableDiffusionProcessingTxt2Img(StableDiffusionProcessing):
    enable_hr: bool = False
    denoising_strength: float = 0.75
    firstphase_width: int = 0
    firstphase_height: int = 0
    hr_scale: float = 2.0
    hr_upscaler: str = None  # type: ignore[assignment]
    hr_second_pass_steps: int = 0
    hr_resize_x: int = 0
    hr_resize_y: int = 0
    hr_checkpoint_name: str = None  # type: ignore[assignment]
    hr_sampler_name: str = None  # type: ignore[assignment]
    hr_scheduler: str = None  # type: ignore[assignment]
    hr_prompt: str = ""
    hr_negative_prompt: str = ""
    force_task_id: str = None  # type: ignore[assignment]

    hr_checkpoint_info: Any = _internal()
    hr_upscale_to_x: int = _internal(0)
    hr_upscale_to_y: int = _internal(0)
    truncate_x: int = _internal(0)
    truncate_y: int = _internal(0)
    applied_old_hires_behavior_to: Any = _internal()
    latent_scale_mode: Any = _internal()
    hr_c: Any = _internal()
    hr_uc: Any = _internal()
    all_hr_prompts: Any = _internal()
    all_hr_negative_prompts: Any = _internal()
    hr_prompts: Any = _internal()
    hr_negative_prompts: Any = _internal()
    hr_extra_network_data: Any = _internal()

    cached_hr_uc = [None, None]
    cached_hr_c = [None, None]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.firstphase_width != 0 or self.firstphase_height != 0:
            self.hr_upscale_to_x, self.hr_upscale_to_y = self.width, self.height
            self.width, self.height = self.firstphase_width, self.firstphase_height
        self.cached_hr_uc = StableDiffusionProcessingTxt2Img.cached_hr_uc
        self.cached_hr_c = StableDiffusionProcessingTxt2Img.cached_hr_c

    def calculate_target_resolution(self) -> None:
        """The second pass's size: a factor, one side, or both sides with the surplus cut off."""
        w, h, to_x, to_y = self.width, self.height, self.hr_resize_x, self.hr_resize_y
        if to_x == 0 and to_y == 0:
            self.extra_generation_params["Hires upscale"] = self.hr_scale
            self.hr_upscale_to_x, self.hr_upscale_to_y = int(w * self.hr_scale), int(h * self.hr_scale)
            return
        self.extra_generation_params["Hires resize"] = f"{to_x}x{to_y}"
        if to_y == 0 or (to_x != 0 and w / h < to_x / to_y):
            self.hr_upscale_to_x, self.hr_upscale_to_y = to_x, to_x * h // w
        else:
            self.hr_upscale_to_x, self.hr_upscale_to_y = to_y * w // h, to_y
        if to_x and to_y:
            self.truncate_x = (self.hr_upscale_to_x - to_x) // opt_f
            self.truncate_y = (self.hr_upscale_to_y - to_y) // opt_f

    def init(self, all_prompts: list, all_seeds: list, all_subseeds: list) -> None:
        if not self.enable_hr:
            return
        params = self.extra_generation_params
        params["Denoising strength"] = self.denoising_strength
        if self.hr_checkpoint_name and self.hr_checkpoint_name != "Use same checkpoint":
            self.hr_checkpoint_info = sd_models.get_closet_checkpoint_match(self.hr_checkpoint_name)
            if self.hr_checkpoint_info is None:
                raise Exception(f"there is no checkpoint named {self.hr_checkpoint_name}")
            params["Hires checkpoint"] = self.hr_checkpoint_info.short_title
        if self.hr_sampler_name is not None and self.hr_sampler_name != self.sampler_name:
            params["Hires sampler"] = self.hr_sampler_name

        def hires_prompt(p: Any, index: int, prompt_text: str, **kwargs: Any) -> str | None:
            text = p.all_hr_prompts[index]
            return text if text != prompt_text else None

        def hires_negative_prompt(p: Any, index: int, negative_prompt: str, **kwargs: Any) -> str | None:
            text = p.all_hr_negative_prompts[index]
            return text if text != negative_prompt else None

        params["Hires prompt"] = hires_prompt
        params["Hires negative prompt"] = hires_negative_prompt
        params["Hires schedule type"] = None
        if self.hr_scheduler is None:
            self.hr_scheduler = self.scheduler
        mode = shared.latent_upscale_default_mode if self.hr_upscaler is None else self.hr_upscaler
        self.latent_scale_mode = shared.latent_upscale_modes.get(mode)
        if self.latent_scale_mode is None and not any(x.name == self.hr_upscaler for x in shared.sd_upscalers):
            raise Exception(f"there is no upscaler named {self.hr_upscaler}")
        self.calculate_target_resolution()
        if not state.processing_has_refined_job_count:
            state.job_count = 2 * (self.n_iter if state.job_count == -1 else state.job_count)
            state.processing_has_refined_job_count = True
        if self.hr_second_pass_steps:
            params["Hires steps"] = self.hr_second_pass_steps
        if self.hr_upscaler is not None:
            params["Hires upscaler"] = self.hr_upscaler

    def sample(
        self,
        conditioning: Any,
        unconditional_conditioning: Any,
        seeds: list,
        subseeds: list,
        subseed_strength: float,
        prompts: list,
    ) -> Any:
        self.sampler = sd_samplers.create_sampler(self.sampler_name, self.sd_model)
        x = self.rng.next()
        x = self._noise_to_sample(x, x, conditioning, unconditional_conditioning)
        image_conditioning = self.txt2img_image_conditioning(x)
        samples = self.sampler.sample(
            self, x, conditioning, unconditional_conditioning, image_conditioning=image_conditioning
        )
        if not self.enable_hr:
            return samples
        decoded = None
        if self.latent_scale_mode is None:
            decoded = torch.stack(decode_latent_batch(self.sd_model, samples, check_for_nans=True))
        with sd_models.SkipWritingToConfig():
            _load_checkpoint(self.hr_checkpoint_info)
        return self.sample_hr_pass(samples, decoded, seeds, subseeds, subseed_strength, prompts)

    def _enlarge(self, samples: torch.Tensor, decoded: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The clean latent of the second pass, and its image conditioning."""
        w, h = self.hr_upscale_to_x, self.hr_upscale_to_y
        if self.latent_scale_mode is not None:
            samples = torch.nn.functional.interpolate(samples, size=(h // opt_f, w // opt_f), **self.latent_scale_mode)
            if getattr(self, "inpainting_mask_weight", opts.inpainting_mask_weight) < 1.0:
                source = decode_first_stage(self.sd_model, samples)
                return samples, self.img2img_image_conditioning(source, samples)
            return samples, self.txt2img_image_conditioning(samples, w, h)
        assert decoded is not None
        resized = []
        for picture in ((decoded + 1.0) / 2.0).clamp(0.0, 1.0):
            image = Image.fromarray((255.0 * picture.permute(1, 2, 0).numpy()).astype(np.uint8))
            image = images.resize_image(0, image, w, h, upscaler_name=self.hr_upscaler)
            resized.append(torch.from_numpy(np.array(image).astype(np.float32) / 255.0).permute(2, 0, 1))
        pictures = torch.stack(resized)
        samples = images_tensor_to_samples(pictures)
        return samples, self.img2img_image_conditioning(pictures, samples)

    def sample_hr_pass(
        self,
        samples: torch.Tensor,
        decoded_samples: torch.Tensor | None,
        seeds: list,
        subseeds: list,
        subseed_strength: float,
        prompts: list,
    ) -> Any:
        if state.interrupted:
            return samples
        self.is_hr_pass = True
        self.sampler = sd_samplers.create_sampler(self.hr_sampler_name or self.sampler_name, self.sd_model)
        samples, image_conditioning = self._enlarge(samples, decoded_samples)
        state.nextjob()
        height, width = samples.shape[2:]
        samples = samples[
            :,
            :,
            self.truncate_y // 2 : height - (self.truncate_y + 1) // 2,
            self.truncate_x // 2 : width - (self.truncate_x + 1) // 2,
        ]
        self.rng = rng.ImageRNG(
            samples.shape[1:],
            self.seeds,
            self.subseeds,
            self.subseed_strength,
            self.seed_resize_from_h,
            self.seed_resize_from_w,
        )
        noise = self.rng.next()
        if not self.disable_extra_networks:
            extra_networks.activate(self, self.hr_extra_network_data)
        self.calculate_hr_conds()
        sd_models.apply_token_merging(self.sd_model, self.get_token_merging_ratio(for_hr=True))
        if self.scripts is not None:
            self.scripts.before_hr(self)
        noise = self._noise_to_sample(samples, noise, self.hr_c, self.hr_uc)
        samples = self.sampler.sample_img2img(
            self,
            samples,
            noise,
            self.hr_c,
            self.hr_uc,
            steps=self.hr_second_pass_steps or self.steps,
            image_conditioning=image_conditioning,
        )
        sd_models.apply_token_merging(self.sd_model, self.get_token_merging_ratio())
        self.sampler = None
        record.latents.append(samples.detach().clone())
        decoded = decode_latent_batch(self.sd_model, samples, check_for_nans=True)
        self.is_hr_pass = False
        return decoded

    def close(self) -> None:
        super().close()
        self.hr_c = self.hr_uc = None
        if not opts.persistent_cond_cache:
            StableDiffusionProcessingTxt2Img.cached_hr_c = [None, None]
            StableDiffusionProcessingTxt2Img.cached_hr_uc = [None, None]

    def setup_prompts(self) -> None:
        super().setup_prompts()
        if not self.enable_hr:
            return
        self.hr_prompt = self.prompt if self.hr_prompt == "" else self.hr_prompt
        self.hr_negative_prompt = self.negative_prompt if self.hr_negative_prompt == "" else self.hr_negative_prompt

        def every(prompt: Any, apply: Callable) -> list[str]:
            repeated = prompt if isinstance(prompt, list) else [prompt] * (self.batch_size * self.n_iter)
            return [apply(x, self.styles) for x in repeated]

        styles = shared.prompt_styles
        self.all_hr_prompts = every(self.hr_prompt, styles.apply_styles_to_prompt)
        self.all_hr_negative_prompts = every(self.hr_negative_prompt, styles.apply_negative_styles_to_prompt)

    def calculate_hr_conds(self) -> None:
        if self.hr_c is not None:
            return
        size = {"width": self.hr_upscale_to_x, "height": self.hr_upscale_to_y}
        prompts = prompt_parser.SdConditioning(self.hr_prompts, **size)
        negative = prompt_parser.SdConditioning(self.hr_negative_prompts, is_negative_prompt=True, **size)
        config = sd_samplers.find_sampler_config(self.hr_sampler_name or self.sampler_name)
        steps = self.hr_second_pass_steps or self.steps
        total = config.total_steps(steps) if config else steps
        first, data = self.firstpass_steps, self.hr_extra_network_data
        uncond, multicond = prompt_parser.get_learned_conditioning, prompt_parser.get_multicond_learned_conditioning
        caches_uc, caches_c = [self.cached_hr_uc, self.cached_uc], [self.cached_hr_c, self.cached_c]
        self.hr_uc = self.get_conds_with_caching(uncond, negative, first, caches_uc, data, total)
        self.hr_c = self.get_conds_with_caching(multicond, prompts, first, caches_c, data, total)

    def setup_conds(self) -> None:
        if self.is_hr_pass:  # the refiner asks
            self.hr_c = None
            self.calculate_hr_conds()
            return
        super().setup_conds()
        self.hr_c = self.hr_uc = None
        if self.enable_hr and self.hr_checkpoint_info is None and opts.hires_fix_use_firstpass_conds:
            self.calculate_hr_conds()

    def get_conds(self) -> tuple[Any, Any]:
        return (self.hr_c, self.hr_uc) if self.is_hr_pass else super().get_conds()

    def parse_extra_network_prompts(self) -> None:
        super().parse_extra_network_prompts()
        if self.enable_hr:
            batch = slice(self.iteration * self.batch_size, (self.iteration + 1) * self.batch_size)
            self.hr_negative_prompts = self.all_hr_negative_prompts[batch]
            self.hr_prompts, self.hr_extra_network_data = extra_networks.parse_prompts(self.all_hr_prompts[batch])


@dataclass(repr=False)
class StableDiffusionProcessingImg2Img(StableDiffusionProcessing):
    """img2img, with masks over the whole picture that start from what is under them."""

    init_images: list = None  # type: ignore[assignment]
    resize_mode: int = 0
    denoising_strength: float = 0.75
    image_cfg_scale: float = None  # type: ignore[assignment]
    mask: Any = None
    inpainting_fill: int = 0
    inpaint_full_res: bool = False
    mask_blur: int = 0
    initial_noise_multiplier: float = None  # type: ignore[assignment]
    force_task_id: str = None  # type: ignore[assignment]

    nmask: Any = _internal()
    image_conditioning: Any = _internal()
    init_latent: Any = _internal()
    init_img_hash: Any = _internal()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.image_mask, self.mask = self.mask, None
        if self.image_mask is not None and self.inpainting_fill != 1:
            raise NotImplementedError("the double's masks start from the original")
        if self.initial_noise_multiplier is None:
            self.initial_noise_multiplier = opts.initial_noise_multiplier

    def init(self, all_prompts: list, all_seeds: list, all_subseeds: list) -> None:
        self.extra_generation_params["Denoising strength"] = self.denoising_strength
        self.image_cfg_scale = None  # type: ignore[assignment]
        self.sampler = sd_samplers.create_sampler(self.sampler_name, self.sd_model)
        pictures = []
        for image in self.init_images:
            image = images.resize_image(self.resize_mode, image.convert("RGB"), self.width, self.height)
            pictures.append(torch.from_numpy(np.array(image).astype(np.float32) / 255.0).permute(2, 0, 1))
        if len(pictures) == 1:
            pictures = pictures * self.batch_size
        elif len(pictures) <= self.batch_size:
            self.batch_size = len(pictures)
        else:
            raise RuntimeError(f"there are {len(pictures)} images for a batch of {self.batch_size}")
        batch = torch.stack(pictures)
        self.init_latent = images_tensor_to_samples(batch, model=self.sd_model)
        picture_mask = None
        if self.image_mask is not None:
            picture_mask = self.image_mask.convert("L").resize((self.width, self.height))
            size = self.init_latent.shape[3], self.init_latent.shape[2]
            repainted = np.around(np.array(picture_mask.resize(size), dtype=np.float32) / 255)
            self.nmask = torch.from_numpy(repainted)[None].expand(4, -1, -1)
            self.mask = 1 - self.nmask
        self.image_conditioning = self.img2img_image_conditioning(batch * 2 - 1, self.init_latent, picture_mask)

    def sample(
        self,
        conditioning: Any,
        unconditional_conditioning: Any,
        seeds: list,
        subseeds: list,
        subseed_strength: float,
        prompts: list,
    ) -> Any:
        noise = self.rng.next()
        if self.initial_noise_multiplier != 1.0:
            self.extra_generation_params["Noise multiplier"] = self.initial_noise_multiplier
            noise *= self.initial_noise_multiplier
        noise = self._noise_to_sample(self.init_latent, noise, conditioning, unconditional_conditioning)
        samples = self.sampler.sample_img2img(
            self,
            self.init_latent,
            noise,
            conditioning,
            unconditional_conditioning,
            image_conditioning=self.image_conditioning,
        )
        return samples if self.mask is None else samples * self.nmask + self.init_latent * self.mask

    def get_token_merging_ratio(self, for_hr: bool = False) -> float:
        overridden = "token_merging_ratio" in self.override_settings and opts.token_merging_ratio
        return self.token_merging_ratio or overridden or opts.token_merging_ratio_img2img or opts.token_merging_ratio


def reset_caches() -> None:
    """Forget conditions of earlier generations."""
    for cls, names in (
        (StableDiffusionProcessing, ("cached_c", "cached_uc")),
        (StableDiffusionProcessingTxt2Img, ("cached_hr_c", "cached_hr_uc")),
    ):
        for name in names:
            setattr(cls, name, [None, None])
