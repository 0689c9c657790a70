"""Devices and precision: the double runs on the CPU in float32."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

cpu = torch.device("cpu")
device = device_interrogate = device_gfpgan = device_esrgan = device_codeformer = cpu
dtype = dtype_vae = dtype_unet = dtype_inference = torch.float32
unet_needs_upcast = False
fp8 = False
force_fp16 = False


class NansException(Exception):
    pass


def autocast(disable: bool = False) -> Any:
    return contextlib.nullcontext()


def without_autocast(disable: bool = False) -> Any:
    return contextlib.nullcontext()


def get_optimal_device_name() -> str:
    return "cpu"


def get_optimal_device() -> torch.device:
    return cpu


def get_device_for(task: str) -> torch.device:
    return cpu


def has_mps() -> bool:
    return False


def has_xpu() -> bool:
    return False


def torch_gc() -> None:
    pass


def cond_cast_unet(input: torch.Tensor) -> torch.Tensor:
    return input.to(dtype_unet) if unet_needs_upcast else input


def cond_cast_float(input: torch.Tensor) -> torch.Tensor:
    return input.float() if unet_needs_upcast else input


def test_for_nans(x: torch.Tensor, where: str) -> None:
    from modules import shared

    if not shared.cmd_opts.disable_nan_check and torch.isnan(x.flatten()[0]):
        raise NansException(f"{where} produced NaN")
