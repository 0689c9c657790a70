from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.contract.conftest import ROUNDING, Run, Studio, close

SAMPLERS = (
    "DDIM", "DDIM CFG++", "PLMS", "UniPC", "Euler", "Euler a", "LMS", "Heun", "DPM2", "DPM2 a", "DPM++ 2S a",
    "DPM++ 2M", "DPM++ SDE", "DPM++ 2M SDE", "DPM++ 2M SDE Heun", "DPM++ 3M SDE", "DPM fast", "DPM adaptive",
    "Restart", "LCM",
)  # fmt: skip
SCHEDULES = (
    "Automatic", "Uniform", "Karras", "Exponential", "Polyexponential", "SGM Uniform", "KL Optimal",
    "Align Your Steps", "Simple", "Normal", "DDIM", "Beta",
)  # fmt: skip
MODELS = ("sd1", "sd2-v", "sd1-inpainting", "sdxl")

NOTHING: dict[str, Any] = {"gamma": 0, "tau": 999}
"""Enabled, but neither the noise nor guidance is changed: counts what the sampler costs."""
UNCONDITIONAL: dict[str, Any] = {"gamma": 0, "tau": 0}
"""Guidance is off in every step above timestep 0; "Simple" is a schedule that does not step on 0."""


def same(a: Any, b: Any) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a.pictures, b.pictures))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler(studio: Studio, sampler: str) -> None:
    payload = {"sampler_name": sampler, "scheduler": "Simple"}
    plain = studio.run(**payload)
    nothing = studio.run(NOTHING, **payload)
    assert same(plain, nothing)
    assert "Memnoise" not in plain.infotexts[0]

    # Guidance off is the host's own unconditional prediction and nothing else.
    off = studio.run(UNCONDITIONAL, **payload)
    # (DPM adaptive ends on timestep 0, where guidance is on.)
    unguided = studio.run(**payload, cfg_scale=0).pictures[0]
    assert close(off.pictures[0], unguided) <= (15 if sampler == "DPM adaptive" else ROUNDING)
    assert close(off.pictures[0], plain.pictures[0]) > 3 * close(off.pictures[0], unguided)
    if sampler != "DPM adaptive":  # which chooses its steps by what it sees
        assert off.number("rows") == nothing.number("rows") / 2

    batch_wise = studio.run({}, **payload)
    assert not same(batch_wise, plain)
    assert batch_wise.read("Memnoise failed") is None
    note = batch_wise.read("Memnoise note")
    assert note is None or "the sampler started at" not in note
    assert same(batch_wise, studio.run({}, **payload))

    per_sample = studio.run({"method": "per_sample", "target": 0.8, "target_kind": "fraction"}, **payload)
    assert per_sample.read("Memnoise failed") is None
    assert per_sample.number("magnitude") == pytest.approx(batch_wise.number("magnitude"), rel=1e-3)
    assert per_sample.number("magnitude after") < 0.8 * per_sample.number("magnitude")
    steps = per_sample.number("steps taken")
    assert steps > 0 and per_sample.number("backward rows") == 2 * steps
    # (A fork's network is asked at sigmas, and DPM fast's first is another by rounding.)
    if sampler != "DPM adaptive" and not (studio.is_fork and sampler == "DPM fast"):
        # steps + 1 evaluations, the last of which is the sampler's first
        assert per_sample.number("rows") == nothing.number("rows") + 2 * steps


@pytest.mark.parametrize(
    ("sampler", "first"),
    [("DDIM", 876), ("PLMS", 876), ("UniPC", 999), ("Euler", 999), ("DPM++ 2M", 999), ("DPM fast", 999), ("LCM", 999)],
)
def test_first_timestep(studio: Studio, sampler: str, first: float) -> None:
    run = studio.run({}, sampler_name=sampler)
    used = run.read("Memnoise used")
    assert used is not None and float(used.split("T=")[1]) == pytest.approx(first, abs=0.01)


