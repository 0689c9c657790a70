"""Errors the host logs and swallows; the double keeps them too, so that a test can demand that there are none."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from typing import Any

from modules._record import record

exception_records: list[dict[str, Any]] = []
already_displayed: dict[str, int] = {}


def record_exception() -> None:
    error = sys.exc_info()[1]
    if error is None:
        return
    frames = [[f"{x.filename}, line {x.lineno}, {x.name}", x.line] for x in traceback.extract_tb(error.__traceback__)]
    exception_records.append({"exception": str(error), "traceback": frames})
    del exception_records[:-5]


def get_exceptions() -> list[dict[str, Any]]:
    return exception_records[::-1]


def report(message: str, *, exc_info: bool = False) -> None:
    record_exception()
    text = "\n".join(f"*** {line}" for line in message.splitlines())
    if exc_info:
        text += "\n    " + traceback.format_exc().replace("\n", "\n    ")
    record.reports.append(text)
    print(text, file=sys.stderr)


def display(e: BaseException, task: str | None, *, full_traceback: bool = False) -> None:
    record_exception()
    text = f"{task or 'error'}: {type(e).__name__}\n" + "".join(traceback.format_exception(e))
    record.reports.append(text)
    print(text, file=sys.stderr)


def display_once(e: BaseException, task: str) -> None:
    if task not in already_displayed:
        already_displayed[task] = 1
        display(e, task)


def print_error_explanation(message: str) -> None:
    record_exception()
    record.reports.append(message)
    print(message, file=sys.stderr)


def run(code: Callable[[], Any], task: str) -> None:
    try:
        code()
    except Exception as e:
        display(e, task)
