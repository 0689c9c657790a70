"""The WebUI's store of calibrations, and the calibration of the loaded checkpoint."""

from __future__ import annotations

from pathlib import Path

from modules import paths, shared

from lib_memnoise.core.calibration import Calibration, Key, unit
from lib_memnoise.core.calibration_store import CalibrationStore
from lib_memnoise.webui.backends.base import WebuiBackend


def store() -> CalibrationStore:
    """The store, in the WebUI's data folder."""
    return CalibrationStore(Path(paths.data_path) / "memnoise" / "calibrations")


def serving(backend: WebuiBackend, timestep: float, width: int, height: int) -> tuple[Calibration | None, list[str]]:
    """The calibration that the loaded checkpoint's scores are judged by, and sentences about damaged ones.

    A calibration for another first timestep is converted, on the assumption that the predicted clean latents differ as
    much at both. Where the output does not determine them (ᾱ = 0, in ε), there is no calibration.

    Args:
        timestep: T, the first timestep of the pass, 0…999.
        width, height: of the picture, in pixels.
    """
    known, problems = store().nearest(key(backend, timestep, width, height))
    if known is None or known.key.timestep == round(timestep):
        return known, problems
    here, there = (unit(known.key.parameterization, backend.alpha_bar(t)) for t in (timestep, known.key.timestep))
    return (known.at(here / there) if here > 0 and there > 0 else None), problems


def key(backend: WebuiBackend, timestep: float, width: int, height: int) -> Key:
    """The key of the loaded checkpoint, with its hash, or its name where hashing is turned off."""
    info = shared.sd_model.sd_checkpoint_info
    return Key(str(info.sha256 or info.name), width, height, backend.kind, round(timestep))
