"""The doubles keep to the facts that were seen in real hosts, and to those of the real one that SD_WEBUI_DIR names."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("gradio")
pytest.importorskip("torchsde")

from . import checkpoints, fork_checkpoints, webui  # noqa: E402
from .double.host import Double  # noqa: E402
from .patcher_double.host import PatcherDouble  # noqa: E402
from .response import encode_image  # noqa: E402

PROBE = Path(__file__).resolve().parent / "probe"
DOUBLES = {"double": Double, "patcher": PatcherDouble}


@pytest.fixture(scope="module", params=[*DOUBLES, *(["webui"] if webui.locate() else [])])
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    if request.param in DOUBLES:
        with DOUBLES[request.param](PROBE) as double:
            assert double.startup_reports == []
            yield double
        return
    root, python = webui.locate()  # type: ignore[misc]
    kept = os.environ.get("SD_WEBUI_CHECKPOINTS")
    folder = Path(kept) if kept else tmp_path_factory.mktemp("checkpoints")
    maker = fork_checkpoints if webui.is_fork(root) else checkpoints
    maker.make_checkpoints(folder, root, python)  # type: ignore[attr-defined]
    with webui.WebUI(folder, "sd1", extensions=[PROBE], repository=None) as real:
        yield real


@pytest.fixture
def host(running: Any) -> Iterator[Any]:
    """With the probe's hooks empty, and the checkpoint of the start."""
    told(running)
    yield running
    if running.checkpoint != "sd1":
        running.load("sd1")


@pytest.fixture
def a1111(host: Any) -> Any:
    if host.is_fork:
        pytest.skip("the forks do otherwise")
    return host


@pytest.fixture(scope="module")
def only_double() -> Iterator[Double]:
    with Double(PROBE) as double:
        yield double


@pytest.fixture
def double(only_double: Double) -> Iterator[Double]:
    """What is seen inside of it, with settings as at the start."""
    only_double.activate()
    told(only_double)
    with only_double.options():
        yield only_double
    if only_double.checkpoint != "sd1":
        only_double.load("sd1")


def told(host: Any, **hooks: str) -> None:
    """What the probe is to do in its hooks from now on."""
    assert host.post("/probe", hooks).status_code == 200


def noted(host: Any, what: str) -> list[Any]:
    found: list[Any] = host.get("/probe").json()[what]
    return found


def samplers() -> list[str]:
    return [
        "DPM++ 2M",
        "DPM++ SDE",
        "DPM++ 2M SDE",
        "DPM++ 2M SDE Heun",
        "DPM++ 2S a",
        "DPM++ 3M SDE",
        "Euler a",
        "Euler",
        "LMS",
        "Heun",
        "DPM2",
        "DPM2 a",
        "DPM fast",
        "DPM adaptive",
        "Restart",
        "DDIM",
        "DDIM CFG++",
        "PLMS",
        "UniPC",
        "LCM",
    ]


def run(host: Any, **payload: Any) -> Any:
    answer = host.txt2img(payload)
    assert answer.status == 200, answer.detail
    assert host.is_real or host.reports == []
    return answer


def counted(host: Any, hooks: dict[str, str] | None = None, **payload: Any) -> list[list[float]]:
    """Timestep and rows of each call of the network in a generation."""
    told(host, **(hooks or {}))
    run(host, **payload)
    return noted(host, "calls")


def close(a: Any, b: Any) -> float:
    """Mean absolute difference of two answers' pictures, of 255."""
    pairs = zip(a.images, b.images, strict=True)
    return max(float(np.abs(x.astype(float) - y.astype(float)).mean()) for x, y in pairs)


ROUNDING = 0.5


# --- sampling


def test_all_samplers_are_the_hosts(a1111: Any) -> None:
    assert [x["name"] for x in a1111.get("/sdapi/v1/samplers").json()] == samplers()


@pytest.mark.parametrize("sampler", samplers())
def test_every_sampler_makes_an_image(host: Any, sampler: str) -> None:
    answer = run(host, sampler_name=sampler, steps=10)
    assert answer.image.shape == (64, 64, 3)
    assert answer.image.std() > 5