def test_cost_of_the_papers_settings(studio: Studio) -> None:
    """SD1.4: 101 rows against 98. SD2.0's M = 4 and four steps off on Euler: 112 against 100."""
    ddim = {"sampler_name": "DDIM", "steps": 50}
    assert studio.run(NOTHING, **ddim).number("rows") == 98
    assert studio.run({}, **ddim).number("rows") == 101
    euler = {"sampler_name": "Euler", "steps": 50}
    assert studio.run(NOTHING, **euler).number("rows") == 100
    assert studio.run({"steps": 4, "tau": 917.4490}, **euler).number("rows") == 112


@pytest.mark.parametrize(
    ("sampler", "schedule", "at_zero"),
    [("Heun", "Automatic", True), ("Heun", "Simple", False), ("DDIM", "Automatic", False)],
)
def test_a_tau_of_zero_leaves_guidance_to_a_last_step_at_zero(
    studio: Studio, sampler: str, schedule: str, at_zero: bool
) -> None:
    """Guidance is on at t ≤ τ (Algorithm 1), and where a schedule steps on 0 the prompt has its say there."""
    runs = [
        studio.run(
            {"method": "static", "tau": 0, "trace": "on"}, prompt=prompt, sampler_name=sampler, scheduler=schedule
        )
        for prompt in ("a red fox in the snow", "a blue whale in the sea")
    ]
    name = runs[0].info["extra_generation_params"]["Memnoise trace id"]
    points = studio.host.get(f"/memnoise/v1/trace/{name}").json()["images"][0]["points"]
    assert [point["guided"] for point in points] == [point["t"] < 0.01 for point in points]
    assert points[-1]["guided"] == at_zero
    assert same(*runs) != at_zero


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule(studio: Studio, schedule: str) -> None:
    euler = {"sampler_name": "Euler", "scheduler": schedule}
    off = studio.run(UNCONDITIONAL, **euler)
    unguided = studio.run(**euler, cfg_scale=0)
    # a last step at timestep 0 has guidance
    assert close(off.pictures[0], unguided.pictures[0]) < 0.2 * close(
        studio.run(**euler).pictures[0], unguided.pictures[0]
    )
    run = studio.run({}, **euler)
    assert run.read("Memnoise failed") is None and "started at" not in (run.read("Memnoise note") or "")
    assert same(studio.run(**euler), studio.run(NOTHING, **euler))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("sampler", ["DDIM", "Euler", "LCM"])
def test_every_model(studio: Studio, model: str, sampler: str) -> None:
    studio.host.load(model)
    payload = {"sampler_name": sampler, "scheduler": "Simple"}
    plain = studio.run(**payload)
    assert same(plain, studio.run(NOTHING, **payload))
    off = studio.run(UNCONDITIONAL, **payload)
    assert close(off.pictures[0], studio.run(**payload, cfg_scale=0).pictures[0]) <= ROUNDING
    batch_wise = studio.run({}, **payload)
    assert batch_wise.read("Memnoise failed") is None and not same(batch_wise, plain)
    per_sample = studio.run({"method": "per_sample", "target_kind": "fraction", "target": 0.8}, **payload)
    assert per_sample.number("magnitude after") < 0.8 * per_sample.number("magnitude")
    assert per_sample.number("magnitude") == pytest.approx(batch_wise.number("magnitude"), rel=1e-3)


