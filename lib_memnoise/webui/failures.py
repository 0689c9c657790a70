"""The ways to end a mitigation, or to fail a request, in hosts that swallow what hooks raise."""

from __future__ import annotations

from typing import Any, TypeVar

from modules import shared

from lib_memnoise.errors import Interrupted
from lib_memnoise.settings import INFOTEXT
from lib_memnoise.webui import quirks, session

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
    """Whether the page would not say what was raised."""
    return quirks.has("prints errors", p)


def expect_cells(p: Any) -> None:
    """`setup`: what a plot's cells, which are shallow copies of `p`, tell of their failures is kept in one place."""
    setattr(p, session.FAILED_CELLS, [])


def fails(p: Any, error: Exception) -> None:
    """This generation is about to fail. A plot goes on without the cell, and its info says why."""
    cells = getattr(p, session.FAILED_CELLS, None)
    if cells is not None:
        cells.append(str(error))
        keep_failed_cells(p)


def keep_failed_cells(p: Any) -> None:
    """Keep the failures in the parameters that a plot's cells share."""
    if cells := getattr(p, session.FAILED_CELLS, None):
        p.extra_generation_params[FAILED_CELLS] = list(cells)


def refuse(p: Any, refusal: Exception) -> None:
    """Make the request fail with this sentence: the host would swallow it if it were raised from here."""

    def init(*args: Any, **kwargs: Any) -> None:
        fails(p, refusal)
        if not loses_errors(p):
            raise refusal
        p.comment(f"{INFOTEXT}: {refusal}")
        p.n_iter, p.do_not_save_grid = 0, True

    p.init = init