@pytest.mark.parametrize("sampler", samplers())
def test_scale_zero_is_the_unconditional(host: Any, sampler: str) -> None:
    given = {"sampler_name": sampler, "steps": 6}
    off = run(host, **given, cfg_scale=0, prompt="a fox in the snow")
    # In the forks there is nothing unconditional at a scale of 1.
    assert close(off, run(host, **given, cfg_scale=2 if host.is_fork else 1, prompt="")) <= ROUNDING
    assert close(off, run(host, **given, cfg_scale=5, prompt="a fox in the snow")) > ROUNDING


@pytest.mark.parametrize(
    "sampler, steps, calls, first",
    [
        ("DDIM", 50, 49, 981),
        ("DDIM", 30, 30, 991),
        ("DDIM CFG++", 10, 9, 901),
        ("PLMS", 10, 10, 901),
        ("UniPC", 10, 10, 999),
        ("Euler", 10, 10, 999),
        ("Euler a", 10, 10, 999),
        ("DPM++ 2M", 10, 10, 999),
        ("DPM++ 3M SDE", 10, 10, 999),
        ("Heun", 10, 19, 999),
        ("DPM2", 10, 19, 999),
        ("DPM2 a", 10, 19, 999),
        ("DPM++ SDE", 10, 19, 999),
        ("DPM++ 2S a", 10, 19, 999),
        ("Restart", 10, 19, 999),
        ("Restart", 20, 39, 999),
        ("LCM", 10, 10, 999),
    ],
)
def test_calls(host: Any, sampler: str, steps: int, calls: int, first: float) -> None:
    found = counted(host, sampler_name=sampler, steps=steps)
    assert len(found) == calls and {rows for _, rows in found} == {2}
    assert found[0][0] == pytest.approx(first, abs=0.01)


def test_timesteps(host: Any) -> None:
    found = counted(host, sampler_name="Euler", steps=50)
    assert [t for t, _ in found] == pytest.approx([999 - k * 999 / 49 for k in range(50)], abs=0.51)
    # The forks look the nearest one up.
    whole = [t == round(t) for t, _ in counted(host, sampler_name="UniPC", steps=7)]
    assert all(whole) == host.is_fork


def test_an_image_does_not_depend_on_its_batch(host: Any) -> None:
    for sampler in ("DDIM", "Euler a", "DPM++ SDE"):
        both = run(host, sampler_name=sampler, seed=3, batch_size=2, do_not_save_grid=True)
        alone = run(host, sampler_name=sampler, seed=4)
        assert np.abs(both.images[-1].astype(float) - alone.image).mean() <= ROUNDING


def test_hooks_come_in_order(host: Any) -> None:
    told(host, sampling="tell pass")
    run(host, sampler_name="Euler", steps=2)
    step = ["cfg_denoiser", "cfg_after_cfg"] if host.is_fork else ["cfg_denoiser", "cfg_denoised", "cfg_after_cfg"]
    before = ["setup", "before_process", "process", "process_batch", "sampling"]
    assert noted(host, "seen") == [*before, *step, *step, "post_sample", "postprocess"]
    (found,) = noted(host, "told")
    assert found["x is noise"] and found["std"] == pytest.approx(1, abs=0.15)
    assert found["untied"] and not found["grad mode"] and not found["hires"]
    assert found["inference mode"] == host.is_fork


def test_noise_edited_in_place_takes_effect(host: Any) -> None:
    before = run(host)
    told(host, sampling="shrink noise")
    assert close(before, run(host)) > ROUNDING


def test_the_network_and_its_gradient_before_sampling(a1111: Any) -> None:
    told(a1111, sampling="tell gradient")
    run(a1111, sampler_name="Euler")
    ((sigma, value, slope, numeric),) = noted(a1111, "told")
    assert sigma == pytest.approx(14.6146, abs=1e-3)
    assert value > 0.05
    assert slope == pytest.approx(numeric, rel=0.05)


# --- guidance


@pytest.mark.parametrize("off", ["uncond for cond", "unconditional rows only", "scale zero"])
@pytest.mark.parametrize("sampler", ["DDIM", "Euler", "UniPC"])
def test_ways_to_switch_guidance_off(host: Any, off: str, sampler: str) -> None:
    if host.is_fork and off != "uncond for cond":
        pytest.skip("no way in the forks")
    payload = {"sampler_name": sampler, "batch_size": 2, "do_not_save_grid": True}
    expected = run(host, **payload, cfg_scale=0)
    told(host, cfg_denoiser=off)
    assert close(expected, run(host, **payload, cfg_scale=7)) <= ROUNDING
    rows = 2 if off == "unconditional rows only" else 4
    assert {call[1] for call in noted(host, "calls")} == {rows}


