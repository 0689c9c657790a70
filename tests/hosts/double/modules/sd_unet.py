"""No alternative U-Nets."""

from __future__ import annotations

current_unet_option = None
current_unet = None


def apply_unet(option: object = None) -> None:
    pass


def list_unets() -> None:
    pass
