"""A real WebUI as a child process, for tests that speak to it over HTTP."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from tests.hosts.response import Response, read

REPOSITORY = Path(__file__).resolve().parents[2]

FLAGS = (
    "--api",
    "--skip-prepare-environment",
    "--skip-version-check",
    "--skip-torch-cuda-test",
    "--skip-python-version-check",
    "--no-download-sd-model",
    "--do-not-download-clip",
    "--no-hashing",
    "--use-cpu",
    "all",
    "--no-half",
    "--precision",
    "full",
    "--disable-console-progressbars",
    "--no-prompt-history",
    "--server-name",
    "127.0.0.1",
)

# Forge and reForge need it where there is no GPU.
FORK_FLAGS = ("--always-cpu",)

SETTINGS: dict[str, Any] = {
    "samples_save": False,
    "grid_save": False,
    # The default preview fetches a model.
    "show_progress_type": "Approx cheap",
    "auto_launch_browser": "Disable",
}


class HostError(RuntimeError):
    """The WebUI did not start, or died; the message ends with its log's tail."""


def locate() -> tuple[Path, Path] | None:
    """The WebUI's folder and Python from the environment, or None where there is no WebUI to test."""
    folder = os.environ.get("SD_WEBUI_DIR")
    if not folder:
        return None
    root = Path(folder).absolute()
    candidates = (
        Path(os.environ["SD_WEBUI_PYTHON"]).absolute() if os.environ.get("SD_WEBUI_PYTHON") else None,
        root / "venv" / "bin" / "python",
        root.parent / "venv" / "bin" / "python",
    )
    for python in candidates:
        if python is not None and python.exists():
            return root, python
    raise HostError(f"SD_WEBUI_DIR is {root}, but no Python was found for it; set SD_WEBUI_PYTHON")


def is_fork(root: Path) -> bool:
    """Whether a WebUI's folder is Forge's or reForge's."""
    return (root / "modules_forge").is_dir()


def loses_errors(root: Path) -> bool:
    """Whether the page does not say what failed, as in reForge."""
    thread = root / "modules_forge" / "main_thread.py"
    return thread.is_file() and "last_exception" not in thread.read_text(encoding="utf-8")