def test_rows_of_a_step(host: Any) -> None:
    """The callback is given all rows by A1111, and one an image by the forks."""
    told(host, cfg_denoiser="tell rows")
    run(host, batch_size=2, do_not_save_grid=True)
    assert set(noted(host, "told")) == {2 if host.is_fork else 4}


def test_replacing_the_condition_is_wrong_with_padding(double: Double) -> None:
    payload: dict[str, Any] = {"prompt": "cat " * 90, "negative_prompt": "bad"}
    with double.options(pad_cond_uncond=True):
        run(double, **payload, cfg_scale=0)
        expected = double.last_latent
        told(double, cfg_denoiser="uncond for cond")
        double.txt2img({**payload, "cfg_scale": 7})
        told(double, cfg_denoiser="scale zero")
        run(double, **payload, cfg_scale=7)
    assert torch.allclose(expected, double.last_latent, atol=1e-4)


def test_lengths_and_parts_of_prompts(host: Any) -> None:
    # The forks repeat the shorter text.
    calls, rows = (4, 2) if host.is_fork else (8, 1)
    assert [call[1] for call in counted(host, prompt="cat " * 90, negative_prompt="bad")] == [rows] * calls
    assert {call[1] for call in counted(host, prompt="a cat AND a dog:0.5")} == {3}
    found = counted(host, steps=10, sampler_name="Euler", s_min_uncond=4.0)
    assert [call[1] for call in found[-2:]] in ([1, 2], [2, 1])
    host.set_options({"skip_early_cond": 0.5})
    try:
        found = counted(host, steps=10)
    finally:
        host.set_options({"skip_early_cond": 0.0})
    assert found[0][1] == 1 and found[-1][1] == 2


def test_scale_one(host: Any) -> None:
    """The forks leave the unconditional rows out."""
    assert {call[1] for call in counted(host, cfg_scale=1)} == {1 if host.is_fork else 2}


def test_prompt_schedules(double: Double) -> None:
    from modules.prompt_parser import get_learned_conditioning_prompt_schedules as schedules

    for prompt, expected in {
        "test": [[10, "test"]],
        "a [b:3]": [[3, "a "], [10, "a b"]],
        "a [b:c:0.5] d": [[5, "a b d"], [10, "a c d"]],
        "a [b::4]": [[4, "a b"], [10, "a "]],
        "[a|b]": [[n, "ab"[(n - 1) % 2]] for n in range(1, 11)],
        "a (b:1.2) [c]": [[10, "a (b:1.2) [c]"]],
        "a [unbalanced": [[10, "a [unbalanced"]],
    }.items():
        assert schedules([prompt], 10) == [expected], prompt


# --- models


@pytest.mark.parametrize("checkpoint", ["sd1-b", "sd2-v", "sdxl", "sd1-inpainting"])
@pytest.mark.parametrize("sampler", ["DDIM", "Euler", "UniPC"])
def test_checkpoints(host: Any, checkpoint: str, sampler: str) -> None:
    host.load(checkpoint)
    answer = run(host, sampler_name=sampler, steps=10)
    assert f"Model: {checkpoint}," in answer.infotexts[0]
    assert answer.image.std() > 5
    if not host.is_real:
        assert torch.isfinite(host.last_latent).all() and 0.3 < host.last_latent.std() < 10


def test_kinds_of_models(double: Double) -> None:
    from modules import prompt_parser, shared

    model = shared.sd_model
    double.load("sd1-b")
    assert shared.sd_model is model, "the same architecture is loaded into the same object"
    double.load("sd2-v")
    assert shared.sd_model is not model and shared.sd_model.parameterization == "v" and shared.sd_model.is_sd2
    double.load("sdxl")
    for text, zero in (("", True), ("x", False)):
        cond = shared.sd_model.get_learned_conditioning(prompt_parser.SdConditioning([text], is_negative_prompt=True))
        assert bool((cond["crossattn"] == 0).all()) is zero
    double.load("sd3")
    assert shared.sd_model.is_sd3 and hasattr(shared.sd_model, "create_denoiser")
    run(double, sampler_name="Euler")
    assert double.last_latent.shape[1] == 16


