"""The makers of other machines, by Dask: every worker has a WebUI (or the miniature) of its own."""

from __future__ import annotations

import functools
import itertools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from lib_memnoise.lab.evaluation.dispatch import ATTEMPTS, MOST_ASIDE, Maker, Told, Unanswered, retrying
from lib_memnoise.lab.evaluation.plan import Request, Unit
from lib_memnoise.lab.evaluation.run import Made
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
def maker_of(kind: str, url: str, auth: str | None) -> Maker:
    """This worker's maker, made once."""
    from lib_memnoise.lab.evaluation.generators import MiniatureMaker, WebUIMaker

    return MiniatureMaker(kind) if not url else WebUIMaker(os.environ.get(URL, url), auth)


def work(request: Request, kind: str, url: str, auth: str | None, source: dict[str, Any]) -> list[Made]:
    """Make a request on a worker; its maker must be of the run's origin."""
    from distributed import print as say

    maker = maker_of(kind, url, auth)
    attempts = retrying(ATTEMPTS, say)
    found = attempts.copy()(lambda: dict(maker.source()))
    if found != source:
        raise OneSentence(f"{maker.name} is of another origin: {found} instead of {source}.")
    return list(attempts.copy()(maker, request))


def make(
    address: str,
    units: Iterator[Unit],
    request: Callable[[Unit], Request],
    keep: Callable[[Unit, list[Made]], None],
    begin: Callable[[dict[str, Any], str], None],
    *,
    kind: str,
    url: str,
    auth: str | None,
    say: Callable[[str], None] = lambda text: None,
) -> Told:
    """Have a cluster's workers make all units, a few at a time ahead of them.

    What a lost worker had is made by another (Dask's own doing); each unit is kept once.

    Args:
        address: of the scheduler.
        begin: called with the origin of the images and who tells it: the first worker.
        kind: the miniature's variant, if `url` is "".

    Raises:
        Unanswered: no scheduler or no worker. OneSentence: see `making.make`.
    """
    try:
        from concurrent.futures import CancelledError

        from distributed import Client, wait
        from distributed import TimeoutError as DaskTimeout
        from distributed.comm import CommClosedError
    except ImportError as error:
        raise ModuleNotFoundError(name="distributed") from error
    try:
        client = Client(address, timeout=CONNECT)
        client.wait_for_workers(1, timeout=WAIT)
    except (OSError, DaskTimeout, ValueError) as error:
        raise Unanswered(f"there is no Dask scheduler with a worker at {address} ({error}).") from None
    told, in_a_row = Told(), 0
    with client:
        asked: dict[Any, Unit] = {}

        def threads() -> int:
            found = client.scheduler_info(n_workers=-1)["workers"].values()
            return sum(worker["nthreads"] for worker in found)

        def finished(futures: list[Any]) -> set[Any]:
            """Those that came back; waits for one, and for a worker where none is left."""
            seen = time.monotonic()
            while True:
                with suppress(DaskTimeout):
                    return set(wait(futures, timeout=LOOK, return_when="FIRST_COMPLETED").done)
                if threads():
                    seen = time.monotonic()
                elif time.monotonic() > seen + WAIT:
                    raise Unanswered(f"no worker is left at {address}.")
                else:
                    say(f"No worker is left at {address}; waiting for one.")

        def ask(unit: Unit) -> None:
            asked[client.submit(work, request(unit), kind, url, auth, source, pure=False)] = unit

        try:
            first = client.submit(origin, kind, url, auth, pure=False)
            finished([first])
            source = first.result()
            begin(source, "the first worker")
            for unit in itertools.islice(units, 2 * max(1, threads())):
                ask(unit)
            while asked:
                for future in finished(list(asked)):
                    unit = asked.pop(future)
                    failed = future.exception()
                    if failed is None:
                        keep(unit, future.result())
                        in_a_row = 0
                    elif isinstance(failed, OneSentence) and not isinstance(failed, Unanswered):
                        raise failed
                    else:
                        told.aside[unit] = _sentence(failed)
                        in_a_row += 1
                        say(f"Set aside: {_sentence(failed)}")
                        if in_a_row == MOST_ASIDE:
                            raise OneSentence(f"{MOST_ASIDE} requests in a row failed; the last: {_sentence(failed)}")
                # Workers may have come meanwhile.
                for unit in itertools.islice(units, max(0, 2 * max(1, threads()) - len(asked))):
                    ask(unit)
        except (CancelledError, CommClosedError) as error:
            raise Unanswered(f"the Dask scheduler at {address} is gone ({type(error).__name__}).") from None
    return told


def _sentence(error: BaseException) -> str:
    """A lost worker's error has many lines."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def origin(kind: str, url: str, auth: str | None) -> dict[str, Any]:
    """What a worker's images are made by."""
    from distributed import print as say

    return dict(retrying(ATTEMPTS, say)(lambda: maker_of(kind, url, auth).source()))
