"""img2img and inpainting: the added noise is adjusted, the picture never, and T is the pass's own first timestep."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.contract.conftest import HOSTS, ROUNDING, Run, Studio, close, open_host
from tests.hosts.response import encode_image

WITNESS = Path(__file__).resolve().parents[1] / "hosts" / "witness"
BATCH_WISE = {"gamma": 0.7, "rho": 50, "steps": 2}
PER_SAMPLE = {"method": "per_sample", "lr": 0.02, "target": 0, "max_steps": 4}


@pytest.fixture(scope="module", params=HOSTS)
def studio(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    with open_host(request.param, tmp_path_factory, extensions=[WITNESS]) as host:
        yield Studio(host)


def picture(height: int = 64, width: int = 64) -> np.ndarray:
    """Soft blobs of colour."""
    y, x = np.mgrid[:height, :width] / 10.0
    return (np.stack([np.sin(x), np.cos(y), np.sin(x + y)], 2) * 100 + 128).astype(np.uint8)


def mask() -> np.ndarray:
    """The right half is painted anew."""
    half = np.zeros((64, 64, 3), np.uint8)
    half[:, 32:] = 255
    return half


def payload(**more: Any) -> dict[str, Any]:
    return {"init_images": [encode_image(picture())], "denoising_strength": 0.7, "steps": 10, **more}


INPAINTING = {"mask": encode_image(mask()), "inpainting_fill": 1, "inpaint_full_res": False, "mask_blur": 0}


def same(studio: Studio, a: np.ndarray, b: np.ndarray) -> bool:
    """To the bit; but for real hosts, which draw from an unseeded generator when they encode a picture."""
    return np.array_equal(a, b) or (studio.is_real and close(a, b) <= ROUNDING)


def test_off_unless_asked_for(studio: Studio) -> None:
    plain = studio.run(**payload())
    assert "Memnoise" not in plain.infotexts[0]
    for settings in ({"enabled": False}, {"method": "none"}, {"method": "static", "tau": 999}):
        assert same(studio, studio.run(settings, **payload()).pictures[0], plain.pictures[0])


@pytest.mark.parametrize("more", [{}, INPAINTING], ids=["whole", "masked"])
@pytest.mark.parametrize("model", ["sd1", "sd2-v", "sdxl", "sd1-inpainting"])
@pytest.mark.parametrize("sampler", ["DDIM", "Euler", "DPM++ 2M SDE"])
def test_the_added_noise_is_what_the_paper_says(studio: Studio, model: str, sampler: str, more: dict[str, Any]) -> None:
    studio.host.load(model)
    numbers = {"gamma": 0.05, "rho": 20, "steps": 3} if model == "sd2-v" else BATCH_WISE
    for settings, expected, bound in ((numbers, numbers, 1e-4), (PER_SAMPLE, {"lr": 0.02, "max_steps": 4}, 5e-3)):
        scripts = {"memnoise": {"args": [True, settings]}, "witness": {"args": [json.dumps(expected), ""]}}
        answer = studio.answer(alwayson_scripts=scripts, sampler_name=sampler, batch_size=2, **payload(**more))
        assert answer.status == 200, answer.detail
        text = answer.infotexts[-1]
        assert "Memnoise failed" not in text, text
        assert float(text.split("Witness: ")[1].split(",")[0]) < bound
    studio.host.load("sd1")


@pytest.mark.parametrize("sampler", ["DDIM", "UniPC", "Euler", "DPM++ SDE"])
def test_guidance_is_off_until_tau(studio: Studio, sampler: str) -> None:
    given = payload(sampler_name=sampler, scheduler="Simple")
    nothing = studio.run({"method": "static", "tau": 999}, **given)
    off = studio.run({"method": "static", "tau": 0}, **given)
    unguided = studio.run(**given, cfg_scale=0)
    used = off.read("Memnoise used")
    assert used is not None and 500 < float(used.split("T=")[1]) < 900
    assert "started at" not in (off.read("Memnoise note") or "")
    # A last step at timestep 0 has guidance.
    assert close(off.pictures[0], unguided.pictures[0]) < 0.2 * close(nothing.pictures[0], unguided.pictures[0])
    assert off.number("rows") < 0.7 * nothing.number("rows")


def test_extra_noise_is_counted_in(studio: Studio) -> None:
    """With more noise than the schedule's, Δ is measured on what the sampler will see: its first step is spared."""
    with studio.options({"img2img_extra_noise": 0.2}):
        for sampler in ("DDIM", "Euler"):
            plain = studio.run({"trace": "on", "method": "none"}, sampler_name=sampler, **payload())
            first = trace_of(studio, plain)[0]
            assert plain.number("magnitude") == pytest.approx(first, rel=1e-3)