def test_second_pass_and_refiner(host: Any) -> None:
    more = {"hr_additional_modules": ["Use same choices"], "hr_cfg": 5} if host.is_fork else {}
    hires = {"enable_hr": True, "denoising_strength": 0.6, "hr_second_pass_steps": 4, "sampler_name": "Euler", **more}
    told(host, sampling="tell pass")
    answer = run(host, **hires)
    first, *second = noted(host, "told")
    assert (first["hires"], first["x is noise"], first["size"]) == (False, True, [8, 8])
    # Forge calls the hook twice, reForge once.
    assert len(second) == 1 if not host.is_fork else len(second) in (1, 2)
    for seen in second:
        assert (seen["hires"], seen["x is noise"], seen["size"]) == (True, False, [16, 16])
        assert seen["sampler"] != first["sampler"]
    assert answer.image.shape == (128, 128, 3) and "Hires steps: 4" in answer.infotexts[0]
    refiner = {"refiner_checkpoint": "sd1-b.safetensors", "refiner_switch_at": 0.5}
    answer = run(host, steps=10, **refiner, sampler_name="Euler")
    assert "Refiner: sd1-b" in answer.infotexts[0] and "Model: sd1," in answer.infotexts[0]


def test_img2img(host: Any) -> None:
    image = np.full((64, 64, 3), 200, np.uint8)
    told(host, sampling="tell pass")
    answer = host.img2img(
        {
            "init_images": [encode_image(image)],
            "n_iter": 2,
            "denoising_strength": 0.5,
            "steps": 10,
            "do_not_save_grid": True,
        }
    )
    assert answer.status == 200, answer.detail
    seen = noted(host, "told")
    assert len(seen) == 2 and all(one["x is the latent"] for one in seen)
    assert seen[0]["sampler"] == seen[1]["sampler"]


# --- API


def test_arguments(host: Any) -> None:
    told(host, process="tell arguments")
    scripts: list[Any] = [
        {},
        {"probe": {}},
        {"PROBE": {"args": [True]}},
        {"Probe": {"args": [True, "x", 3]}},
        {"probe": {"args": [{"a": 1}]}},
        {"probe": {"args": [None, None]}},
    ]
    for given in scripts:
        run(host, alwayson_scripts=given, steps=2)
    expected = [[False, 900], [False, 900], [True, 900], [True, "x"], [{"a": 1}, 900], [None, None]]
    assert noted(host, "told") == expected
    assert host.txt2img({"alwayson_scripts": {"probe": {"args": None}}}).status == 500
    assert host.txt2img({"alwayson_scripts": {"probe": {"args": {"a": 1}}}}).status == 500
    assert host.txt2img({"alwayson_scripts": {"nobody": {}}}).status == 422


@pytest.mark.parametrize("hook", ["setup", "before_process", "process", "sampling", "cfg_denoiser", "postprocess"])
def test_exceptions_in_hooks_are_swallowed(host: Any, hook: str) -> None:
    clean = run(host)
    told(host, **{hook: "fail"})
    answer = host.txt2img({})
    assert answer.status == 200 and np.array_equal(answer.image, clean.image)
    if not host.is_real:
        assert host.reports and "ValueError: <oh>" in host.reports[0]


def test_what_makes_a_request_fail(host: Any) -> None:
    told(host, before_process="fail later")
    answer = host.txt2img({})
    assert (answer.status, answer.detail, answer.raw["error"]) == (500, "<oh>", "ValueError")
    assert noted(host, "calls") == []
    told(host, before_process="refuse later")
    answer = host.txt2img({})
    assert (answer.status, answer.detail) == (422, "not so")
    told(host)
    run(host)


