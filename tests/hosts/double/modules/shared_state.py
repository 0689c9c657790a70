"""`shared.state`: what the host is doing, and whether the user wants it to stop."""

from __future__ import annotations

import datetime
import time
from typing import Any


class State:
    def __init__(self) -> None:
        self.server_start = time.time()
        self.need_restart = False
        self.server_command: str | None = None
        self.job_timestamp = "0"
        self.time_start: float | None = None
        self._clear("")
        self.job_count = 0

    def _clear(self, job: Any) -> None:
        self.skipped = self.interrupted = self.stopping_generation = False
        self.job = job
        self.job_no = 0
        self.job_count = -1
        self.processing_has_refined_job_count = False
        self.sampling_step = self.sampling_steps = 0
        self.current_latent: Any = None
        self.current_image: Any = None
        self.current_image_sampling_step = 0
        self.id_live_preview = 0
        self.textinfo: str | None = None

    def begin(self, job: Any = "(unknown)") -> None:
        steps = self.sampling_steps
        self._clear(job)
        self.sampling_steps = steps
        self.time_start = time.time()
        self.job_timestamp = datetime.datetime.now().strftime("%Y%m%d%H%M%S")

    def end(self) -> None:
        self.job = ""
        self.job_count = 0

    def skip(self) -> None:
        self.skipped = True

    def interrupt(self) -> None:
        self.interrupted = True

    def stop_generating(self) -> None:
        self.stopping_generation = True

    def nextjob(self) -> None:
        self.job_no += 1
        self.sampling_step = 0
        self.current_image_sampling_step = 0

    def dict(self) -> dict[str, Any]:
        names = (
            "skipped interrupted stopping_generation job job_count job_timestamp job_no sampling_step sampling_steps"
        ).split()
        return {name: getattr(self, name) for name in names}

    def set_current_image(self) -> None:
        pass

    def do_set_current_image(self) -> None:
        pass

    def assign_current_image(self, image: Any) -> None:
        self.current_image = image
        self.id_live_preview += 1
