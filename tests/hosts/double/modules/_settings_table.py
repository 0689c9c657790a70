"""The host's settings that a generation, or an extension in it, may read: names, defaults, infotext labels."""

from __future__ import annotations

from typing import Any

from modules.options import OptionInfo, categories, options_section

for _id, _label in (
    ("sd", "Stable Diffusion"),
    ("ui", "User Interface"),
    ("system", "System"),
    ("postprocessing", "Postprocessing"),
    ("training", "Training"),
):
    categories.register_category(_id, _label)

# section: {name: default or (default, infotext label)}
_TABLE: dict[tuple, dict[str, Any]] = {
    ("saving-images", "Saving images/grids", "saving"): dict(
        samples_save=True,
        samples_format="png",
        grid_save=True,
        grid_format="png",
        grid_only_if_multiple=True,
        grid_extended_filename=False,
        n_rows=-1,
        jpeg_quality=80,
        save_images_before_highres_fix=False,
        save_incomplete_images=False,
        img_max_size_mp=200,
        return_mask=False,
        save_mask=False,
    ),
    ("saving-paths", "Paths for saving", "saving"): dict(
        outdir_samples="",
        outdir_txt2img_samples="output/txt2img-images",
        outdir_img2img_samples="output/img2img-images",
        outdir_grids="",
        outdir_txt2img_grids="output/txt2img-grids",
        outdir_img2img_grids="output/img2img-grids",
    ),
    ("system", "System", "system"): dict(
        auto_launch_browser="Local",
        disable_mmap_load_safetensors=False,
        hide_ldm_prints=True,
        list_hidden_files=True,
        memmon_poll_rate=8,
        samples_log_stdout=False,
        multiple_tqdm=True,
        enable_console_prompts=False,
    ),
    ("profiler", "Profiler", "system"): dict(profiling_enable=False),
    ("API", "API", "system"): dict(api_enable_requests=True, api_forbid_local_requests=True, api_useragent=""),
    ("sd", "Stable Diffusion", "sd"): dict(
        sd_model_checkpoint=(None, "Model hash"),
        sd_checkpoints_limit=1,
        sd_checkpoints_keep_in_cpu=True,
        sd_unet="Automatic",
        enable_quantization=False,
        emphasis=("Original", "Emphasis"),
        enable_batch_seeds=True,
        comma_padding_backtrack=20,
        CLIP_stop_at_last_layers=(1, "Clip skip"),
        upcast_attn=False,
        randn_source=("GPU", "RNG"),
        tiling=(False, "Tiling"),
        hires_fix_refiner_pass=("second pass", "Hires refiner"),
    ),
    ("sdxl", "Stable Diffusion XL", "sd"): dict(
        sdxl_crop_top=0,
        sdxl_crop_left=0,
        sdxl_refiner_low_aesthetic_score=2.5,
        sdxl_refiner_high_aesthetic_score=6.0,
    ),
    ("sd3", "Stable Diffusion 3", "sd"): dict(sd3_enable_t5=False),
    ("vae", "VAE", "sd"): dict(
        sd_vae=("Automatic", "VAE"),
        sd_vae_encode_method=("Full", "VAE Encoder"),
        sd_vae_decode_method=("Full", "VAE Decoder"),
    ),
    ("img2img", "img2img", "sd"): dict(
        inpainting_mask_weight=(1.0, "Conditional mask weight"),
        initial_noise_multiplier=(1.0, "Noise multiplier"),
        img2img_extra_noise=(0.0, "Extra noise"),
        img2img_color_correction=False,
        img2img_background_color="#ffffff",
        save_init_img=False,
        img2img_fix_steps=False,
        return_mask_composite=False,
        overlay_inpaint=True,
    ),
    ("optimizations", "Optimizations", "sd"): dict(
        cross_attention_optimization="Automatic",
        s_min_uncond=(0.0, "NGMS"),
        s_min_uncond_all=(False, "NGMS all steps"),
        token_merging_ratio=(0.0, "Token merging ratio"),
        token_merging_ratio_img2img=0.0,
        token_merging_ratio_hr=(0.0, "Token merging ratio hr"),
        pad_cond_uncond=(False, "Pad conds"),
        pad_cond_uncond_v0=(False, "Pad conds v0"),
        persistent_cond_cache=True,
        batch_cond_uncond=True,
        fp8_storage=("Disable", "FP8 weight"),
        cache_fp16_weight=(False, "Cache FP16 weight for LoRA"),
    ),
    ("compatibility", "Compatibility", "sd"): dict(
        auto_backcompat=True,
        use_old_emphasis_implementation=False,
        use_old_karras_scheduler_sigmas=False,
        no_dpmpp_sde_batch_determinism=False,
        use_old_hires_fix_width_height=False,
        hires_fix_use_firstpass_conds=False,
        use_old_scheduling=(False, "Old prompt editing timelines"),
        use_downcasted_alpha_bar=(False, "Downcast alphas_cumprod"),
        refiner_switch_by_sample_steps=(False, "Refiner switch by sampling steps"),
    ),
    ("extra_networks", "Extra Networks", "sd"): dict(sd_lora="None"),
    ("ui_alternatives", "UI alternatives", "ui"): dict(
        compact_prompt_box=False,
        samplers_in_dropdown=True,
        dimensions_and_batch_together=True,
        txt2img_settings_accordion=False,
        img2img_settings_accordion=False,
        interrupt_after_current=True,
        hires_fix_show_sampler=False,
        hires_fix_show_prompts=False,
    ),
    ("ui_gallery", "Gallery", "ui"): dict(return_grid=True, do_not_show_images=False),
    ("ui", "User interface", "ui"): dict(
        ui_reorder_list=[],
        quicksettings_list=["sd_model_checkpoint"],
        send_seed=True,
        send_size=True,
        enable_reloading_ui_scripts=False,
        hidden_tabs=[],
    ),
    ("infotext", "Infotext", "ui"): dict(
        enable_pnginfo=True,
        add_model_name_to_info=True,
        add_model_hash_to_info=True,
        add_vae_name_to_info=True,
        add_vae_hash_to_info=True,
        add_user_name_to_info=False,
        add_version_to_infotext=True,
        disable_weights_auto_swap=True,
        infotext_skip_pasting=[],
        infotext_styles="Apply if any",
    ),
    ("live_previews", "Live previews", "ui"): dict(
        live_previews_enable=True,
        show_progress_grid=True,
        show_progress_every_n_steps=10,
        show_progress_type="Approx NN",
        live_preview_content="Prompt",
        live_preview_fast_interrupt=False,
        live_previews_image_format="png",
    ),
    ("sampler-params", "Sampler parameters", "sd"): dict(
        hide_samplers=[],
        eta_ddim=(0.0, "Eta DDIM"),
        eta_ancestral=(1.0, "Eta"),
        ddim_discretize="uniform",
        s_churn=(0.0, "Sigma churn"),
        s_tmin=(0.0, "Sigma tmin"),
        s_tmax=(0.0, "Sigma tmax"),
        s_noise=(1.0, "Sigma noise"),
        sigma_min=(0.0, "Schedule min sigma"),
        sigma_max=(0.0, "Schedule max sigma"),
        rho=(0.0, "Schedule rho"),
        eta_noise_seed_delta=(0, "ENSD"),
        always_discard_next_to_last_sigma=(False, "Discard penultimate sigma"),
        sgm_noise_multiplier=(False, "SGM noise multiplier"),
        uni_pc_variant=("bh1", "UniPC variant"),
        uni_pc_skip_type=("time_uniform", "UniPC skip type"),
        uni_pc_order=(3, "UniPC order"),
        uni_pc_lower_order_final=(True, "UniPC lower order final"),
        sd_noise_schedule=("Default", "Noise Schedule"),
        skip_early_cond=(0.0, "Skip Early CFG"),
        beta_dist_alpha=(0.6, "Beta scheduler alpha"),
        beta_dist_beta=(0.6, "Beta scheduler beta"),
    ),
    ("face-restoration", "Face restoration", "postprocessing"): dict(
        face_restoration=(False, "Face restoration"),
        face_restoration_model="CodeFormer",
    ),
    (None, "Hidden options"): dict(disabled_extensions=[], disable_all_extensions="none", sd_checkpoint_hash=""),
}


def build() -> dict[str, OptionInfo]:
    """A fresh table of settings."""
    labels: dict[str, OptionInfo] = {}
    for section, entries in _TABLE.items():
        infos = {}
        for name, value in entries.items():
            default, infotext = value if isinstance(value, tuple) else (value, None)
            infos[name] = OptionInfo(default, name.replace("_", " "), infotext=infotext)
        labels.update(options_section(section, infos))
    return labels
