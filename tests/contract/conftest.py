"""The same scenarios run against doubles of two hosts and, where SD_WEBUI_DIR names one, a real WebUI.

"double" stands for A1111, "patcher" for hosts that patch a U-Net (Forge).
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import browser
from tests.hosts import webui

REPOSITORY = Path(__file__).resolve().parents[2]
HOSTS = ["double", "patcher", *(["webui"] if webui.locate() else [])]
REACHING = (
    "test_img2img.py", "test_inner_runs.py", "test_opposite.py", "test_unsupported.py", "test_witness.py",
)  # fmt: skip
"""Scenarios that are tried on both doubles: what reaches the host's network in its own way. With EVERY_DOUBLE=1 all of
them are, but for the page and its passwords, which the hosts have in common."""
NEVER = ("test_access.py", "test_page.py")


def pytest_report_header() -> str:
    return f"memnoise hosts: {', '.join(HOSTS)}" + ("" if "webui" in HOSTS else " (SD_WEBUI_DIR names no WebUI)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    every = bool(os.environ.get("EVERY_DOUBLE"))
    again = [
        item
        for item in items
        if item.path.name in NEVER or not (every or item.path.name in REACHING)
        if item.path.parent.name == "contract" and "patcher" in re.split(r"[\[\]-]", item.name)
    ]
    config.hook.pytest_deselected(items=again)
    items[:] = [item for item in items if item not in again]


def open_host(kind: str, tmp_path_factory: pytest.TempPathFactory, **kwargs: Any) -> Any:
    if kind == "webui":
        from tests.hosts import checkpoints, fork_checkpoints

        root, python = webui.locate()  # type: ignore[misc]
        kept = os.environ.get("SD_WEBUI_CHECKPOINTS")
        folder = Path(kept) if kept else tmp_path_factory.getbasetemp() / "checkpoints"
        folder.mkdir(exist_ok=True)
        maker = fork_checkpoints if webui.is_fork(root) else checkpoints
        maker.make_checkpoints(folder, root, python)  # type: ignore[attr-defined]
        return webui.WebUI(folder, "sd1", **kwargs)
    from tests.hosts.double.host import Double
    from tests.hosts.patcher_double.host import PatcherDouble

    return (PatcherDouble if kind == "patcher" else Double)(REPOSITORY, "sd1", **kwargs)


@pytest.fixture(scope="module", params=HOSTS)
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with open_host(request.param, tmp_path_factory) as host:
        yield host


@pytest.fixture(scope="module")
def address(running: Any) -> Iterator[str]:
    """Where the host answers other programs."""
    if not running.is_real:
        pytest.importorskip("uvicorn")
        with browser.served(running.app) as url:
            yield url
    else:
        yield running.url


@dataclass
class Run:
    """One generation's images and what memnoise wrote of them."""

    images: list[np.ndarray]
    infotexts: list[str]
    info: dict[str, Any] = field(repr=False)
    count: int = 1

    def read(self, key: str, image: int = 0) -> str | None:
        """An infotext value, unquoted."""
        text = self.infotexts[image + len(self.infotexts) - self.count].rsplit("\n", 1)[-1]
        found = re.search(rf'(?:^|, ){re.escape(key)}: ("(?:\\.|[^"\\])*"|[^,]*)', text)
        return found.group(1).strip('"') if found else None

    def number(self, key: str, image: int = 0) -> float:
        value = self.read(f"Memnoise {key}", image)
        assert value is not None, f"no {key} in {self.infotexts}"
        return float(value)

    @property
    def pictures(self) -> list[np.ndarray]:
        """Without the grid."""
        return self.images[-self.count :]


class Studio:
    """A host with short words for what the scenarios do."""

    def __init__(self, host: Any) -> None:
        self.host = host
        self.is_real: bool = host.is_real
        self.is_fork: bool = host.is_fork
        """Forge or reForge."""

    @contextlib.contextmanager
    def options(self, changed: dict[str, Any]) -> Iterator[None]:
        """With some of the host's options changed (`override_settings` would let some of them stay)."""
        if not changed:
            yield
            return
        # The forks list some options only when they have been set; the tests set such to True.
        unset = dict.fromkeys(changed, False) if self.is_fork else {}
        current = {**unset, **self.host.get("/sdapi/v1/options").json()}
        self.host.set_options(changed)
        try:
            yield
        finally:
            self.host.set_options({name: current[name] for name in changed})

    def answer(self, args: Any = None, **payload: Any) -> Any:
        body = {
            "prompt": "a red fox in the snow", "negative_prompt": "", "seed": 7, "steps": 8, "cfg_scale": 6,
            "width": 64, "height": 64, "sampler_name": "DDIM", **payload,
        }  # fmt: skip
        if args is not None:
            body["alwayson_scripts"] = {"memnoise": {"args": args}}
        if self.is_fork and body.get("enable_hr"):  # which have no defaults for these
            body |= {"hr_additional_modules": ["Use same choices"], "hr_cfg": body["cfg_scale"]}
        return self.host.img2img(body) if "init_images" in body else self.host.txt2img(body)

    def run(self, settings: dict[str, Any] | None = None, **payload: Any) -> Run:
        """Generate; `settings` None leaves memnoise out of the request."""
        answer = self.answer(None if settings is None else [True, settings], **payload)
        assert answer.status == 200, f"{answer.status}: {answer.detail}"
        count = payload.get("batch_size", 1) * payload.get("n_iter", 1)
        return Run(answer.images, answer.infotexts, answer.info, count)


@pytest.fixture
def studio(running: Any) -> Iterator[Studio]:
    yield Studio(running)
    if running.checkpoint != "sd1":
        running.load("sd1")


def close(a: np.ndarray, b: np.ndarray) -> float:
    """Mean absolute difference of two pictures, of 255."""
    return float(np.abs(a.astype(float) - b.astype(float)).mean())


ROUNDING = 0.5
"""Of 255: pictures of one computation in another batch composition."""
