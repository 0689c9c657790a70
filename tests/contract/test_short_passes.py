"""Passes that begin at or below a preset's τ: there it is a share of the first timestep, unless it was asked for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.contract.conftest import ROUNDING, Studio, close
from tests.contract.test_generation import NOTHING, SAMPLERS, SCHEDULES
from tests.contract.test_img2img import payload as img2img

SHARE = 900 / 981


def used(run: Any, name: str) -> float | None:
    values = dict(part.split("=") for part in (run.read("Memnoise used") or "").split(" "))
    return float(values[name]) if name in values else None


def guided(studio: Studio, run: Any, points: str = "points") -> list[bool]:
    """Whether guidance was on, step by step; "hires": in the second pass."""
    name = run.info["extra_generation_params"]["Memnoise trace id"]
    image = studio.host.get(f"/memnoise/v1/trace/{name}").json()["images"][0]
    return [point["guided"] for point in image[points]]


def same(studio: Studio, a: Any, b: Any) -> bool:
    """To the bit; but for real hosts, which draw from an unseeded generator when they encode a picture."""
    pairs = list(zip(a.pictures, b.pictures))
    return all(np.array_equal(x, y) or (studio.is_real and close(x, y) <= ROUNDING) for x, y in pairs)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_guidance_is_held_back_with_any_sampler_and_steps(studio: Studio, sampler: str) -> None:
    for steps in (4, 8, 20, 50) if sampler != "DPM adaptive" else (4,):
        run = studio.run({"method": "none", "guidance": "tau", "trace": "on"}, sampler_name=sampler, steps=steps)
        on = guided(studio, run)
        assert not on[0] and on[-1] and "never off" not in (run.read("Memnoise note") or ""), (steps, on)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_guidance_is_held_back_with_any_schedule(studio: Studio, schedule: str) -> None:
    for steps in (4, 20):
        run = studio.run({"trace": "on"}, sampler_name="Euler", scheduler=schedule, steps=steps)
        on = guided(studio, run)
        assert not on[0] and on[-1], (steps, on)


def test_few_steps(studio: Studio) -> None:
    """DDIM with 8 steps begins at 876, below τ = 900."""
    run = studio.run({}, steps=8)
    assert used(run, "tau") == pytest.approx(SHARE * 876, rel=1e-4)
    assert used(run, "tau_share") == pytest.approx(SHARE, rel=1e-4)
    assert run.read("Memnoise note") is None
    assert run.number("rows") == studio.run(NOTHING, steps=8).number("rows") + 8 - 1
    many = studio.run({}, steps=50)
    assert used(many, "tau") == 900 and used(many, "tau_share") is None


@pytest.mark.parametrize("method", ["static", "dynamic", "opposite_guidance", "per_sample"])
def test_every_method_whose_guidance_starts_later(studio: Studio, method: str) -> None:
    later = {"guidance": "tau", "max_steps": 1} if method == "per_sample" else {}
    run = studio.run({"method": method, **later, "trace": "on"}, **img2img())
    assert run.read("Memnoise failed") is None and "never off" not in (run.read("Memnoise note") or "")
    on = guided(studio, run)
    assert not on[0] and on[-1]
    assert used(run, "tau_share") is not None


def test_the_only_step_of_a_pass_keeps_its_guidance(studio: Studio) -> None:
    """Held back there, the prompt would have no say at all."""
    few: list[dict[str, Any]] = [
        {"steps": 2},
        img2img(sampler_name="Euler", denoising_strength=0.05),
        img2img(denoising_strength=0.25),
    ]
    for payload in few:
        run = studio.run({"trace": "on"}, **payload)
        assert guided(studio, run) == [True], payload
        assert "guidance is never off" in (run.read("Memnoise note") or "")
    assert guided(studio, studio.run({"trace": "on"}, steps=4)) == [False, True, True]


def test_hires_second_pass(studio: Studio) -> None:
    hires: dict[str, Any] = {"enable_hr": True, "hr_scale": 2, "hr_upscaler": "Latent", "denoising_strength": 0.5}
    run = studio.run({"hires": True, "trace": "on"}, **hires, sampler_name="Euler", steps=10)
    first, second = guided(studio, run), guided(studio, run, "hires")
    assert not first[0] and first[-1] and not second[0] and second[-1]
    values = dict(part.split("=") for part in (run.read("Memnoise hires used") or "").split(" "))
    assert float(values["T"]) == pytest.approx(float(values["tau"]) / SHARE, rel=1e-3)


ASKED: dict[str, dict[str, Any]] = {
    "τ": {"tau": 900},
    "custom": {"preset": "custom"},
    "latest": {"method": "dynamic", "latest": 900},
}


@pytest.mark.parametrize("settings", ASKED.values(), ids=list(ASKED))
def test_a_tau_that_was_asked_for_stays_and_it_is_said_if_it_holds_nothing_back(
    studio: Studio, settings: dict[str, Any]
) -> None:
    run = studio.run(settings, steps=8)
    name = "latest" if "latest" in settings else "tau"
    assert used(run, name) == 900 and used(run, "tau_share") is None
    assert f"guidance is never off: the first timestep 876 is not above {name} 900" in (run.read("Memnoise note") or "")


@pytest.mark.parametrize(
    "settings",
    [{}, {"gamma": 0.4}, {"tau": 900}, {"tau": 700, "gamma": 0.4}, {"method": "dynamic"}, {"tau": 800, "tau_of": 990}],
)
def test_the_page_restores_what_the_picture_was_made_with(studio: Studio, settings: dict[str, Any]) -> None:
    if studio.is_real:
        pytest.skip("test_infotext_through_the_api does it there")
    given = {"steps": 8, "seed": 7, "sampler_name": "DDIM"}
    first = studio.run(settings, **given)
    values = {name: value for name, value in studio.host.paste(first.infotexts[0]).items() if "memnoise" in name}
    values = {name: value.get("value", value) if isinstance(value, dict) else value for name, value in values.items()}
    page = {
        "txt2img_prompt": "a red fox in the snow", "txt2img_steps": 8, "txt2img_sampling": "DDIM", "txt2img_seed": 7,
        "txt2img_cfg_scale": 6, "txt2img_width": 64, "txt2img_height": 64,
    }  # fmt: skip
    pictures = studio.host.page(**page, **values)[0]
    assert np.array_equal(np.asarray(pictures[-1]), first.pictures[0])


@pytest.mark.parametrize("settings", [{}, {"gamma": 0.4}, {"tau": 900}, {"method": "dynamic"}])
def test_infotext_through_the_api(studio: Studio, settings: dict[str, Any]) -> None:
    if studio.host.txt2img({"infotext": "a fox\nSteps: 4, Sampler: DDIM, Size: 64x64"}).status != 200:
        pytest.skip("this host's API fails with any infotext")
    first = studio.run(settings, steps=8)
    given = {"prompt": "a red fox in the snow", "seed": 7, "steps": 8, "cfg_scale": 6, "width": 64, "height": 64}
    again = studio.host.txt2img({"infotext": first.infotexts[0], **given, "sampler_name": "DDIM"})
    assert again.status == 200, again.detail
    assert np.array_equal(again.images[0], first.pictures[0])
