"""Every method at the bounds of every setting it has, in the host."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lib_memnoise.registry import METHODS
from lib_memnoise.settings import SPECS
from tests.contract.conftest import HOSTS, Studio, open_host
from tests.contract.test_nothing_to_adjust import LATENTS, sampled
from tests.test_bounds import CORNERS, at, cases


@pytest.fixture(scope="module", params=HOSTS)
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with open_host(request.param, tmp_path_factory, extensions=[LATENTS]) as host:
        yield host


@pytest.mark.parametrize("method", METHODS)
def test_bounds_give_a_picture(studio: Studio, tmp_path: Path, method: str) -> None:
    # When guidance starts is the gate's, the same for all.
    own = [case for case in cases() if case[0] == method and (method in SPECS[case[1]].methods or method == "none")]
    every = [at(*case) for case in own]
    every += [given for given in CORNERS if given.get("method", "batch_wise") == method]
    for settings in every:
        run, latents = sampled(studio, tmp_path / "latents", settings, steps=3, prompt="a red fox, " * 19)
        assert bool(torch.isfinite(latents).all()), settings
        assert run.read("Memnoise failed") is None, settings
