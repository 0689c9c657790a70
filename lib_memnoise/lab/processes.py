"""Work on the miniature divided among processes: what comes of it does not depend on how many there are."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import Any, TypeVar

import torch

from lib_memnoise.lab.miniature import OneSentence
from lib_memnoise.lab.miniature.model import Miniature, load_miniature

Result = TypeVar("Result")


class Workers:
    """Processes that each have the miniature; one process is this one. A context manager, which ends them.

    Each has as many threads as torch has here, for on that depends how a sum is rounded.

    Raises:
        OneSentence: on leaving, where a process ended before its work did.
    """

    def __init__(self, model: Miniature, processes: int = 1) -> None:
        self._model = model
        self._others = set(multiprocessing.active_children())
        self._pool: ProcessPoolExecutor | None = None
        if processes > 1:
            # Spawned: a fork of a process that has run torch's threads may hang.
            self._pool = ProcessPoolExecutor(
                processes,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_begin,
                initargs=(torch.get_num_threads(),),
            )

    def submit(self, function: Callable[..., Result], *arguments: Any) -> Future[Result]:
        """Call `function(model, *arguments)`: at once in this process, or soon in another, to which all is pickled."""
        if self._pool is not None:
            return self._pool.submit(_call, self._model.parameterization, function, arguments)
        done: Future[Result] = Future()
        done.set_result(function(self._model, *arguments))
        return done

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is None:
            return
        if error is not None:
            for process in set(multiprocessing.active_children()) - self._others:
                process.terminate()
        self._pool.shutdown(cancel_futures=True)
        if isinstance(error, BrokenProcessPool):
            raise OneSentence(
                "a process ended before its work was done, as where memory is short; --processes takes fewer."
            ) from None


def _begin(threads: int) -> None:
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends the others
    threading.Thread(target=_end_with_the_first, daemon=True).start()


def _end_with_the_first() -> None:
    """Killed, it can end no other."""
    first = multiprocessing.parent_process()
    assert first is not None
    first.join()
    os._exit(1)


_load = functools.cache(load_miniature)


def _call(variant: str, function: Callable[..., Result], arguments: Sequence[Any]) -> Result:
    return function(_load(variant), *arguments)
