"""`PatcherDouble`: the double of A1111, changed into a host that patches a U-Net."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..double.host import Double

PACKAGES = Path(__file__).resolve().parent / "packages"


class PatcherDouble(Double):
    """As `Double`; also in the same process with others, of which one at a time is running."""

    name = "patcher"
    is_fork = True

    def _adapt(self) -> None:
        self._patch = pytest.MonkeyPatch()
        self._patch.syspath_prepend(PACKAGES)
        from . import changes

        changes.make(self._patch)

    def _restore(self) -> None:
        self._patch.undo()

    def _chosen(self) -> str:
        from modules import sd_models

        variant: str = sd_models.select_checkpoint().variant
        return variant
