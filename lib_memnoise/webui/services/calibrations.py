"""Where the WebUI's calibrations are, and which one belongs to the loaded checkpoint."""

from __future__ import annotations

from pathlib import Path

from modules import paths, shared

from lib_memnoise.core.calibration import Calibration, Key, unit
from lib_memnoise.core.calibration_store import CalibrationStore
from lib_memnoise.webui.backends.base import WebuiBackend


def store() -> CalibrationStore:
    """In the WebUI's data folder."""
    return CalibrationStore(Path(paths.data_path) / "memnoise" / "calibrations")


def serving(backend: WebuiBackend, timestep: float, width: int, height: int) -> tuple[Calibration | None, list[str]]:
    """The calibration by which the loaded checkpoint's scores are judged, and what is wrong with others.

    One of another first timestep is converted: what it has in common with this one is how far the predicted clean
    latents differ. Where they cannot be told from the output (ᾱ = 0, in ε) there is none.
    """
    known, problems = store().nearest(key(backend, timestep, width, height))
    if known is None or known.key.timestep == round(timestep):
        return known, problems
    here, there = (unit(known.key.parameterization, backend.alpha_bar(t)) for t in (timestep, known.key.timestep))
    return (known.at(here / there) if here > 0 and there > 0 else None), problems


def key(backend: WebuiBackend, timestep: float, width: int, height: int) -> Key:
    """The loaded checkpoint is known by its hash; by its name where the host was told not to hash."""
    info = shared.sd_model.sd_checkpoint_info
    return Key(str(info.sha256 or info.name), width, height, backend.kind, round(timestep))
