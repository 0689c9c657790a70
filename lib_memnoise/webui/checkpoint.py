"""The loaded checkpoint: its preset, whether it is supported, and loading it."""

from __future__ import annotations

import contextlib

from modules import sd_models, shared

from lib_memnoise.errors import Unsupported
from lib_memnoise.methods.pipeline import needs_gradient
from lib_memnoise.registry import METHODS
from lib_memnoise.settings import Settings, preset_for
from lib_memnoise.webui import quirks
from lib_memnoise.webui.backends.base import WebuiBackend


def checkpoint_preset(backend: WebuiBackend) -> str:
    """The preset that "auto" stands for on the loaded checkpoint."""
    model = shared.sd_model
    family = "sd1" if getattr(model, "is_sd1", False) else "sd2" if getattr(model, "is_sd2", False) else "other"
    info = getattr(model, "sd_checkpoint_info", None)
    return preset_for(parameterization=backend.kind, family=family, sha256=getattr(info, "sha256", None))


def loads_late() -> bool:
    """Whether the host loads the chosen checkpoint only when a generation begins, as Forge does."""
    return quirks.has("loads late")


def load_checkpoint() -> None:
    """Load the chosen checkpoint unless it is loaded. The caller holds the host's queue."""
    if loads_late():
        with contextlib.suppress(ValueError):  # there is no checkpoint to load
            sd_models.forge_model_reload()


def raise_if_unsupported(backend: WebuiBackend, settings: Settings) -> None:
    """Raise `Unsupported` if these settings cannot work with the loaded checkpoint and the host's options."""
    if backend.kind == "flow":
        raise Unsupported("flow models such as SD3 have no noise prediction that memnoise could adjust")
    if needs_gradient(settings) and getattr(shared.cmd_opts, "lowvram", False):
        raise Unsupported(
            f"{METHODS[settings.method].label} needs gradients, which --lowvram does not allow; use --medvram, "
            "batch-wise or per-sample's rule forward"
        )
