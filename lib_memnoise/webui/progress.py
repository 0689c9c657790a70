"""Shows the progress of an adjustment: in the host's own progress, on the page and over HTTP, and as a console bar."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any

from modules import shared

from lib_memnoise.core.progress import OnProgress, Progress
from lib_memnoise.core.report import Generation

CONSOLE_DELAY = 1.0
"""Seconds before a bar appears in the console; most adjustments take less."""


@contextlib.contextmanager
def show_progress(generation: Generation) -> Iterator[OnProgress]:
    """A context that yields the function to report an adjustment's progress to.

    The host counts sampling steps from 0 when it begins to sample, and estimates the time left from the time since the
    job began. The time spent in this context is left out of that until the picture is finished (`count_time`).
    """
    state, bar, began = shared.state, None, time.time()
    steps = state.sampling_steps
    count_time(generation)

    def on_progress(progress: Progress) -> None:
        nonlocal bar
        state.sampling_step, state.sampling_steps = progress.done, progress.most
        state.textinfo = f"Memnoise: {progress}"
        if bar is None:
            bar = console_bar(progress.most)
        bar.total = progress.most
        bar.set_postfix_str(str(progress).partition(", ")[2], refresh=False)
        bar.update(progress.done - bar.n)

    try:
        yield on_progress
    finally:
        if bar is not None:
            bar.close()
        # The preview counts steps as well.
        state.sampling_step, state.sampling_steps, state.current_image_sampling_step = 0, steps, 0
        if getattr(state, "time_start", None) is not None:
            generation.left_out = time.time() - began
            state.time_start += generation.left_out


def count_time(generation: Generation) -> None:
    """Put back the time that `show_progress` left out of the time since the job began."""
    if generation.left_out:
        shared.state.time_start -= generation.left_out
        generation.left_out = 0.0


def console_bar(most: int) -> Any:
    from tqdm import tqdm  # the host has it

    return tqdm(
        total=most,
        desc="Memnoise",
        delay=CONSOLE_DELAY,
        file=getattr(shared, "progress_print_out", sys.stderr),
        disable=bool(getattr(shared.cmd_opts, "disable_console_progressbars", False)),
    )
