"""What the page's Generate buttons do."""

from __future__ import annotations

from contextlib import closing
from typing import Any

from modules import processing, scripts, shared
from modules.infotext_utils import create_override_settings_dict
from modules.ui_common import plaintext_to_html


def run(p: Any, runner: Any, args: tuple) -> tuple[Any, str, str, str]:
    """Pictures, their metadata as JSON, infotext and comments as HTML."""
    p.scripts = runner
    p.script_args = args
    with closing(p):
        processed = runner.run(p, *p.script_args)
        if processed is None:
            processed = processing.process_images(p)
    return (
        processed.images,
        processed.js(),
        plaintext_to_html(processed.info),
        plaintext_to_html(processed.comments, classname="comments"),
    )


def txt2img(
    id_task: str,
    prompt: str,
    negative_prompt: str,
    n_iter: int,
    batch_size: int,
    cfg_scale: float,
    height: int,
    width: int,
    enable_hr: bool,
    denoising_strength: float,
    hr_scale: float,
    hr_upscaler: str,
    hr_second_pass_steps: int,
    override_settings_texts: list[str],
    *args: Any,
) -> tuple[Any, str, str, str]:
    p = processing.StableDiffusionProcessingTxt2Img(
        sd_model=shared.sd_model,
        prompt=prompt,
        negative_prompt=negative_prompt,
        n_iter=int(n_iter),
        batch_size=int(batch_size),
        cfg_scale=cfg_scale,
        height=int(height),
        width=int(width),
        enable_hr=enable_hr,
        denoising_strength=denoising_strength,
        hr_scale=hr_scale,
        hr_upscaler=hr_upscaler,
        hr_second_pass_steps=int(hr_second_pass_steps),
        override_settings=create_override_settings_dict(override_settings_texts or []),
    )
    return run(p, scripts.scripts_txt2img, args)


def img2img(
    id_task: str,
    prompt: str,
    negative_prompt: str,
    n_iter: int,
    batch_size: int,
    cfg_scale: float,
    height: int,
    width: int,
    init_image: Any,
    denoising_strength: float,
    override_settings_texts: list[str],
    *args: Any,
) -> tuple[Any, str, str, str]:
    p = processing.StableDiffusionProcessingImg2Img(
        sd_model=shared.sd_model,
        prompt=prompt,
        negative_prompt=negative_prompt,
        n_iter=int(n_iter),
        batch_size=int(batch_size),
        cfg_scale=cfg_scale,
        height=int(height),
        width=int(width),
        init_images=[init_image],
        denoising_strength=denoising_strength,
        override_settings=create_override_settings_dict(override_settings_texts or []),
    )
    return run(p, scripts.scripts_img2img, args)
