"""Who may use the HTTP API: whoever may use the host's own, and nobody where the host serves none."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from lib_memnoise.settings import SPECS
from tests import browser
from tests.browser import HostPage
from tests.contract.conftest import HOSTS, open_host

ROUTES = [
    ("GET", "about"),
    ("GET", "schema"),
    ("GET", "calibrations"),
    ("GET", "trace/none"),
    ("POST", "score"),
    ("POST", "calibrate"),
    ("POST", "compare"),
    ("POST", "peak_memory"),
]
FLAGS = (("--nowebui",), ("--api",), ("--api-auth", "user:word"), ("--gradio-auth", "me:secret"))
EVERY = [tuple(itertools.compress(FLAGS, chosen)) for chosen in itertools.product((False, True), repeat=len(FLAGS))]
WRONG: dict[str, Any] = {"sampler_name": "Eular"}
"""Refused before anything is scored."""


def started(kind: str, flags: tuple[tuple[str, ...], ...], tmp_path_factory: pytest.TempPathFactory) -> Any:
    args = [*itertools.chain(*flags), *(["--skip-load-model-at-start"] if kind == "webui" else [])]
    named = {"extra_args" if kind == "webui" else "cmd_args": args}
    return open_host(kind, tmp_path_factory, drop_args=("--api",), **named)


def asked(host: Any, method: str, path: str, auth: Any) -> int:
    """The status of a request with these credentials; `None`: without any."""
    # What a client is made with goes along unless something else does.
    auth = auth or (lambda request: request)
    return int((host.get(path, auth=auth) if method == "GET" else host.post(path, WRONG, auth=auth)).status_code)


@pytest.mark.parametrize("kind", HOSTS)
@pytest.mark.parametrize("flags", EVERY, ids=lambda flags: " ".join(flag[0] for flag in flags) or "no flag")
def test_the_api_is_as_open_as_the_hosts_own(
    kind: str, flags: tuple[tuple[str, ...], ...], tmp_path_factory: pytest.TempPathFactory
) -> None:
    with started(kind, flags, tmp_path_factory) as host:
        names = {flag[0] for flag in flags}
        served = bool(names & {"--nowebui", "--api"})
        for auth in (None, ("user", "wrong"), ("me", "secret"), ("user", "word")):
            own = asked(host, "GET", "/sdapi/v1/options", auth)
            let_in = "--api-auth" not in names or auth == ("user", "word")
            assert own == (404 if not served else 200 if let_in else 401), auth
            for method, path in ROUTES:
                status = asked(host, method, f"/memnoise/v1/{path}", auth)
                if own == 200:
                    assert status not in (401, 405, 500) and (status != 404 or path.startswith("trace")), (path, auth)
                else:
                    assert status == own, (path, auth)


@pytest.fixture(params=HOSTS)
def without_api(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with open_host(request.param, tmp_path_factory, drop_args=("--api",)) as host:
        yield host


def test_the_page_needs_no_api(without_api: Any) -> None:
    """Its buttons and its plot are the page's own."""
    pytest.importorskip("uvicorn")
    real = without_api.is_real
    with (
        contextlib.nullcontext(without_api.url) if real else browser.served(without_api.app) as url,
        browser.browser() as running,
    ):
        from playwright.sync_api import expect

        page = HostPage(running, url, is_real=real, loses_errors=getattr(without_api, "loses_errors", False))
        page.small()
        page.open()
        with page.answered("task("):
            page.control("check").click()
        expect(page.control("verdict").first).to_contain_text("first timestep")
        page.open_more()
        page.choose("trace", (SPECS["trace"].choices or {})["on"])
        page.generate()
        expect(page.control("plot")).to_be_visible()
        assert without_api.get("/memnoise/v1/schema").status_code == 404
        page.close()
