"""No separate VAE."""

from __future__ import annotations

vae_dict: dict[str, str] = {}


def get_loaded_vae_name() -> None:
    return None


def get_loaded_vae_hash() -> None:
    return None


def reload_vae_weights(*args: object, **kwargs: object) -> None:
    pass


def refresh_vae_list() -> None:
    pass
