"""Ways to end a mitigation or to fail a request. They are needed because hosts swallow what hooks raise."""

from __future__ import annotations

from typing import Any, TypeVar

from modules import shared

from lib_memnoise.errors import Interrupted
from lib_memnoise.settings import INFOTEXT
from lib_memnoise.webui import quirks, session

Error = TypeVar("Error", bound=Exception)
FAILED_CELLS = f"{INFOTEXT} failed cells"
"""The key in a plot's info that says why some of its cells are empty."""


def named_on_the_page(kind: type[Error]) -> type[Error]:
    """Rename an error's type after the extension, because the page shows errors as `{type's name}: {message}`."""
    kind.__name__ = INFOTEXT
    return kind


@named_on_the_page
class Failed(RuntimeError):
    """A mitigation failed, and the request asked to fail with it."""


def is_stopping() -> bool:
    """Whether no further work should begin: interrupted, skipped, or stopping after the current image.

    With the host's default options the page's Interrupt stops after the current image if there is more than one job.
    """
    state = shared.state
    return bool(state.interrupted or state.skipped or getattr(state, "stopping_generation", False))


def raise_if_interrupted() -> None:
    """Raise `Interrupted` if interrupted or skipped, but not if the current image will still be finished."""
    # Calling the network directly bypasses the host's own check.
    if shared.state.interrupted or shared.state.skipped:
        raise Interrupted


def loses_errors(p: Any) -> bool:
    """Whether the page would not show an error that is raised."""
    return quirks.has("prints errors", p)


def expect_cells(p: Any) -> None:
    """`setup`: make the list of failures that a plot's cells share, since they are shallow copies of `p`."""
    setattr(p, session.FAILED_CELLS, [])


def fails(p: Any, error: Exception) -> None:
    """Record that this generation is about to fail. A plot goes on without the cell, and its info says why."""
    cells = getattr(p, session.FAILED_CELLS, None)
    if cells is not None:
        cells.append(str(error))
        keep_failed_cells(p)


def keep_failed_cells(p: Any) -> None:
    """Write the failures into the parameters that a plot's cells share."""
    if cells := getattr(p, session.FAILED_CELLS, None):
        p.extra_generation_params[FAILED_CELLS] = list(cells)


def refuse(p: Any, refusal: Exception) -> None:
    """Make the request fail with this sentence later, since the host would swallow it if it were raised here."""

    def init(*args: Any, **kwargs: Any) -> None:
        fails(p, refusal)
        if not loses_errors(p):
            raise refusal
        p.comment(f"{INFOTEXT}: {refusal}")
        p.n_iter, p.do_not_save_grid = 0, True

    p.init = init
