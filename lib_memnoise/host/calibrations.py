"""Where the WebUI's calibrations are, and which checkpoint is loaded."""

from __future__ import annotations

from pathlib import Path

from modules import paths, shared

from lib_memnoise.store import CalibrationStore


def store() -> CalibrationStore:
    """In the WebUI's data folder."""
    return CalibrationStore(Path(paths.data_path) / "memnoise" / "calibrations")


def checkpoint_id() -> str:
    """The loaded checkpoint's hash; its name where the host was told not to hash."""
    info = shared.sd_model.sd_checkpoint_info
    return str(info.sha256 or info.name)