class WebUI:
    """Context manager: a WebUI with a data folder of its own, the project as its extension ``memnoise``.

    ``checkpoints`` is the folder of models; ``checkpoint`` the file's stem that is loaded at the start.
    ``extensions`` are further extension folders. ``extra_args`` go behind the default flags and win over
    them; ``drop_args`` removes default flags that take no value. ``repository=None`` leaves the project out.
    """

    is_real = True

    def __init__(
        self,
        checkpoints: Path,
        checkpoint: str = "sd1",
        *,
        extensions: Iterable[Path] = (),
        extra_args: Sequence[str] = (),
        drop_args: Sequence[str] = (),
        settings: Mapping[str, Any] | None = None,
        env: Mapping[str, str] | None = None,
        repository: Path | None = REPOSITORY,
        timeout: float = 240.0,
        log: Path | None = None,
    ) -> None:
        found = locate()
        if found is None:
            raise HostError("set SD_WEBUI_DIR to a WebUI's folder")
        self.root, self.python = found
        self.is_fork = is_fork(self.root)
        self.loses_errors = loses_errors(self.root)
        self.name = f"webui {self._version()}{' fork' if self.is_fork else ''}"
        self.checkpoints = Path(checkpoints).absolute()
        self.checkpoint = checkpoint
        self.repository = repository
        self.extensions = [Path(e).absolute() for e in extensions]
        # With a data folder elsewhere, Forge does not serve its own scripts unless told to.
        forks = (*FORK_FLAGS, "--gradio-allowed-path", str(self.root))
        flags = (*FLAGS, *forks) if self.is_fork else FLAGS
        self.args = [*(f for f in flags if f not in drop_args), *extra_args]
        self.settings = {**SETTINGS, "sd_model_checkpoint": f"{checkpoint}.safetensors", **(settings or {})}
        self.env = dict(env or {})
        self.timeout = timeout
        self.url = ""
        self.start_seconds = 0.0
        self.process: subprocess.Popen[bytes] | None = None
        self.data = Path()
        self._keep_log = Path(log).absolute() if log is not None else None
        self.log = self._keep_log or Path()
        self._client: httpx.Client | None = None

    def __enter__(self) -> WebUI:
        # The host would quietly load another one.
        if not (self.checkpoints / f"{self.checkpoint}.safetensors").is_file():
            raise HostError(f"there is no checkpoint {self.checkpoint} in {self.checkpoints}")
        self.data = Path(tempfile.mkdtemp(prefix="webui-data-"))
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End the WebUI and everything it started, and remove its data folder."""
        if self._client is not None:
            self._client.close()
            self._client = None
        if self.process is not None:
            # SIGTERM is not enough: the WebUI waits for running requests.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None
        if self.data != Path():
            shutil.rmtree(self.data, ignore_errors=True)

    # --- requests

    def get(self, path: str, **kw: Any) -> httpx.Response:
        return self._request("GET", path, **kw)

    def post(self, path: str, json: Any = None, **kw: Any) -> httpx.Response:
        return self._request("POST", path, json=json, **kw)

    def txt2img(self, payload: Mapping[str, Any], *, path: str = "/sdapi/v1/txt2img") -> Response:
        """Generate; an error is an answer too (``status``, ``detail``), not an exception."""
        begin = time.perf_counter()
        answer = self.post(path, {**self._defaults(), **payload})
        seconds = time.perf_counter() - begin
        try:
            raw = answer.json()
        except ValueError:
            raw = {}
        return read(answer.status_code, raw, answer.text, seconds)

    def img2img(self, payload: Mapping[str, Any]) -> Response:
        return self.txt2img(payload, path="/sdapi/v1/img2img")

    def load(self, checkpoint: str) -> None:
        """Switch to another checkpoint, named by its file's stem."""
        self.set_options({"sd_model_checkpoint": f"{checkpoint}.safetensors"})
        loaded = str(self.get("/sdapi/v1/options").json()["sd_model_checkpoint"])
        if loaded.split(" [")[0] != f"{checkpoint}.safetensors":
            raise HostError(f"asked for {checkpoint}, got {loaded}\n{self.log_tail()}")
        self.checkpoint = checkpoint

    def set_options(self, options: Mapping[str, Any]) -> None:
        answer = self.post("/sdapi/v1/options", dict(options))
        if answer.status_code != 200:
            raise HostError(f"options {dict(options)}: {answer.status_code} {answer.text}\n{self.log_tail()}")

    def log_text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.is_file() else ""

    def log_tail(self, lines: int = 40) -> str:
        return "\n".join(self.log_text().splitlines()[-lines:])

    # --- the process

    def _version(self) -> str:
        changes = self.root / "CHANGELOG.md"
        text = changes.read_text(encoding="utf-8") if changes.is_file() else ""
        found = re.search(r"^## v?([\d.]+)", text, re.MULTILINE)
        return found.group(1) if found else "unknown"

    def _defaults(self) -> dict[str, Any]:
        """Small and quick unless the test says otherwise."""
        return {
            "prompt": "a cat",
            "negative_prompt": "",
            "seed": 1,
            "steps": 5,
            "width": 64,
            "height": 64,
            "sampler_name": "DDIM",
            "cfg_scale": 5,
        }

    def _request(self, method: str, path: str, **kw: Any) -> httpx.Response:
        assert self._client is not None, "the WebUI is not running"
        try:
            return self._client.request(method, path, **kw)
        except httpx.TransportError as e:
            raise HostError(f"{method} {path}: {type(e).__name__}: {e}\n{self.log_tail()}") from e

    def _start(self) -> None:
        extensions = self.data / "extensions"
        extensions.mkdir()
        if self.repository is not None:
            (extensions / "memnoise").symlink_to(self.repository, target_is_directory=True)
        for extension in self.extensions:
            (extensions / extension.name).symlink_to(extension, target_is_directory=True)
        (self.data / "config.json").write_text(json.dumps(self.settings), encoding="utf-8")
        (self.data / "tmp").mkdir()
        if self._keep_log is None:
            self.log = self.data / "webui.log"
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"

        env = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "GRADIO_ANALYTICS_ENABLED": "False",
            "PYTHONUNBUFFERED": "1",
            "TMPDIR": str(self.data / "tmp"),
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
            # Its page must not open, and its argument list must be ours alone.
            "SD_WEBUI_RESTARTING": "1",
            "COMMANDLINE_ARGS": "",
        }
        for name in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"):
            env.pop(name, None)
        env.update(self.env)
        command = [
            str(self.python),
            "launch.py",
            "--data-dir",
            str(self.data),
            "--ckpt-dir",
            str(self.checkpoints),
            "--port",
            str(port),
            *self.args,
        ]
        auth = None
        if "--api-auth" in self.args:
            user, _, password = self.args[self.args.index("--api-auth") + 1].split(",")[0].partition(":")
            auth = (user, password)
        # Forge closes the connection behind an error's answer.
        limits = httpx.Limits(max_keepalive_connections=0)
        self._client = httpx.Client(base_url=self.url, auth=auth, timeout=self.timeout, trust_env=False, limits=limits)
        begin = time.perf_counter()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                cwd=self.root,
                env=env,
                start_new_session=True,
                preexec_fn=_die_with_parent,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self._wait_until_up(begin + self.timeout)
        self.start_seconds = time.perf_counter() - begin

    def _wait_until_up(self, deadline: float) -> None:
        assert self._client is not None and self.process is not None
        state = "no answer yet"
        while time.perf_counter() < deadline:
            if self.process.poll() is not None:
                raise HostError(f"the WebUI ended with code {self.process.returncode}\n{self.log_tail()}")
            if "Startup time" not in self.log_text():
                # A request that comes while the host still adds middleware to its started server kills it.
                time.sleep(0.2)
                continue
            try:
                # The port answers before the model is there; this call waits for the model, and names it.
                answer = self._client.get("/sdapi/v1/options", timeout=60)
                state = f"{answer.status_code}: {answer.text[:200]}"
                expected = 200 if {"--api", "--nowebui"} & set(self.args) else 404
                if answer.status_code == expected and self._model_is_loaded():
                    return
            except httpx.TransportError as e:
                state = f"{type(e).__name__}: {e}"
            time.sleep(0.2)
        raise HostError(f"the WebUI was not ready after {self.timeout:.0f} s ({state})\n{self.log_tail()}")

    def _model_is_loaded(self) -> bool:
        if "--skip-load-model-at-start" in self.args or "--ui-debug-mode" in self.args:
            return True
        text = self.log_text()
        if "Stable diffusion model failed to load" in text:
            raise HostError(f"{self.checkpoint} failed to load\n{self.log_tail(80)}")
        # Forge loads it when it first generates, reForge at the start, which it then says.
        return self.is_fork or "Model loaded in" in text


def _die_with_parent() -> None:
    """A killed test run must not leave the WebUI behind; it runs in the child, before the WebUI."""
    if sys.platform == "linux":
        parent_death_signal = 1
        ctypes.CDLL(None).prctl(parent_death_signal, signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
