"""Doubles of the host as processes, and what goes wrong with them: they die, start again, hang, answer with errors."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx

REPOSITORY = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


class Process:
    """A double on a port of its own. A context manager; `kill` and `start` as often as wanted."""

    def __init__(self, checkpoint: str = "sd1", *flags: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._command = [sys.executable, "-m", "tests.hosts.serve", str(self.port), checkpoint, *flags]
        self._running: subprocess.Popen[bytes] | None = None

    def start(self, wait: bool = True) -> Process:
        self._running = subprocess.Popen(self._command, cwd=REPOSITORY, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while wait and not self.answers():
            assert self._running.poll() is None, "the double ended at once"
            assert time.monotonic() < deadline, "the double does not answer"
            time.sleep(0.1)
        return self

    def answers(self) -> bool:
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{self.url}/sdapi/v1/options", timeout=5, trust_env=False).status_code in (200, 401)
        return False

    def kill(self) -> None:
        """As a crash: no answer to what it was doing."""
        if self._running is not None:
            self._running.kill()
            self._running.wait()
            self._running = None

    def __enter__(self) -> Process:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.kill()


@contextlib.contextmanager
def in_front(url: str) -> Iterator[Front]:
    """A proxy in front of a double, which spoils what it is told to."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    front = Front(f"http://127.0.0.1:{server.server_port}", url)
    server.front = front  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield front
    finally:
        server.shutdown()
        server.server_close()


class Front:
    """`spoil` holds what becomes of the next generations: a status, "hang", "cut", or None, which passes."""

    def __init__(self, url: str, behind: str) -> None:
        self.url = url
        self.behind = behind
        self.spoil: list[int | str | None] = []
        self.passed = 0
        """Generations that were answered."""
        self.patience = 3.0
        """Seconds of a hang."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._pass(None)

    def do_POST(self) -> None:
        self._pass(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def _pass(self, body: bytes | None) -> None:
        front: Front = self.server.front  # type: ignore[attr-defined]
        generates = self.path.endswith("/txt2img")
        fate = front.spoil.pop(0) if generates and front.spoil else None
        if fate == "hang":
            time.sleep(front.patience)
        if isinstance(fate, int):
            return self._answer(fate, b'{"detail": "out of order"}')
        if fate == "hang":
            return self._answer(504, b"")
        answer = httpx.request(
            self.command, front.behind + self.path, content=body, timeout=60, trust_env=False,
            headers={"Content-Type": "application/json"},
        )  # fmt: skip
        front.passed += generates
        self._answer(answer.status_code, answer.content, cut=fate == "cut")

    def _answer(self, status: int, content: bytes, *, cut: bool = False) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(content[: len(content) // 2] if cut else content)
        self.close_connection = cut
