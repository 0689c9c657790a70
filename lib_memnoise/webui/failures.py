"""What ends a mitigation without it being a fault."""

from __future__ import annotations

from typing import Any, TypeVar

from modules import shared

from lib_memnoise.settings import INFOTEXT

Error = TypeVar("Error", bound=Exception)
FAILED_CELLS = f"{INFOTEXT} failed cells"
"""Of a plot's info: why some of its cells are empty."""


def named_on_the_page(kind: type[Error]) -> type[Error]:
    """The page shows `{type's name}: {message}` of what is raised; there the type is called after the extension."""
    kind.__name__ = INFOTEXT
    return kind


@named_on_the_page
class Failed(RuntimeError):
    """A mitigation that failed, where the request asked to fail with it."""


class Interrupted(Exception):
    """The user asked to interrupt or skip."""


class Unsupported(RuntimeError):
    """What memnoise cannot work with, in one sentence."""


class NotCalibrated(Unsupported):
    """A generation goes by a calibration that there is not."""


def is_stopping() -> bool:
    """Whether nothing more is to be begun: interrupted, skipped, or asked to stop after the image at hand.

    The page's Interrupt means the latter with the host's default options, where more than one job is to be done.
    """
    state = shared.state
    return bool(state.interrupted or state.skipped or getattr(state, "stopping_generation", False))


def raise_if_interrupted() -> None:
    """Raises `Interrupted`, but not where the image at hand is still to be finished: that is to be mitigated."""
    # A direct call of the network bypasses the host's own check.
    if shared.state.interrupted or shared.state.skipped:
        raise Interrupted


def loses_errors(p: Any) -> bool:
    """Whether the page would not say what was raised: reForge's thread for the page's generations only prints it."""
    if getattr(p, "is_api", False):
        return False
    try:
        from modules_forge import main_thread
    except ImportError:
        return False
    return not hasattr(main_thread, "last_exception")


def expect_cells(p: Any) -> None:
    """`setup`: what a plot's cells, which are shallow copies of `p`, tell of their failures is kept in one place."""
    p.memnoise_failed_cells = []


def fails(p: Any, error: Exception) -> None:
    """This generation is about to fail. A plot goes on without the cell, and its info says why."""
    cells = getattr(p, "memnoise_failed_cells", None)
    if cells is not None:
        cells.append(str(error))
        keep_failed_cells(p)


def keep_failed_cells(p: Any) -> None:
    """Keep the failures in the parameters that a plot's cells share."""
    if cells := getattr(p, "memnoise_failed_cells", None):
        p.extra_generation_params[FAILED_CELLS] = list(cells)