def test_infotext_there_and_back(host: Any) -> None:
    told(host, process="write infotext")
    given = {"batch_size": 2, "do_not_save_grid": True}
    answer = run(host, **given, alwayson_scripts={"probe": {"args": [True, 700]}})
    text = answer.infotexts[-2]
    assert 'Probe list: "a, b"' in text and "Probe call: image 0" in text and "Probe none" not in text
    if not host.is_real:
        pasted = host.paste(text)
        assert pasted["script_txt2img_probe_tau"] == 700
        assert pasted["script_txt2img_probe_enabled-checkbox"] is True
    if host.txt2img({"infotext": "a fox\nSteps: 4, Sampler: DDIM, Size: 64x64"}).status != 200:
        pytest.skip("this host's API fails with any infotext")
    told(host, process="tell arguments")
    host.txt2img({"infotext": text})
    host.txt2img({"infotext": text, "alwayson_scripts": {"probe": {"args": [False]}}})
    assert noted(host, "told") == [[True, 700], [False, 700]]


def test_settings(host: Any) -> None:
    def value(name: str) -> Any:
        return host.get("/sdapi/v1/options").json()[name]

    assert value("probe_level") == 3
    host.set_options({"probe_level": 3})
    run(host, override_settings={"probe_level": 4})
    assert value("probe_level") == 3, "stored settings are restored"
    before = value("eta_ddim")
    run(host, override_settings={"eta_ddim": 0.5})
    assert value("eta_ddim") == 0.5, "others are not"
    host.set_options({"eta_ddim": before})
    if not host.is_real:
        assert host.post("/sdapi/v1/options", {"sd_model_checkpoint": "nothing"}).status_code == 500


def test_interrupt(host: Any) -> None:
    told(host, cfg_after_cfg="interrupt")
    answer = host.txt2img({"steps": 10})
    assert answer.status == 200 and len(noted(host, "calls")) == 1


def _plot(axis: int, values: str) -> dict[str, Any]:
    flags = [True, True, False, False, False, False, False, 0, True]
    return {"script_name": "x/y/z plot", "script_args": [axis, values, [], 0, "", [], 0, "", [], *flags]}


def test_plot(host: Any) -> None:
    answer = run(host, **_plot(1, "1,2,3"))
    assert [image.shape for image in answer.images[1:]] == [(64, 64, 3)] * 3
    assert "Script: X/Y/Z plot, X Type: Seed" in answer.infotexts[0]
    told(host, process="fail for the second seed")
    answer = host.txt2img(_plot(1, "1,2,3"))
    assert answer.status == 200 and answer.images[2].max() == 0 and answer.images[3].max() > 0
    assert host.is_real or len(host.reports) == 1


def test_page(double: Double) -> None:
    small = {"txt2img_width": 64, "txt2img_height": 64, "txt2img_steps": 3}
    pictures, info, _, message = double.page(txt2img_prompt="a fox", **small)
    assert len(pictures) == 1 and json.loads(info)["prompt"] == "a fox" and "error" not in message
    told(double, before_process="fail later")
    assert "ValueError: &lt;oh&gt;" in double.page(**small)[3]
    assert double.get("/").status_code == 200


# --- starting


@pytest.mark.parametrize("other_kind", DOUBLES.values())
def test_two_doubles(double: Double, other_kind: type[Double]) -> None:
    before = run(double, sampler_name="Euler")
    with double.options(eta_ddim=0.5):
        double.load("sd2-v")
        with other_kind(PROBE) as other:
            assert "Model: sd1," in run(other).infotexts[0]
        answer = run(double)
        assert "Model: sd2-v," in answer.infotexts[0] and "Eta DDIM: 0.5" in answer.infotexts[0]
    double.load("sd1")
    after = run(double, sampler_name="Euler")
    assert np.array_equal(before.image, after.image)


@pytest.mark.parametrize(
    "args, expected",
    [
        ((), ["before_ui", *["ui"], "generation_info_txt2img", *["ui"] * 5, "app_started"]),
        (("--nowebui",), ["ui", "generation_info_txt2img", *["ui"] * 5, "before_ui", "app_started"]),
    ],
)
def test_order_of_the_start(args: tuple[str, ...], expected: list[str]) -> None:
    with Double(PROBE, cmd_args=args) as host:
        assert noted(host, "seen") == expected


def test_password() -> None:
    with Double(PROBE, cmd_args=("--api-auth", "user:word")) as host:
        assert host.txt2img({"steps": 2}).status == 200
        assert host.post("/sdapi/v1/txt2img", {}, auth=("user", "other")).status_code == 401
