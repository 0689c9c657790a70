"""Requests and answers of the API; those of a generation are made from the processing classes."""

from __future__ import annotations

import inspect
from typing import Any, Optional, get_type_hints

from modules.processing import StableDiffusionProcessingImg2Img, StableDiffusionProcessingTxt2Img
from pydantic import BaseModel, Field, create_model

API_NOT_ALLOWED = [
    "self",
    "kwargs",
    "sd_model",
    "outpath_samples",
    "outpath_grids",
    "sampler_index",
    "extra_generation_params",
    "overlay_images",
    "do_not_reload_embeddings",
    "seed_enable_extras",
    "prompt_for_display",
    "sampler_noise_scheduler_override",
    "ddim_discretize",
]


def _request_model(name: str, cls: type, more: dict[str, tuple[type, Any]]) -> type[BaseModel]:
    hints = get_type_hints(cls)
    fields: dict[str, Any] = {}
    # The base class comes last, and its defaults win: `denoising_strength` is None unless the request has it.
    for parent in (cls, cls.__base__):
        for key, parameter in inspect.signature(parent).parameters.items():
            if key not in API_NOT_ALLOWED:
                default = None if isinstance(parameter.default, property) else parameter.default
                fields[key] = (Optional[hints.get(key, Any)], default)
    fields.update({key: (Optional[kind], default) for key, (kind, default) in more.items()})
    return create_model(name, **fields)


_COMMON: dict[str, tuple[type, Any]] = {
    "sampler_index": (str, "Euler"),
    "script_name": (str, None),
    "script_args": (list, []),
    "send_images": (bool, True),
    "save_images": (bool, False),
    "alwayson_scripts": (dict, {}),
    "force_task_id": (str, None),
    "infotext": (str, None),
}
StableDiffusionTxt2ImgProcessingAPI = _request_model(
    "StableDiffusionProcessingTxt2Img", StableDiffusionProcessingTxt2Img, _COMMON
)
StableDiffusionImg2ImgProcessingAPI = _request_model(
    "StableDiffusionProcessingImg2Img",
    StableDiffusionProcessingImg2Img,
    {
        **_COMMON,
        "init_images": (list, None),
        "denoising_strength": (float, 0.75),
        "mask": (str, None),
        "inpainting_fill": (int, 0),
        "inpaint_full_res": (bool, True),
        "mask_blur": (int, 4),
        "include_init_images": (bool, False),
    },
)


class ImagesResponse(BaseModel):
    images: Optional[list[str]] = None
    parameters: dict
    info: str


TextToImageResponse = ImageToImageResponse = ImagesResponse


class PNGInfoRequest(BaseModel):
    image: str = ""


class PNGInfoResponse(BaseModel):
    info: str
    items: dict = {}
    parameters: dict = {}


class ProgressResponse(BaseModel):
    progress: float
    eta_relative: float
    state: dict
    current_image: Optional[str] = None
    textinfo: Optional[str] = None


class ScriptsList(BaseModel):
    txt2img: list
    img2img: list


class ScriptArg(BaseModel):
    label: Optional[str] = None
    value: Optional[Any] = None
    minimum: Optional[Any] = None
    maximum: Optional[Any] = None
    step: Optional[Any] = None
    choices: Optional[list[str]] = None


class ScriptInfo(BaseModel):
    name: Optional[str] = None
    is_alwayson: Optional[bool] = None
    is_img2img: Optional[bool] = None
    args: list[ScriptArg] = Field(default_factory=list)
