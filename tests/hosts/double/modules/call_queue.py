"""One generation at a time, and the wrappers of the page's functions."""

from __future__ import annotations

import html
import threading
import time
from collections.abc import Callable
from functools import wraps
from typing import Any

from modules import errors, shared

queue_lock = threading.Lock()


def wrap_queued_call(func: Callable) -> Callable:
    def f(*args: Any, **kwargs: Any) -> Any:
        with queue_lock:
            return func(*args, **kwargs)

    return f


def wrap_gradio_gpu_call(func: Callable, extra_outputs: list | None = None) -> Callable:
    """Takes the lock; an exception becomes a message in the last output, which must be HTML."""

    @wraps(func)
    def f(*args: Any, **kwargs: Any) -> Any:
        task = args[0] if args and isinstance(args[0], str) and args[0].startswith("task(") else None
        with queue_lock:
            shared.state.begin(job=task)
            res = func(*args, **kwargs)
            shared.state.end()
        return res

    return wrap_gradio_call(f, extra_outputs=extra_outputs, add_stats=True)


def wrap_gradio_call(func: Callable, extra_outputs: list | None = None, add_stats: bool = False) -> Callable:
    @wraps(func)
    def f(*args: Any, **kwargs: Any) -> Any:
        try:
            return func(*args, **kwargs)
        finally:
            state = shared.state
            state.skipped = state.interrupted = state.stopping_generation = False
            state.job_count = 0
            state.job = ""

    return wrap_gradio_call_no_job(f, extra_outputs, add_stats)


def wrap_gradio_call_no_job(func: Callable, extra_outputs: list | None = None, add_stats: bool = False) -> Callable:
    @wraps(func)
    def f(*args: Any, **kwargs: Any) -> tuple:
        begin = time.perf_counter()
        try:
            res = list(func(*args, **kwargs))
        except Exception as e:
            errors.report("the request failed", exc_info=True)
            message = html.escape(f"{type(e).__name__}: {e}")
            res = [*([None, ""] if extra_outputs is None else extra_outputs), f"<div class='error'>{message}</div>"]
        if add_stats:
            res[-1] += f"<div class='performance'><p class='time'>{time.perf_counter() - begin:.1f} sec.</p></div>"
        return tuple(res)

    return f
