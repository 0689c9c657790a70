"""The backends: how each kind of host evaluates its network.

Hosts are distinguished by what their checkpoint has, not by their names: AUTOMATIC1111 (`compvis`) calls the
checkpoint's `apply_model`; hosts whose checkpoint has `forge_objects` patch a U-Net (`unet_patcher`).
"""

from modules import shared

from lib_memnoise.webui.backends.base import WebuiBackend


def detect() -> WebuiBackend:
    """The backend for the loaded checkpoint. A pass detects it once and passes it on."""
    if hasattr(shared.sd_model, "forge_objects"):
        from lib_memnoise.webui.backends import unet_patcher

        return unet_patcher.UnetPatcherBackend()
    from lib_memnoise.webui.backends import compvis

    return compvis.CompVisBackend()