PROMPTS: dict[str, dict[str, Any]] = {
    "long": {"prompt": "a fox, " * 60},
    "long negative": {"negative_prompt": "blurry, ugly, " * 60},
    "negative": {"negative_prompt": "blurry, ugly"},
    "AND": {"prompt": "a fox AND snow :0.5 AND a hill :1.2"},
    "AND, long": {"prompt": "a fox AND " + "snow, " * 80},
    "weight": {"prompt": "a fox :0.4"},
    "editing": {"prompt": "a [fox:dog:0.5] in [snow|rain]", "negative_prompt": "[blurry:ugly:0.4]"},
    "empty": {"prompt": "", "negative_prompt": "blurry"},
    "CFG 1": {"cfg_scale": 1},
    "pad": {"prompt": "a fox, " * 60, "options": {"pad_cond_uncond": True}},
    "pad, negative": {
        "prompt": "a fox", "negative_prompt": "ugly, " * 60, "options": {"pad_cond_uncond": True},
    },
    "pad v0": {"prompt": "a fox, " * 60, "options": {"pad_cond_uncond_v0": True}},
    "NGMS": {"s_min_uncond": 3.0},
    "NGMS all": {"s_min_uncond": 3.0, "options": {"s_min_uncond_all": True}},
    "skip early": {"options": {"skip_early_cond": 0.4}},
    "one at a time": {"options": {"batch_cond_uncond": False}},
    "noise multiplier": {"options": {"sgm_noise_multiplier": True}},
}  # fmt: skip


@pytest.mark.parametrize("sampler", ["DDIM", "DDIM CFG++", "Euler a", "Heun"])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_every_prompt(studio: Studio, sampler: str, prompt: str) -> None:
    payload = {"sampler_name": sampler, "scheduler": "Simple", **PROMPTS[prompt]}
    if studio.is_fork and "CFG++" in sampler and prompt in ("CFG 1", "NGMS", "NGMS all", "skip early"):
        pytest.skip("the host's own CFG++ follows zeros where it leaves the unconditional rows out")
    with studio.options(payload.pop("options", {})):
        check_prompt(studio, payload)


def check_prompt(studio: Studio, payload: dict[str, Any]) -> None:
    plain = studio.run(**payload)
    assert same(plain, studio.run(NOTHING, **payload))

    off = studio.run(UNCONDITIONAL, **payload)
    if payload.get("prompt") == "" or payload.get("cfg_scale") == 1:
        # There is no guidance to hold back.
        for settings in (UNCONDITIONAL, {**UNCONDITIONAL, "reference": "negative"}):
            assert same(plain, studio.run(settings, **payload))
        return
    # Off follows the empty prompt whatever the negative one is; NGMS and "skip early" must not get in between.
    alone = {**payload, "cfg_scale": 0, "negative_prompt": "", "s_min_uncond": 0}
    with studio.options({"skip_early_cond": 0}):
        assert close(off.pictures[0], studio.run(**alone).pictures[0]) <= ROUNDING
    # One row an image and call, and none of the prompt's.
    single = studio.run(UNCONDITIONAL, sampler_name=payload["sampler_name"], scheduler="Simple")
    assert off.number("rows") == single.number("rows")

    following = studio.run({**UNCONDITIONAL, "reference": "negative"}, **payload)
    alone["negative_prompt"] = payload.get("negative_prompt", "")
    with studio.options({"skip_early_cond": 0}):
        assert close(following.pictures[0], studio.run(**alone).pictures[0]) <= ROUNDING

    for method in ("batch_wise", "per_sample"):
        settings = {"method": method, **({"max_steps": 2} if method == "per_sample" else {})}
        assert studio.run(settings, **payload).read("Memnoise failed") is None


def test_the_negative_prompt_is_not_what_delta_is_measured_against(studio: Studio) -> None:
    plain = studio.run({}).number("magnitude")
    negative = studio.run({}, negative_prompt="blurry, ugly")
    assert negative.number("magnitude") == pytest.approx(plain, rel=1e-3)
    against = studio.run({"reference": "negative"}, negative_prompt="blurry, ugly")
    assert against.number("magnitude") != pytest.approx(plain, rel=1e-3)
    assert against.read("Memnoise reference") == "negative" and negative.read("Memnoise reference") is None


@pytest.mark.parametrize("settings", [{}, {"method": "per_sample", "target_kind": "fraction", "target": 0.8}])
@pytest.mark.parametrize("prompt", ["a red fox in the snow", "a fox AND snow :0.5"])
def test_an_image_does_not_depend_on_its_batch(studio: Studio, settings: dict[str, Any], prompt: str) -> None:
    together = studio.run(settings, prompt=prompt, batch_size=3, n_iter=2)
    assert len(together.pictures) == 6
    for image in range(6):
        alone = studio.run(settings, prompt=prompt, seed=7 + image)
        assert close(alone.pictures[0], together.pictures[image]) <= ROUNDING
        for key in ("magnitude", "norm", "rows"):
            assert alone.number(key) == pytest.approx(together.number(key, image), rel=2e-3), key
        if settings:
            assert alone.number("steps taken") == together.number("steps taken", image)


