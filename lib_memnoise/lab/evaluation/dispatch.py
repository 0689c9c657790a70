"""Many makers, one queue: whoever is free takes the next unit, and what one could not make another does."""

from __future__ import annotations

import queue
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import tenacity

from lib_memnoise.lab.evaluation.plan import Request, Unit
from lib_memnoise.lab.evaluation.run import Made
from lib_memnoise.lab.miniature import OneSentence

ATTEMPTS = 4
"""Of one unit that is answered with errors, before it is set aside."""
MOST_ASIDE = 20
"""Units set aside with none made in between, before there is no use in going on."""
PATIENCE = 15
"""Attempts in a row that a maker has: about ten minutes, beside the time they take."""
LONGEST = 60.0
"""Seconds between two attempts, at most."""


class Unanswered(OneSentence):
    """A maker cannot be reached, or has trouble of its own: worth another attempt, and others can do its work."""


class Refused(Unanswered):
    """A maker was reached and could not make this unit: worth a few attempts."""


class Maker(Protocol):
    """Makes images, one request after the other."""

    @property
    def name(self) -> str: ...

    @property
    def in_process(self) -> bool:
        """It computes here: what it is at when all is stopped is waited for."""

    def source(self) -> dict[str, Any]:
        """What its images are made by: the checkpoint and versions, which are the same for all of a run.

        Raises:
            Unanswered: to be tried again. OneSentence: it is none that can be used.
        """

    def __call__(self, request: Request) -> list[Made]:
        """The images of a request, in the order of their seeds.

        Raises:
            Unanswered, Refused: to be tried again. OneSentence: no use in going on.
        """


def retrying(
    attempts: int, say: Callable[[str], None], sleep: Callable[[float], None] | None = None
) -> tenacity.Retrying:
    """Attempts, less and less often, as long as what is called is `Unanswered`."""

    def before_sleep(state: tenacity.RetryCallState) -> None:
        assert state.outcome is not None and state.next_action is not None
        say(f"{state.outcome.exception()} Again in {state.next_action.sleep:.0f} s.")

    return tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(Unanswered),
        wait=tenacity.wait_exponential(multiplier=0.5, max=LONGEST),
        stop=tenacity.stop_after_attempt(attempts),
        sleep=sleep or tenacity.nap.sleep,
        before_sleep=before_sleep,
        reraise=True,
    )


@dataclass
class Told:
    """What became of the units that were not made."""

    aside: dict[Unit, str] = field(default_factory=dict)
    """Units set aside after all attempts, and why."""
    gone: list[str] = field(default_factory=list)
    """Why makers were given up."""


class Shared:
    """Units that several makers take from; what one gives back comes first."""

    def __init__(self, units: Iterator[Unit]) -> None:
        self._units = units
        self._returned: list[Unit] = []
        self._away = 0
        self._changed = threading.Condition()
        self._stopped = threading.Event()

    def take(self) -> Unit | None:
        """The next unit; None when all are made, or it was stopped. Waits while others may still give one back."""
        with self._changed:
            while not self._stopped.is_set():
                unit = self._returned.pop() if self._returned else next(self._units, None)
                if unit is not None:
                    self._away += 1
                    return unit
                if not self._away:
                    self._stopped.set()  # wakes those who wait for another attempt
                else:
                    self._changed.wait()
            return None

    def made(self) -> None:
        """A unit that was taken needs no more work."""
        self._back(None)

    def give_back(self, unit: Unit) -> None:
        self._back(unit)

    def _back(self, unit: Unit | None) -> None:
        with self._changed:
            self._away -= 1
            if unit is not None:
                self._returned.append(unit)
            self._changed.notify_all()

    def stop(self) -> None:
        with self._changed:
            self._stopped.set()
            self._changed.notify_all()

    def sleep(self, seconds: float) -> None:
        self._stopped.wait(seconds)


def make(
    makers: Sequence[Maker],
    units: Iterator[Unit],
    request: Callable[[Unit], Request],
    keep: Callable[[Unit, list[Made]], None],
    begin: Callable[[dict[str, Any], str], None],
    *,
    patience: int = PATIENCE,
    say: Callable[[str], None] = lambda text: None,
) -> Told:
    """Have the makers make all units; `keep` is called in this thread with each unit's images.

    A maker that does not answer is asked again, less and less often, `patience` times; its unit goes back to the others
    at once. `say` is told of it. `begin` is called with every maker's origin and name before it makes anything, and
    raises what is wrong with it.

    Raises:
        OneSentence: of a maker, where there is no use in going on. Unanswered: all makers are given up. What was made
        until then is kept.
    """
    shared, told, turn = Shared(units), Told(), threading.Lock()
    answers: queue.Queue[tuple[Unit, list[Made]] | BaseException | None] = queue.Queue()
    refusals: Counter[Unit] = Counter()
    in_a_row = 0

    def one(maker: Maker) -> bool:
        """Take a unit and make it; False when there is none left."""
        nonlocal in_a_row
        unit = shared.take()
        if unit is None:
            return False
        try:
            made = maker(request(unit))
        except Refused as error:
            refusals[unit] += 1
            if refusals[unit] < ATTEMPTS:
                shared.give_back(unit)
                raise
            told.aside[unit] = str(error)
            in_a_row += 1
            shared.made()
            if in_a_row == MOST_ASIDE:
                raise OneSentence(f"{MOST_ASIDE} requests in a row failed; the last: {error}") from None
            return True
        except BaseException:
            shared.give_back(unit)
            raise
        in_a_row = 0
        answers.put((unit, made))
        shared.made()
        return True

    def drive(maker: Maker) -> None:
        attempts = retrying(patience, say, shared.sleep)
        try:
            source = attempts.copy()(maker.source)
            with turn:
                begin(source, maker.name)
            while attempts.copy()(one, maker):
                pass
        except Unanswered as error:
            told.gone.append(str(error))
            say(f"{maker.name} is given up.")
        except BaseException as error:
            answers.put(error)
        answers.put(None)

    threads = [threading.Thread(target=drive, args=(maker,), daemon=True) for maker in makers]
    for thread in threads:
        thread.start()
    working = len(makers)
    try:
        while working:
            answer = answers.get()
            if answer is None:
                working -= 1
            elif isinstance(answer, BaseException):
                raise answer
            else:
                keep(*answer)
    finally:
        shared.stop()
        # A process that ends while torch computes in it is aborted.
        for maker, thread in zip(makers, threads):
            if maker.in_process:
                thread.join(LONGEST)
    if len(told.gone) == len(makers):
        raise Unanswered(told.gone[-1])
    return told
