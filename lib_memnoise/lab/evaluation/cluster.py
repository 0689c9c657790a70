"""The generators of other machines, by Dask: every worker has a WebUI (or the miniature) of its own."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import suppress
from typing import Any

from lib_memnoise.lab.evaluation.dispatch import ATTEMPTS, DispatchResult, Generator, Unanswered, WorkQueue, retrying
from lib_memnoise.lab.evaluation.plan import Request, Unit
from lib_memnoise.lab.evaluation.run import GeneratedImage
from lib_memnoise.lab.miniature import OneSentence

URL = "MEMNOISE_URL"
"""A worker's environment: where it finds its WebUI, if not where all others do."""
WAIT = 60.0
"""Seconds for the first worker to come, or for another when none is left."""
CONNECT = 10.0
"""Seconds for the scheduler to answer."""
LOOK = 5.0
"""Seconds after which the workers are counted, where nothing came back."""


@functools.lru_cache(maxsize=1)
def generator_of(kind: str, url: str, auth: str | None) -> Generator:
    """This worker's generator, made once."""
    from lib_memnoise.lab.evaluation.generators import MiniatureGenerator, WebUIGenerator

    return MiniatureGenerator(kind) if not url else WebUIGenerator(os.environ.get(URL, url), auth)


def generate(request: Request, kind: str, url: str, auth: str | None, source: dict[str, Any]) -> list[GeneratedImage]:
    """The images of a request, on a worker; its generator must be of the run's origin."""
    from distributed import print as say

    generator = generator_of(kind, url, auth)
    attempts = retrying(ATTEMPTS, say)
    found = attempts.copy()(lambda: dict(generator.source()))
    if found != source:
        raise OneSentence(f"{generator.name} is of another origin: {found} instead of {source}.")
    return list(attempts.copy()(generator, request))


def _connected(address: str) -> Any:
    """A client of the scheduler, which has a worker.

    Raises:
        ModuleNotFoundError: Dask is not installed. Unanswered: no scheduler or no worker.
    """
    try:
        from distributed import Client
        from distributed import TimeoutError as DaskTimeout
    except ImportError as error:
        raise ModuleNotFoundError(name="distributed") from error
    try:
        client = Client(address, timeout=CONNECT)
        client.wait_for_workers(1, timeout=WAIT)
    except (OSError, DaskTimeout, ValueError) as error:
        raise Unanswered(f"there is no Dask scheduler with a worker at {address} ({error}).") from None
    return client


def _threads(client: Any) -> int:
    """Of all workers that there are now."""
    found = client.scheduler_info(n_workers=-1)["workers"].values()
    return sum(worker["nthreads"] for worker in found)


def _finished(client: Any, futures: Sequence[Any], address: str, say: Callable[[str], None]) -> set[Any]:
    """The futures that came back; waits for one, and for a worker where none is left.

    Raises:
        Unanswered: no worker came.
    """
    from distributed import TimeoutError as DaskTimeout
    from distributed import wait

    seen = time.monotonic()
    while True:
        with suppress(DaskTimeout):
            return set(wait(futures, timeout=LOOK, return_when="FIRST_COMPLETED").done)
        if _threads(client):
            seen = time.monotonic()
        elif time.monotonic() > seen + WAIT:
            raise Unanswered(f"no worker is left at {address}.")
        else:
            say(f"No worker is left at {address}; waiting for one.")


def dispatch(
    address: str,
    units: Iterator[Unit],
    request: Callable[[Unit], Request],
    keep: Callable[[Unit, list[GeneratedImage]], None],
    begin: Callable[[dict[str, Any], str], None],
    *,
    kind: str,
    url: str,
    auth: str | None,
    say: Callable[[str], None] = lambda text: None,
) -> DispatchResult:
    """Have a cluster's workers generate all units, a few at a time ahead of them.

    What a lost worker had another generates (Dask's own doing); each unit is kept once.

    Args:
        address: of the scheduler.
        begin: called with the origin of the images and who tells it: the first worker.
        kind: the miniature's variant, if `url` is "".

    Raises:
        Unanswered: no scheduler or no worker. OneSentence: see `dispatch.dispatch`.
    """
    client = _connected(address)
    from distributed.comm import CommClosedError

    work = WorkQueue(units)
    with client:
        asked: dict[Any, Unit] = {}

        def ask() -> None:
            """Workers may have come meanwhile: two units for every thread that there is now."""
            ahead = 2 * max(1, _threads(client))
            while len(asked) < ahead and (unit := work.take(wait=False)) is not None:
                asked[client.submit(generate, request(unit), kind, url, auth, source, pure=False)] = unit

        try:
            first = client.submit(origin, kind, url, auth, pure=False)
            _finished(client, [first], address, say)
            source = first.result()
            begin(source, "the first worker")
            ask()
            while asked:
                for future in _finished(client, list(asked), address, say):
                    unit = asked.pop(future)
                    failed = future.exception()
                    if failed is None:
                        keep(unit, future.result())
                        work.done(unit)
                    elif isinstance(failed, OneSentence) and not isinstance(failed, Unanswered):
                        raise failed
                    else:
                        say(f"Set aside: {_sentence(failed)}")
                        work.set_aside(unit, _sentence(failed))
                ask()
        except (CancelledError, CommClosedError) as error:
            raise Unanswered(f"the Dask scheduler at {address} is gone ({type(error).__name__}).") from None
    return work.result


def _sentence(error: BaseException) -> str:
    """A lost worker's error has many lines."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def origin(kind: str, url: str, auth: str | None) -> dict[str, Any]:
    """What a worker's images are generated by."""
    from distributed import print as say

    return dict(retrying(ATTEMPTS, say)(lambda: generator_of(kind, url, auth).source()))