def test_guidance_never_off_is_said(studio: Studio) -> None:
    run = studio.run({"tau": 900}, steps=8)
    assert "guidance is never off: the first timestep 876 is not above tau 900" in (run.read("Memnoise note") or "")
    assert run.read("Memnoise failed") is None


def test_a_target_out_of_reach_is_said(studio: Studio) -> None:
    run = studio.run({"method": "per_sample", "target": 0, "max_steps": 3})
    assert "the target was not reached in 3 steps" in (run.read("Memnoise note") or "")


def test_an_overlong_noise_is_said(studio: Studio) -> None:
    run = studio.run({"gamma": 10, "rho": 1000, "steps": 20})
    assert "times its usual length" in (run.read("Memnoise note") or run.read("Memnoise failed") or "")


def test_hires_first_pass_only_unless_asked(studio: Studio) -> None:
    hires: dict[str, Any] = {"enable_hr": True, "hr_scale": 2, "hr_upscaler": "Latent", "denoising_strength": 0.7}
    plain = studio.run(**hires)
    assert same(plain, studio.run(NOTHING, **hires))
    first = studio.run({}, **hires)
    both = studio.run({"hires": True}, **hires)
    assert not same(first, plain) and not same(both, first)
    assert both.number("rows") > first.number("rows")
    assert both.read("Memnoise failed") is None
    # Each pass is adjusted once, whatever the host calls twice: 4·M rows.
    idle = studio.run({"steps": 0, "hires": True}, **hires)
    assert both.number("rows") - idle.number("rows") == 16


def test_refiner_switch_while_guidance_is_off(studio: Studio) -> None:
    refiner = {
        "refiner_checkpoint": "sd1-b.safetensors",
        "refiner_switch_at": 0.5,
        "sampler_name": "Euler",
        "scheduler": "Simple",
    }
    assert same(studio.run(**refiner), studio.run(NOTHING, **refiner))
    for negative in ("", "blurry"):
        off = studio.run(UNCONDITIONAL, **refiner, negative_prompt=negative)
        assert close(off.pictures[0], studio.run(**refiner, cfg_scale=0).pictures[0]) <= ROUNDING
        assert off.number("rows") == studio.run(NOTHING, **refiner).number("rows") / 2


def test_off_is_as_if_it_were_not_there(studio: Studio) -> None:
    before = studio.run()
    for settings in ({}, {"method": "per_sample", "max_steps": 2}):
        studio.run(settings, batch_size=2)
    after = studio.run()
    off = studio.answer([False, {}])
    assert same(before, after) and np.array_equal(off.images[0], before.images[0])
    assert "Memnoise" not in off.infotexts[0] + after.infotexts[0]


def test_sizes_scale_what_takes_effect(studio: Studio) -> None:
    assert "rho=6.25 " in (studio.run({}).read("Memnoise used") or "")
    assert "rho=12.5 " in (studio.run({}, width=128, height=128).read("Memnoise used") or "")


HIRES: dict[str, Any] = {
    "enable_hr": True, "hr_scale": 2, "hr_upscaler": "Latent", "denoising_strength": 0.7, "steps": 8
}  # fmt: skip


