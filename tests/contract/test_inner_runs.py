"""Generations that another extension runs inside of one, or on its result, are left alone; and so is the outer one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.contract.conftest import HOSTS, ROUNDING, Studio, close, open_host
from tests.hosts.response import encode_image

INNER_RUNS = Path(__file__).resolve().parents[1] / "hosts" / "inner_runs"
METHODS: list[dict[str, Any]] = [
    {"tau": 500},
    {"method": "per_sample", "target_kind": "fraction", "target": 0.8},
]


@pytest.fixture(scope="module", params=HOSTS)
def studio(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    with open_host(request.param, tmp_path_factory, extensions=[INNER_RUNS]) as host:
        yield Studio(host)


def check_untouched(studio: Studio, picture: np.ndarray, how: str, seed: int, image: np.ndarray) -> None:
    """The inner run's picture is what the host's API gives for the same values, with memnoise not in the request."""
    payload = {
        "prompt": "a detailed face", "negative_prompt": "blurry", "seed": seed + 100, "steps": 8, "cfg_scale": 6,
        "width": 64, "height": 64, "sampler_name": "DDIM",
    }  # fmt: skip
    if how == "txt2img":
        assert np.array_equal(picture, studio.host.txt2img(payload).image)
        return
    answer = studio.host.img2img({**payload, "init_images": [encode_image(image)], "denoising_strength": 0.6})
    # The host draws from an unseeded generator when it encodes a picture.
    assert close(picture, answer.image) <= ROUNDING


def own_words(infotext: str) -> list[str]:
    return re.findall(r'Memnoise[^:,]*: (?:"[^"]*"|[^,]*)', infotext)


@pytest.mark.parametrize("settings", METHODS)
@pytest.mark.parametrize("how", ["img2img", "txt2img"])
def test_runs_inside_of_one(studio: Studio, how: str, settings: dict[str, Any]) -> None:
    batch = {"batch_size": 2, "n_iter": 2}
    plain, alone = studio.run(**batch), studio.run(settings, **batch)
    scripts = {"memnoise": {"args": [True, settings]}, "inner runs": {"args": [how]}}
    answer = studio.answer(alwayson_scripts=scripts, **batch)
    assert answer.status == 200, answer.detail
    assert len(answer.images) == 4 + 4

    for index in range(4):
        outer, inner = index, 4 + index
        assert np.array_equal(answer.images[outer], alone.pictures[index])
        assert own_words(answer.infotexts[outer]) == own_words(alone.infotexts[outer])
        assert not np.array_equal(answer.images[outer], plain.pictures[index])
        check_untouched(studio, answer.images[inner], how, 7 + index, answer.images[outer])
        if how == "txt2img":
            assert "Memnoise" not in answer.infotexts[inner]
    for key, value in alone.info["extra_generation_params"].items():
        if key.startswith("Memnoise"):
            assert answer.info["extra_generation_params"][key] == value, key
    if not studio.is_real:
        assert studio.host.reports == []

    # nothing lingers
    assert all(map(np.array_equal, studio.run(settings, **batch).pictures, alone.pictures))
    assert all(map(np.array_equal, studio.run(**batch).pictures, plain.pictures))


@pytest.mark.parametrize("settings", METHODS)
def test_a_run_on_the_result(studio: Studio, settings: dict[str, Any]) -> None:
    alone = studio.run(settings)
    answer = studio.answer([True, settings], script_name="Run afterwards", script_args=[])
    assert answer.status == 200, answer.detail
    first, second = answer.images
    assert np.array_equal(first, alone.images[0])
    assert own_words(answer.infotexts[0]) == own_words(alone.infotexts[0])
    check_untouched(studio, second, "img2img", 7, first)