def trace_of(studio: Studio, run: Run) -> list[float]:
    name = run.info["extra_generation_params"]["Memnoise trace id"]
    document = studio.host.get(f"/memnoise/v1/trace/{name}").json()
    return [point["magnitude"] for point in document["images"][0]["points"]]


def test_every_batch_is_what_it_is_alone(studio: Studio) -> None:
    """The host samples every batch of an img2img request with the same sampler."""
    for settings in (BATCH_WISE, {"method": "static", "tau": 400}, PER_SAMPLE):
        several = studio.run({**settings, "trace": "on"}, n_iter=3, **payload())
        for image in range(3):
            alone = studio.run({**settings, "trace": "on"}, **payload(seed=7 + image))
            assert same(studio, several.pictures[image], alone.pictures[0]), (settings, image)
            for key in ("rows", "norm"):
                assert several.number(key, image) == alone.number(key)


def test_what_is_not_painted_stays(studio: Studio) -> None:
    plain = studio.run(**payload(**INPAINTING))
    for settings in (BATCH_WISE, PER_SAMPLE):
        run = studio.run(settings, **payload(**INPAINTING))
        assert run.read("Memnoise failed") is None
        # The decoder sees some way across the edge.
        kept, painted = (close(run.pictures[0][:, a:b], plain.pictures[0][:, a:b]) for a, b in ((0, 16), (40, 64)))
        assert kept <= ROUNDING and painted > 3 * max(kept, 0.1)


def test_reuse_and_costs(studio: Studio) -> None:
    nothing = studio.run({"method": "none"}, **payload())
    assert studio.run({"method": "static", "tau": 999}, **payload()).number("rows") == nothing.number("rows")
    per_sample = studio.run({"method": "per_sample", "target": 0.8, "target_kind": "fraction"}, **payload())
    steps = per_sample.number("steps taken")
    assert steps > 0 and per_sample.number("rows") == nothing.number("rows") + 2 * steps
    # The pass begins below τ = 900, and waits for its share: one step.
    assert studio.run(BATCH_WISE, **payload()).number("rows") == nothing.number("rows") + 8 - 1
    assert studio.run({**BATCH_WISE, "tau": 900}, **payload()).number("rows") == nothing.number("rows") + 8


def test_noise_as_drawn_beside_it(studio: Studio) -> None:
    on = studio.run({**BATCH_WISE, "trace": "on"}, **payload())
    compared = studio.run({**BATCH_WISE, "trace": "compare"}, **payload())
    assert same(studio, on.pictures[0], compared.pictures[0])
    name = compared.info["extra_generation_params"]["Memnoise trace id"]
    image = studio.host.get(f"/memnoise/v1/trace/{name}").json()["images"][0]
    assert len(image["drawn"]) == len(image["points"]) > 3
    assert image["drawn"][0]["magnitude"] == pytest.approx(compared.number("magnitude"), rel=1e-3)


def test_bad_settings_are_refused(studio: Studio) -> None:
    answer = studio.answer([True, {"tau": 2000}], **payload())
    assert answer.status == 422 and "tau = 2000" in answer.detail and "999" in answer.detail


def test_without_strength_the_picture_comes(studio: Studio) -> None:
    for strength in (0.0, 0.05):
        for sampler in ("DDIM", "Euler"):
            args = {"sampler_name": sampler, **payload(denoising_strength=strength)}
            plain, run = studio.answer(None, **args), studio.answer([True, BATCH_WISE], **args)
            assert run.status == plain.status
            if plain.status == 200:
                assert len(run.images) == 1