def timestep(run: Run, key: str, image: int = 0) -> float:
    used = run.read(f"Memnoise {key}", image)
    assert used is not None, run.infotexts
    return float(used.split("T=")[1])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"method": "per_sample", "target": 0.8, "target_kind": "fraction"},
        {"method": "noise_selection"},
        {"method": "none"},
    ],
    ids=lambda settings: settings.get("method", "batch_wise"),
)
def test_each_pass_tells_of_itself(studio: Studio, settings: dict[str, Any]) -> None:
    """What is told of the first pass is the same whether the second is adjusted or not."""
    first = studio.run(settings, **HIRES, batch_size=2)
    both = studio.run({**settings, "hires": True}, **HIRES, batch_size=2)
    for image in range(2):
        for key in ("used", "magnitude", "magnitude after", "steps taken", "norm"):
            assert both.read(f"Memnoise {key}", image) == first.read(f"Memnoise {key}", image), key
            assert first.read(f"Memnoise hires {key}", image) is None
        assert both.number("hires magnitude", image) != pytest.approx(both.number("magnitude", image), rel=1e-3)
        # rows are those of both passes
        assert both.number("rows", image) > first.number("rows", image)
        assert both.read("Memnoise hires failed", image) is None and both.read("Memnoise failed", image) is None
        assert timestep(both, "used", image) == 876 and timestep(both, "hires used", image) < 876
        for key in ("hires magnitude after", "hires steps taken"):
            known = first.read(f"Memnoise {key.removeprefix('hires ')}", image) is not None
            assert (both.read(f"Memnoise {key}", image) is not None) == known
    assert both.info["extra_generation_params"]["Memnoise hires magnitude"] == [
        both.read("Memnoise hires magnitude", image) for image in range(2)
    ]


def test_a_hires_pass_has_its_own_checkpoints_preset(studio: Studio) -> None:
    other = {**HIRES, "hr_checkpoint_name": "sd2-v.safetensors"}
    run = studio.run({"hires": True}, **other)
    assert (run.read("Memnoise used") or "").startswith("gamma=0.7 rho=6.25 steps=2 tau=803.67 ")
    used = run.read("Memnoise hires used") or ""
    assert used.startswith("gamma=0.0479 rho=5 steps=4 tau=") and "tau_share=0.918367 " in used, used
    assert run.read("Memnoise hires failed") is None
    # and the other way round
    studio.host.load("sd2-v")
    back = studio.run({"hires": True}, **{**HIRES, "hr_checkpoint_name": "sd1.safetensors"})
    assert (back.read("Memnoise used") or "").startswith("gamma=0.0479 ")
    used = back.read("Memnoise hires used") or ""
    assert used.startswith("gamma=0.7 rho=12.5 steps=2 tau=") and "tau_share=0.917431 " in used, used
    studio.host.load("sd1")

    # Where a number is given all are written down, and hold in both passes: so the infotext makes the same picture.
    given = studio.run({"hires": True, "tau": 500}, **other)
    assert (given.read("Memnoise hires used") or "").startswith("gamma=0.7 rho=8.33333 steps=2 tau=500 ")
    assert "hires pass: some numbers were given" in (given.read("Memnoise note") or "")
    custom = {"preset": "custom", "gamma": 0.7, "rho": 50, "steps": 2, "tau": 500, "hires": True}
    assert same(studio.run(custom, **other), given)


def test_a_hires_pass_follows_the_first_ones_decision(studio: Studio) -> None:
    payload = {**HIRES, "batch_size": 4}
    every = studio.run({"hires": True}, **payload)
    scores = [every.number("magnitude", image) for image in range(4)]
    later = [every.number("hires magnitude", image) for image in range(4)]
    low, high = sorted(scores)[1:3]
    threshold = (low + high) / 2
    # the scores of the second pass are of another kind: by them, other images would be flagged
    assert [value > threshold for value in scores] != [value / 2 > threshold for value in later]
    settings = {"hires": True, "when": "flagged", "threshold": threshold / 0.125}  # scaled to the size
    run, plain = studio.run(settings, **payload), studio.run(**payload)
    for image, value in enumerate(scores):
        flagged = value > threshold
        assert run.read("Memnoise mitigated", image) == str(flagged)
        assert (run.read("Memnoise hires used", image) is not None) == flagged
        expected = every if flagged else plain
        assert close(run.pictures[image], expected.pictures[image]) <= ROUNDING
