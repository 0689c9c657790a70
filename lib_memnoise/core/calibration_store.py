"""Calibrations on disk, a file each."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass, replace
from pathlib import Path

from lib_memnoise.core.calibration import LOWEST, TOLERANCE, BadCalibration, Calibration, Key, from_document
from lib_memnoise.core.files import replacing


def serves(timestep: int, other: int) -> bool:
    """Whether a calibration of one first timestep serves at another."""
    return timestep == other or (abs(timestep - other) <= TOLERANCE and min(timestep, other) >= LOWEST)


@dataclass(frozen=True)
class CalibrationStore:
    """A folder of calibrations. Readers and writers may be several processes: files are replaced whole."""

    folder: Path

    def path(self, key: Key) -> Path:
        return self.folder / f"{key.name}.json"

    def save(self, calibration: Calibration) -> Path:
        path = self.path(calibration.key)
        with replacing(path) as partial:
            partial.write_text(json.dumps(calibration.document()), encoding="utf-8")
        return path

    def load(self, key: Key) -> tuple[Calibration | None, str | None]:
        """The calibration for a key if there is one, and a sentence if its file was damaged.

        A damaged file is set aside under another name: it is made again by the next calibration.
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
        """The calibration that serves for a key, and a sentence for every file that was damaged.

        One of the same checkpoint and size whose first timestep is at most `TOLERANCE` away, and neither below
        `LOWEST`: made with the user's own prompts rather than with built-in ones, and then the nearest. Its scores are
        those of its own timestep.
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
