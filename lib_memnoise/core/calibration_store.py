"""Calibrations on disk, each in a file of its own."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass, replace
from pathlib import Path

from lib_memnoise.core.calibration import LOWEST, TOLERANCE, BadCalibration, Calibration, Key, from_document
from lib_memnoise.core.files import replacing


def serves(timestep: int, other: int) -> bool:
    """Whether a calibration for one first timestep can be used at another."""
    return timestep == other or (abs(timestep - other) <= TOLERANCE and min(timestep, other) >= LOWEST)


@dataclass(frozen=True)
class CalibrationStore:
    """A folder of calibrations. Several processes may read and write it, since files are replaced as a whole."""

    folder: Path

    def path(self, key: Key) -> Path:
        """The file of a key's calibration."""
        return self.folder / f"{key.name}.json"

    def save(self, calibration: Calibration) -> Path:
        """Write a calibration to its file.

        Raises:
            OSError: the file cannot be written.
        """
        path = self.path(calibration.key)
        with replacing(path) as partial:
            partial.write_text(json.dumps(calibration.document()), encoding="utf-8")
        return path

    def load(self, key: Key) -> tuple[Calibration | None, str | None]:
        """The calibration for a key if there is one, and a sentence if its file was damaged.

        A damaged file is renamed, so that the next calibration replaces it.
        """
        path = self.path(key)
        try:
            calibration = from_document(json.loads(path.read_text(encoding="utf-8")))
            if calibration.key != key:
                raise BadCalibration("it belongs to another checkpoint")
            return calibration, None
        except FileNotFoundError:
            return None, None
        except (OSError, ValueError, RecursionError) as error:
            return None, self._set_aside(path, error)

    def nearest(self, key: Key) -> tuple[Calibration | None, list[str]]:
        """The best calibration for a key, and a sentence for every file that was damaged.

        It has the same checkpoint and size, and a first timestep that is at most `TOLERANCE` away; neither timestep is
        below `LOWEST` unless they are equal. Calibrations made with the user's prompts come before those made with
        built-in ones, and then the nearest timestep decides. The scores are those of its own timestep, not converted.
        """
        candidates, problems = [], []
        for path in sorted(self.folder.glob(f"{key.name.rsplit('-', 1)[0]}-*.json")):
            timestep = path.stem.rsplit("-", 1)[1]
            if not timestep.isdigit() or not serves(int(timestep), key.timestep):
                continue
            calibration, problem = self.load(replace(key, timestep=int(timestep)))
            candidates += [calibration] if calibration else []
            problems += [problem] if problem else []
        candidates.sort(key=lambda one: (one.source in (None, "built-in"), abs(one.key.timestep - key.timestep)))
        return (candidates[0] if candidates else None), problems

    def _set_aside(self, path: Path, error: Exception) -> str:
        reason = str(error) if isinstance(error, BadCalibration) else "it cannot be read"
        aside = path.with_suffix(f".damaged-{threading.get_native_id()}")
        try:
            path.replace(aside)
        except OSError:
            return f"the calibration {path.name} is damaged ({reason})"
        return f"the calibration {path.name} was damaged ({reason}) and is now {aside.name}"

    def all(self) -> list[Calibration]:
        """Every calibration that can be read."""
        calibrations = []
        for path in sorted(self.folder.glob("*.json")):
            try:
                calibrations.append(from_document(json.loads(path.read_text(encoding="utf-8"))))
            except (OSError, ValueError, RecursionError):
                continue
        return calibrations
