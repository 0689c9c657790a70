"""The miniature gives the same latents in a real WebUI as outside it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lib_memnoise.lab.experiment import subjects
from lib_memnoise.lab.miniature.checkpoint import NAMES, install, shipped
from lib_memnoise.lab.miniature.model import load_miniature, to_images
from lib_memnoise.lab.simulator import generate, noises
from lib_memnoise.settings import from_mapping
from tests.contract.conftest import close
from tests.hosts import webui

pytestmark = pytest.mark.skipif(webui.locate() is None, reason="SD_WEBUI_DIR names no WebUI")
LATENTS = Path(__file__).resolve().parents[1] / "hosts" / "latents"


@pytest.fixture(scope="module", params=["eps", "v"])
def host(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, str]]:
    folder = tmp_path_factory.mktemp("miniature")
    root, _ = webui.locate()  # type: ignore[misc]
    if request.param not in shipped():
        pytest.skip("this variant is not shipped yet")
    install(root, checkpoints=folder, variants=(request.param,))
    with webui.WebUI(folder, NAMES[request.param], extensions=[LATENTS]) as running:
        yield running, request.param


SETTINGS: dict[str, dict[str, Any]] = {
    "none": {"enabled": False},
    "static tau": {"enabled": True, "gamma": 0.0, "tau": 900},
    "batch-wise": {"enabled": True},
    "per-sample": {"enabled": True, "method": "per_sample", "target": 0.7, "target_kind": "fraction"},
}


@pytest.mark.parametrize("sampler", ["DDIM", "Euler"])
@pytest.mark.parametrize("name", SETTINGS)
def test_same_latents(host: tuple[Any, str], tmp_path: Path, sampler: str, name: str) -> None:
    running, variant = host
    caption, seed = subjects(memorised=True, held_out=True)[0].caption, 1234
    saved = tmp_path / "latents.pt"
    answer = running.txt2img(
        {
            "prompt": caption, "seed": seed, "batch_size": 2, "steps": 50, "cfg_scale": 7, "sampler_name": sampler,
            "width": 128, "height": 128,
            "alwayson_scripts": {"memnoise": {"args": [SETTINGS[name]]}, "latents": {"args": [str(saved)]}},
        }
    )  # fmt: skip
    assert answer.status == 200, answer.detail
    model = load_miniature(variant)
    here = generate(model, [caption] * 2, noises([seed, seed + 1]), from_mapping(SETTINGS[name]), sampler=sampler)
    there = torch.load(saved)
    relative = (there - here.latents).flatten(1).norm(dim=1) / here.latents.flatten(1).norm(dim=1)
    assert relative.max() < 2e-2, relative
    ours = to_images(model.decode(here.latents))
    for image in range(2):
        assert close(answer.images[image - 2], ours[image]) < 2.0
