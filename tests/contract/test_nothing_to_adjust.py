"""With nothing to adjust, pictures and latents are bit-identical to those without memnoise."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lib_memnoise.registry import METHODS
from tests.contract.conftest import HOSTS, ROUNDING, Run, Studio, close, open_host
from tests.contract.test_generation import same
from tests.contract.test_img2img import payload as img2img
from tests.contract.test_methods import settings_of

LATENTS = Path(__file__).resolve().parents[1] / "hosts" / "latents"


@pytest.fixture(scope="module", params=HOSTS)
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with open_host(request.param, tmp_path_factory, extensions=[LATENTS]) as host:
        yield host


def sampled(studio: Studio, file: Path, settings: dict[str, Any] | None, **payload: Any) -> tuple[Run, torch.Tensor]:
    """A generation and its latents before they are decoded; pictures have eight bits."""
    scripts = {"latents": {"args": [str(file)]}}
    if settings is not None:
        scripts["memnoise"] = {"args": [True, settings]}
    run = studio.run(None, **payload, alwayson_scripts=scripts)
    return run, torch.load(file)


IDLE: dict[str, dict[str, Any]] = {
    "no adjustments": {"steps": 0, "guidance": "first"},
    "no strength": {"gamma": 0, "guidance": "first"},
    "no probe": {"rho": 0, "guidance": "first"},
    "guidance from τ = 999": {"gamma": 0, "tau": 999},
    "static from 999": {"method": "static", "tau": 999},
    "transition by 999": {"method": "dynamic", "latest": 999},
    "opposite until 999": {"method": "opposite_guidance", "latest": 999},
    "none": {"method": "none"},
    "traced": {"method": "none", "trace": "compare"},
    "against the negative prompt": {"method": "none", "reference": "negative"},
    "no steps": {"method": "per_sample", "max_steps": 0},
    "target reached": {"method": "per_sample", "target": 1000},
    "no steps on vectors": {"method": "prompt_embedding", "max_steps": 0},
    "vectors' target reached": {"method": "prompt_embedding", "target": 1000},
    "no steps of SAIL": {"method": "sail", "max_steps": 0, "redraws": 0},
    "SAIL's target reached": {"method": "sail", "target": 1000},
    "one noise": {"method": "noise_selection", "candidates": 1},
    "no tokens": {"method": "random_tokens", "tokens": 0},
    "attention as it is": {"method": "cross_attention", "bos_scale": 1, "mask_padding": False},
    "no step of DivIn": {"method": "divin", "eta": 0},
    **{
        f"none flagged, {method}": {"method": method, "when": "flagged", "threshold": 1000}
        for method in ("batch_wise", "per_sample", "random_tokens", "sail", "none")
    },
}
PAYLOADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "negative, two": {"negative_prompt": "blurry, ugly", "batch_size": 2},
    "long, AND": {"prompt": "a fox AND " + "snow, " * 80, "negative_prompt": "blurry"},
}


@pytest.mark.parametrize("payload", PAYLOADS.values(), ids=list(PAYLOADS))
@pytest.mark.parametrize("sampler", ["DDIM", "Euler a"])
def test_settings_that_change_nothing(studio: Studio, tmp_path: Path, sampler: str, payload: dict[str, Any]) -> None:
    payload = {"steps": 4, "sampler_name": sampler, **payload}
    plain, latents = sampled(studio, tmp_path / "latents", None, **payload)
    for name, settings in IDLE.items():
        run, found = sampled(studio, tmp_path / "latents", settings, **payload)
        assert run.read("Memnoise failed") is None, name
        assert same(run, plain) and torch.equal(found, latents), name


@pytest.mark.parametrize("model", ["sd1", "sdxl", "sd2-v"])
@pytest.mark.parametrize("negative", ["", "blurry, ugly"])
@pytest.mark.parametrize("prompt", ["", " ", "() AND [ ]"])
def test_an_empty_prompt_is_left_alone(studio: Studio, prompt: str, negative: str, model: str) -> None:
    studio.host.load(model)
    payload = {"prompt": prompt, "negative_prompt": negative, "steps": 4, "batch_size": 2}
    plain = studio.run(**payload)
    for method in METHODS if model == "sd1" else ("batch_wise", "per_sample", "random_tokens"):
        run = studio.run(settings_of(method), **payload)
        assert run.read("Memnoise failed") is None, method
        assert same(run, plain), method
        assert "the prompt is empty" in (run.read("Memnoise note", 1) or ""), method
        # The sampler's own: DDIM's 3 evaluations with 4 steps.
        assert run.number("rows") == len(prompt.split("AND")) * 3 + 3, method


def test_an_empty_prompt_in_each_way_of_looking(studio: Studio) -> None:
    payload = {"prompt": "", "negative_prompt": "blurry", "steps": 4}
    plain = studio.run(**payload)
    for settings in (
        {"when": "flagged", "threshold": 0},
        {"when": "flagged", "threshold": 0, "method": "per_sample"},
        {"trace": "on"},
        {"trace": "compare"},
        {"reference": "negative"},
        {"guidance": "transition", "opposite": 3, "latest": 100},
    ):
        run = studio.run(settings, **payload)
        assert same(run, plain) and run.read("Memnoise failed") is None, settings
        flagged = settings.get("when") == "flagged"
        assert run.read("Memnoise mitigated") == ("False" if flagged else None)


def test_an_empty_prompt_in_img2img_and_in_one_of_two_passes(studio: Studio) -> None:
    given = img2img(prompt="", negative_prompt="blurry")
    pairs = zip(studio.run({}, **given).pictures, studio.run(**given).pictures)
    # Real hosts draw from an unseeded generator when they encode a picture.
    assert all(np.array_equal(a, b) or (studio.is_real and close(a, b) <= ROUNDING) for a, b in pairs)
    hires: dict[str, Any] = {
        "enable_hr": True, "hr_scale": 2, "hr_upscaler": "Latent", "denoising_strength": 0.7, "steps": 4,
        "negative_prompt": "blurry",
    }  # fmt: skip
    plain = studio.run(prompt="", hr_prompt="a fox", **hires)
    first = studio.run({}, prompt="", hr_prompt="a fox", **hires)
    second = studio.run({"hires": True}, prompt="", hr_prompt="a fox", **hires)
    assert same(first, plain) and not same(second, plain)
    assert second.read("Memnoise used") is None and second.read("Memnoise hires used") is not None


def test_a_prompt_that_comes_later_is_not_empty(studio: Studio) -> None:
    payload = {"prompt": "[:a fox:0.5]", "negative_prompt": "blurry"}
    assert "the prompt is empty" not in (studio.run({}, **payload).read("Memnoise note") or "")


def test_without_guidance_there_is_none_to_hold_back(studio: Studio) -> None:
    for scale in (1, 0.5, 0):
        payload = {"cfg_scale": scale, "negative_prompt": "blurry", "steps": 4}
        plain = studio.run(**payload)
        for settings in ({"method": "static"}, {"method": "dynamic"}, {"gamma": 0}, {"method": "none", "trace": "on"}):
            run = studio.run(settings, **payload)
            assert same(run, plain), (scale, settings)
            assert f"the CFG scale {scale:g} is no guidance" in (run.read("Memnoise note") or "")
    # Opposite guidance turns away from the prompt at any scale.
    assert not same(studio.run({"method": "opposite_guidance"}, cfg_scale=1), studio.run(cfg_scale=1))
