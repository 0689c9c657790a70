"""`Double`: a WebUI without a WebUI, in this process, with the interface of the real one's harness."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..response import Response, read

ROOT = Path(__file__).resolve().parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

FLAGS = ("--api",)
"""What it is started with unless told otherwise, as the real one's harness does."""

SETTINGS: dict[str, Any] = {"samples_save": False, "grid_save": False, "show_progress_type": "Approx cheap"}
DEFAULTS: dict[str, Any] = {
    "prompt": "a cat",
    "negative_prompt": "",
    "seed": 1,
    "steps": 5,
    "width": 64,
    "height": 64,
    "sampler_name": "DDIM",
    "cfg_scale": 5,
}


class HostError(RuntimeError):
    """The double cannot run here, or did not do what it was told."""


class Double:
    """Context manager: the host with one extension; each starts afresh.

    Several may be open, but a process has one `modules` package: using one suspends the other, which starts again,
    with its settings and checkpoint as they were, when it is next used.

    Beside the answers it tells what happened inside: `calls` and `rows` of the network, `reports` of exceptions
    that the host logged and swallowed, `last_p`, `latents`. All four are emptied by the next generation.

    `cmd_args` are the host's flags, behind `FLAGS`, of which `drop_args` leaves some out.
    """

    name = "double"
    is_real = is_fork = False
    _active: Double | None = None

    def __init__(
        self,
        extension_dir: Path | str | None,
        checkpoint: str = "sd1",
        cmd_args: Sequence[str] = (),
        *,
        drop_args: Sequence[str] = (),
        extensions: Sequence[Path | str] = (),
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        dirs = ([] if extension_dir is None else [extension_dir]) + list(extensions)
        self.extension_dirs = [str(Path(x).resolve()) for x in dirs]
        self.checkpoint = checkpoint
        self.cmd_args = (*(flag for flag in FLAGS if flag not in drop_args), *cmd_args)
        self.settings = {**SETTINGS, **(settings or {})}
        self.app: Any = None
        self.startup_reports: list[str] = []
        self._client: Any = None

    def __enter__(self) -> Double:
        loaded = sys.modules.get("modules")
        if loaded is not None and str(ROOT) not in [str(Path(x).parent) for x in loaded.__path__]:
            raise HostError(f"another host's package `modules` is loaded in this process: {list(loaded.__path__)}")
        self.activate()
        return self

    def __exit__(self, *exc: object) -> None:
        if Double._active is self:
            self._suspend()

    def activate(self) -> None:
        """Make `modules` this double's, where another one was used last."""
        if Double._active is self:
            return
        if Double._active is not None:
            Double._active._suspend()
        from modules import _startup
        from modules._record import record
        from starlette.testclient import TestClient

        self._adapt()
        self._record = record
        self.app = _startup.start(self.extension_dirs, self.checkpoint, self.cmd_args, self.settings)
        self.startup_reports = record.reports
        record.reset()
        self._client = TestClient(self.app, raise_server_exceptions=False)
        if "--api-auth" in self.cmd_args:
            user, _, password = self.cmd_args[self.cmd_args.index("--api-auth") + 1].split(",")[0].partition(":")
            self._client.auth = (user, password)
        Double._active = self

    def _suspend(self) -> None:
        from modules import _startup, shared

        self.settings = dict(shared.opts.data)
        Double._active = None
        self._client.close()
        _startup.stop()
        self._restore()

    def _adapt(self) -> None:
        """For doubles of the host's forks: change `modules` before it starts."""

    def _restore(self) -> None:
        """Undo that."""

    # Requests

    def get(self, path: str, **kw: Any) -> Any:
        self.activate()
        return self._client.get(path, **kw)

    def post(self, path: str, json: Any = None, **kw: Any) -> Any:
        self.activate()
        return self._client.post(path, json=json, **kw)

    def txt2img(self, payload: Mapping[str, Any], *, path: str = "/sdapi/v1/txt2img") -> Response:
        """Generate; small and quick where the payload says nothing. An error is an answer, not an exception."""
        self.activate()
        self._record.reset()
        begin = time.perf_counter()
        answer = self.post(path, {**DEFAULTS, **payload})
        seconds = time.perf_counter() - begin
        try:
            raw = answer.json()
        except ValueError:
            raw = {}
        return read(answer.status_code, raw, answer.text, seconds)

    def img2img(self, payload: Mapping[str, Any]) -> Response:
        return self.txt2img(payload, path="/sdapi/v1/img2img")

    def load(self, checkpoint: str) -> None:
        """Switch to another checkpoint, as the settings do."""
        self.set_options({"sd_model_checkpoint": f"{checkpoint}.safetensors"})
        if self._chosen() != checkpoint:
            raise HostError(f"asked for {checkpoint}, got {self._chosen()}")
        self.checkpoint = checkpoint

    def _chosen(self) -> str:
        from modules import shared

        variant: str = shared.sd_model.sd_checkpoint_info.variant
        return variant

    def set_options(self, options: Mapping[str, Any]) -> None:
        answer = self.post("/sdapi/v1/options", dict(options))
        if answer.status_code != 200:
            raise HostError(f"options {dict(options)}: {answer.status_code} {answer.text}")

    @contextlib.contextmanager
    def options(self, **options: Any) -> Iterator[None]:
        """Settings for a while; afterwards what was stored is stored again, except the checkpoint."""
        self.activate()
        from modules.shared import opts

        before = dict(opts.data)
        self.set_options(options)
        try:
            yield
        finally:
            self.activate()
            kept = ("sd_model_checkpoint", "sd_checkpoint_hash")
            opts.data = {**before, **{key: opts.data[key] for key in kept if key in opts.data}}

    # The page

    def page(self, tab: str = "txt2img", **values: Any) -> tuple[Any, ...]:
        """Press Generate: components by element id (`txt2img_steps=5`; an InputAccordion by its own), failing that by
        label; the others as they are when the page loads.

        Returns what the page shows: pictures, metadata as JSON, infotext as HTML, comments or an error as HTML.
        """
        self.activate()
        from modules import ui

        function, inputs, _ = ui.page_functions[tab]
        left = dict(values)
        args: list[Any] = []
        for component in inputs:
            value = 0 if component.elem_id == "script_list" else component.value
            for name in (component.elem_id, (component.elem_id or "").removesuffix("-checkbox"), component.label):
                if name in left:
                    value = left.pop(name)
                    break
            args.append(value)
        if left:
            raise KeyError(f"no component of {tab} is called {sorted(left)}")
        self._record.reset()
        return function(*args)

    def paste(self, infotext: str, tab: str = "txt2img") -> dict[str, Any]:
        """What the paste button would set: element ids to values, or to whole updates that have none."""
        self.activate()
        from modules import infotext_utils

        fields = infotext_utils.paste_fields[tab]["fields"]
        updates = zip(fields, infotext_utils.paste_updates(infotext, fields))
        return {
            component.elem_id: update["value"]
            for (component, _), update in updates
            if "value" in update and component.elem_id
        }

    # What happened inside

    @property
    def calls(self) -> list[Any]:
        """Every evaluation of the network in the last generation: (timestep, rows)."""
        return self._record.calls

    @property
    def rows(self) -> int:
        return self._record.rows

    @property
    def reports(self) -> list[str]:
        """Exceptions that were logged and swallowed."""
        return self._record.reports

    @property
    def last_p(self) -> Any:
        return self._record.last_p

    @property
    def latents(self) -> list[torch.Tensor]:
        """Of every batch, before decoding and after `post_sample` (hires: before it)."""
        return self._record.latents

    @property
    def last_latent(self) -> torch.Tensor:
        return self._record.latents[-1]
