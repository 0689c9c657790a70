"""Where the WebUI's calibrations are, and which one belongs to the loaded checkpoint."""

from __future__ import annotations

from pathlib import Path

from modules import paths, shared

from lib_memnoise.calibration import Key
from lib_memnoise.host.network import network
from lib_memnoise.store import CalibrationStore


def store() -> CalibrationStore:
    """In the WebUI's data folder."""
    return CalibrationStore(Path(paths.data_path) / "memnoise" / "calibrations")


def parameterization() -> str:
    """The loaded checkpoint's, "eps", "v" or "flow"."""
    return network().kind


def key(timestep: float, width: int, height: int) -> Key:
    """The loaded checkpoint is known by its hash; by its name where the host was told not to hash."""
    info = shared.sd_model.sd_checkpoint_info
    return Key(str(info.sha256 or info.name), width, height, parameterization(), round(timestep))
