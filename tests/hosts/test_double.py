"""The double keeps to the facts that were seen in the real host."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("gradio")
pytest.importorskip("torchsde")

from .double.host import Double  # noqa: E402
from .response import encode_image  # noqa: E402

SCRIPT = textwrap.dedent(
    """
    import gradio as gr
    from modules import script_callbacks, scripts, shared
    from modules.ui_components import InputAccordion

    HOOKS = {}
    SEEN = []

    def fire(name, *args, **kwargs):
        SEEN.append(name)
        return HOOKS[name](*args, **kwargs) if name in HOOKS else None

    for event in ("cfg_denoiser", "cfg_denoised", "cfg_after_cfg"):
        getattr(script_callbacks, f"on_{event}")(lambda params, event=event: fire(event, params))
    script_callbacks.on_before_ui(lambda: SEEN.append("before_ui"))
    script_callbacks.on_app_started(lambda demo, app: SEEN.append("app_started"))
    script_callbacks.on_ui_settings(lambda: shared.opts.add_option(
        "probe_level", shared.OptionInfo(3, "Level", section=("probe", "Probe")).info("0 to 5")))

    class Script(scripts.Script):
        def title(self):
            return "Probe"

        def show(self, is_img2img):
            return scripts.AlwaysVisible

        def ui(self, is_img2img):
            SEEN.append("ui")
            with InputAccordion(False, label="Probe", elem_id=self.elem_id("enabled")) as enabled:
                tau = gr.Slider(0, 999, value=900, step=1, label="tau", elem_id=self.elem_id("tau"))
            self.infotext_fields = [(enabled, lambda d: "Probe tau" in d), (tau, "Probe tau")]
            self.on_after_component(lambda x: SEEN.append(x.component.elem_id), elem_id="generation_info_txt2img")
            return [enabled, tau]

        def setup(self, p, *args):
            fire("setup", p, *args)

        def before_process(self, p, *args):
            fire("before_process", p, *args)

        def process(self, p, *args):
            fire("process", p, *args)

        def process_batch(self, p, *args, **kwargs):
            fire("process_batch", p, *args, **kwargs)

        def process_before_every_sampling(self, p, *args, **kwargs):
            fire("sampling", p, *args, **kwargs)

        def post_sample(self, p, ps, *args):
            fire("post_sample", p, ps, *args)

        def postprocess(self, p, processed, *args):
            fire("postprocess", p, processed, *args)
    """
)


@pytest.fixture(scope="module")
def extension(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("probe")
    (folder / "scripts").mkdir()
    (folder / "scripts" / "probe.py").write_text(SCRIPT, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def running(extension: Path) -> Iterator[Double]:
    with Double(extension) as double:
        assert double.startup_reports == []
        yield double


@pytest.fixture
def host(running: Double) -> Iterator[Double]:
    """The double with the probe's hooks empty, settings and checkpoint as at the start."""
    running.activate()
    probe(running).HOOKS.clear()
    probe(running).SEEN.clear()
    with running.options():
        yield running
    if running.checkpoint != "sd1":
        running.load("sd1")


def probe(host: Double) -> Any:
    from modules import script_loading

    return script_loading.loaded_scripts[host.extension_dirs[0] + "/scripts/probe.py"]


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


def run(host: Double, **payload: Any) -> Any:
    answer = host.txt2img(payload)
    assert answer.status == 200, answer.detail
    assert host.reports == []
    return answer


def timesteps(host: Double) -> list[float]:
    return [call.timestep for call in host.calls]


# --- sampling


def test_all_samplers_are_the_hosts(host: Double) -> None:
    assert [x["name"] for x in host.get("/sdapi/v1/samplers").json()] == samplers()


@pytest.mark.parametrize("sampler", samplers())
def test_every_sampler_makes_a_finite_image(host: Double, sampler: str) -> None:
    answer = run(host, sampler_name=sampler, steps=10)
    assert answer.image.shape == (64, 64, 3)
    assert answer.image.std() > 5
    assert torch.isfinite(host.last_latent).all()


@pytest.mark.parametrize("sampler", samplers())
def test_scale_zero_is_the_unconditional(host: Double, sampler: str) -> None:
    run(host, sampler_name=sampler, steps=6, cfg_scale=0, prompt="a fox in the snow")
    off = host.last_latent
    run(host, sampler_name=sampler, steps=6, cfg_scale=1, prompt="")
    assert torch.allclose(off, host.last_latent, atol=1e-3)
    run(host, sampler_name=sampler, steps=6, cfg_scale=5, prompt="a fox in the snow")
    assert (off - host.last_latent).abs().max() > 0.1


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
def test_calls(host: Double, sampler: str, steps: int, calls: int, first: float) -> None:
    run(host, sampler_name=sampler, steps=steps)
    assert len(host.calls) == calls
    assert host.calls[0] == (first, 2)
    assert host.rows == 2 * calls


def test_timesteps(host: Double) -> None:
    run(host, sampler_name="Euler", steps=50)
    assert timesteps(host) == pytest.approx([999 - k * 999 / 49 for k in range(50)], abs=0.51)
    run(host, sampler_name="UniPC", steps=7)
    assert any(t != round(t) for t in timesteps(host))


def test_an_image_does_not_depend_on_its_batch(host: Double) -> None:
    for sampler in ("DDIM", "Euler a", "DPM++ SDE"):
        run(host, sampler_name=sampler, seed=3, batch_size=2, do_not_save_grid=True)
        both = host.last_latent
        run(host, sampler_name=sampler, seed=4)
        assert torch.allclose(both[1:], host.last_latent, atol=1e-4)


def test_hooks_come_in_order(host: Double) -> None:
    states = []
    probe(host).HOOKS["sampling"] = lambda p, *args, x, noise, c, uc: states.append(
        (
            x is noise,
            float(x.std()),
            torch.is_inference_mode_enabled(),
            torch.is_grad_enabled(),
            p.sampler.p,
            p.sampler.eta,
            p.sampler.sampler_extra_args,
            p.sampler.model_wrap_cfg.p,
            p.is_hr_pass,
        )
    )
    run(host, sampler_name="Euler", steps=2)
    step = ["cfg_denoiser", "cfg_denoised", "cfg_after_cfg"]
    before = ["setup", "before_process", "process", "process_batch", "sampling"]
    assert [*before, *step, *step, "post_sample", "postprocess"] == probe(host).SEEN
    same, std, *rest = states[0]
    assert same and std == pytest.approx(1, abs=0.15)
    assert rest == [False, False, None, None, None, None, False]


def test_noise_edited_in_place_takes_effect(host: Double) -> None:
    run(host)
    before = host.last_latent
    probe(host).HOOKS["sampling"] = lambda p, *args, x, **kwargs: x.mul_(0.9)
    run(host)
    assert (before - host.last_latent).abs().max() > 1e-2


def test_the_network_and_its_gradient_before_sampling(host: Double) -> None:
    from modules import prompt_parser

    found = []

    def sampling(p: Any, *args: Any, x: Any, c: Any, uc: Any, **kwargs: Any) -> None:
        _, cond = prompt_parser.reconstruct_multicond_batch(c, 0)
        uncond = prompt_parser.reconstruct_cond_batch(uc, 0)
        sigma = p.sampler.get_sigmas(p, p.steps)[0]
        assert float(sigma) == pytest.approx(14.6146, abs=1e-3)
        inner = p.sampler.model_wrap_cfg.inner_model

        def delta(y: Any) -> Any:
            concat = p.txt2img_image_conditioning(y)
            a, b = (
                inner(y * sigma, sigma * y.new_ones(len(y)), cond={"c_crossattn": [z], "c_concat": [concat]})
                for z in (cond, uncond)
            )
            return (a - b).norm() / sigma

        with torch.enable_grad():
            y = x.clone().requires_grad_(True)
            value = delta(y)
            (gradient,) = torch.autograd.grad(value, y)
        direction = gradient / gradient.norm()
        numeric = (delta(x + 0.01 * direction) - delta(x - 0.01 * direction)) / 0.02
        found.append((float(value), float(gradient.norm()), float(numeric)))

    probe(host).HOOKS["sampling"] = sampling
    run(host, sampler_name="Euler")
    value, slope, numeric = found[0]
    assert value > 0.05
    assert slope == pytest.approx(numeric, rel=0.05)


# --- guidance


def _replace_cond(params: Any) -> None:
    params.text_cond = params.text_uncond[:1].expand(len(params.text_cond), -1, -1)


def _unconditional_rows_only(params: Any) -> None:
    n = len(params.text_uncond)
    params.x, params.sigma, params.image_cond = params.x[-n:], params.sigma[-n:], params.image_cond[-n:]
    params.text_cond = params.text_cond[:0]


def _scale_zero(params: Any) -> None:
    params.denoiser.cond_scale_miltiplier = 0.0


@pytest.mark.parametrize("off", [_replace_cond, _unconditional_rows_only, _scale_zero])
@pytest.mark.parametrize("sampler", ["DDIM", "Euler", "UniPC"])
def test_ways_to_switch_guidance_off(host: Double, off: Any, sampler: str) -> None:
    run(host, sampler_name=sampler, cfg_scale=0, batch_size=2, do_not_save_grid=True)
    expected = host.last_latent
    probe(host).HOOKS["cfg_denoiser"] = off
    run(host, sampler_name=sampler, cfg_scale=7, batch_size=2, do_not_save_grid=True)
    assert torch.allclose(expected, host.last_latent, atol=1e-4)
    assert {call.rows for call in host.calls} == {2 if off is _unconditional_rows_only else 4}


def test_replacing_the_condition_is_wrong_with_padding(host: Double) -> None:
    payload: dict[str, Any] = {"prompt": "cat " * 90, "negative_prompt": "bad"}
    with host.options(pad_cond_uncond=True):
        run(host, **payload, cfg_scale=0)
        expected = host.last_latent
        probe(host).HOOKS["cfg_denoiser"] = _replace_cond
        host.txt2img({**payload, "cfg_scale": 7})
        probe(host).HOOKS["cfg_denoiser"] = _scale_zero
        run(host, **payload, cfg_scale=7)
    assert torch.allclose(expected, host.last_latent, atol=1e-4)


def test_lengths_and_parts_of_prompts(host: Double) -> None:
    run(host, prompt="cat " * 90, negative_prompt="bad")
    assert {call.rows for call in host.calls} == {1} and len(host.calls) == 8
    run(host, prompt="a cat AND a dog:0.5")
    assert {call.rows for call in host.calls} == {3}
    with host.options(skip_early_cond=0.5):
        run(host, steps=10)
        assert host.calls[0].rows == 1 and host.calls[-1].rows == 2
    run(host, steps=10, sampler_name="Euler", s_min_uncond=4.0)
    assert [call.rows for call in host.calls[-2:]] in ([1, 2], [2, 1])


def test_prompt_schedules() -> None:
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
def test_checkpoints(host: Double, checkpoint: str, sampler: str) -> None:
    host.load(checkpoint)
    answer = run(host, sampler_name=sampler, steps=10)
    assert f"Model: {checkpoint}," in answer.infotexts[0]
    assert torch.isfinite(host.last_latent).all() and 0.3 < host.last_latent.std() < 10


def test_kinds_of_models(host: Double) -> None:
    from modules import prompt_parser, shared

    model = shared.sd_model
    host.load("sd1-b")
    assert shared.sd_model is model, "the same architecture is loaded into the same object"
    host.load("sd2-v")
    assert shared.sd_model is not model and shared.sd_model.parameterization == "v" and shared.sd_model.is_sd2
    host.load("sdxl")
    for text, zero in (("", True), ("x", False)):
        cond = shared.sd_model.get_learned_conditioning(prompt_parser.SdConditioning([text], is_negative_prompt=True))
        assert bool((cond["crossattn"] == 0).all()) is zero
    host.load("sd3")
    assert shared.sd_model.is_sd3 and hasattr(shared.sd_model, "create_denoiser")
    run(host, sampler_name="Euler")
    assert host.last_latent.shape[1] == 16


def test_second_pass_and_refiner(host: Double) -> None:
    seen = []
    probe(host).HOOKS["sampling"] = lambda p, *args, x, noise, **kw: seen.append(
        (p.is_hr_pass, x is noise, tuple(x.shape[2:]), id(p.sampler))
    )
    answer = run(host, enable_hr=True, denoising_strength=0.6, hr_second_pass_steps=4, sampler_name="Euler")
    assert [x[:3] for x in seen] == [(False, True, (8, 8)), (True, False, (16, 16))]
    assert seen[0][3] != seen[1][3]
    assert answer.image.shape == (128, 128, 3) and "Hires steps: 4" in answer.infotexts[0]
    answer = run(host, steps=10, refiner_checkpoint="sd1-b", refiner_switch_at=0.5, sampler_name="Euler")
    assert "Refiner: sd1-b" in answer.infotexts[0] and "Model: sd1," in answer.infotexts[0]


def test_img2img(host: Double) -> None:
    image = np.full((64, 64, 3), 200, np.uint8)
    seen = []
    probe(host).HOOKS["sampling"] = lambda p, *args, x, **kwargs: seen.append((x is p.init_latent, id(p.sampler)))
    answer = host.img2img({"init_images": [encode_image(image)], "n_iter": 2, "denoising_strength": 0.5, "steps": 10})
    assert answer.status == 200 and len(answer.images) == 2, answer.detail
    assert [x[0] for x in seen] == [True, True] and seen[0][1] == seen[1][1]


# --- API


def test_arguments(host: Double) -> None:
    got: list[tuple] = []
    probe(host).HOOKS["process"] = lambda p, *args: got.append(args)
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
    assert got == [(False, 900), (False, 900), (True, 900), (True, "x"), ({"a": 1}, 900), (None, None)]
    assert host.txt2img({"alwayson_scripts": {"probe": {"args": None}}}).status == 500
    assert host.txt2img({"alwayson_scripts": {"probe": {"args": {"a": 1}}}}).status == 500
    assert host.txt2img({"alwayson_scripts": {"nobody": {}}}).status == 422


def _raise(error: Exception) -> Any:
    def function(*args: Any, **kwargs: Any) -> Any:
        raise error

    return function


@pytest.mark.parametrize("hook", ["setup", "before_process", "process", "sampling", "cfg_denoiser", "postprocess"])
def test_exceptions_in_hooks_are_swallowed(host: Double, hook: str) -> None:
    clean = run(host)
    probe(host).HOOKS[hook] = _raise(ValueError("oh"))
    answer = host.txt2img({})
    assert answer.status == 200 and np.array_equal(answer.image, clean.image)
    assert host.reports and "ValueError: oh" in host.reports[0]


def test_what_makes_a_request_fail(host: Double) -> None:
    from fastapi import HTTPException

    hooks = probe(host).HOOKS
    hooks["before_process"] = lambda p, *args: setattr(p, "init", _raise(ValueError("not so")))
    answer = host.txt2img({})
    assert (answer.status, answer.detail, answer.raw["error"], host.calls) == (500, "not so", "ValueError", [])
    hooks["before_process"] = lambda p, *args: setattr(p, "init", _raise(HTTPException(422, detail="not so")))
    answer = host.txt2img({})
    assert (answer.status, answer.detail) == (422, "not so")
    hooks.clear()
    run(host)


def test_infotext_there_and_back(host: Double) -> None:
    def process(p: Any, enabled: bool, tau: int) -> None:
        p.extra_generation_params.update(
            {
                "Probe tau": tau,
                "Probe none": None,
                "Probe list": ["a, b", "c"],
                "Probe call": lambda p, index, **kwargs: f"image {index}",
            }
        )

    probe(host).HOOKS["process"] = process
    answer = run(host, batch_size=2, do_not_save_grid=True, alwayson_scripts={"probe": {"args": [True, 700]}})
    text = answer.infotexts[0]
    assert 'Probe list: "a, b"' in text and "Probe call: image 0" in text and "Probe none" not in text
    pasted = host.paste(text)
    assert pasted["script_txt2img_probe_tau"] == 700 and pasted["script_txt2img_probe_enabled-checkbox"] is True
    got: list[tuple] = []
    probe(host).HOOKS["process"] = lambda p, *args: got.append(args)
    host.txt2img({"infotext": text})
    host.txt2img({"infotext": text, "alwayson_scripts": {"probe": {"args": [False]}}})
    assert got == [(True, 700), (False, 700)]


def test_settings(host: Double) -> None:
    from modules.shared import opts

    assert opts.probe_level == 3 and host.get("/sdapi/v1/options").json()["probe_level"] == 3
    run(host, override_settings={"probe_level": 4})
    assert opts.probe_level == 3, "stored settings are restored"
    run(host, override_settings={"eta_ddim": 0.5})
    assert opts.eta_ddim == 0.5, "others are not"
    assert host.post("/sdapi/v1/options", {"sd_model_checkpoint": "nothing"}).status_code == 500


def test_interrupt(host: Double) -> None:
    from modules import shared

    probe(host).HOOKS["cfg_denoised"] = lambda params: shared.state.interrupt()
    answer = host.txt2img({"steps": 10})
    assert answer.status == 200 and len(host.calls) == 1


def _plot(axis: int, values: str) -> dict[str, Any]:
    flags = [True, True, False, False, False, False, False, 0, True]
    return {"script_name": "x/y/z plot", "script_args": [axis, values, [], 0, "", [], 0, "", [], *flags]}


def test_plot(host: Double) -> None:
    answer = run(host, **_plot(1, "1,2,3"))
    assert [image.shape for image in answer.images] == [(64, 192, 3), *[(64, 64, 3)] * 3]
    assert "Script: X/Y/Z plot, X Type: Seed" in answer.infotexts[0]
    hooks = probe(host).HOOKS
    hooks["process"] = lambda p, *args: setattr(p, "init", _raise(ValueError("no"))) if p.seed == 2 else None
    answer = host.txt2img(_plot(1, "1,2,3"))
    assert answer.status == 200 and answer.images[2].max() == 0 and answer.images[3].max() > 0
    assert len(host.reports) == 1


def test_page(host: Double) -> None:
    small = {"txt2img_width": 64, "txt2img_height": 64, "txt2img_steps": 3}
    pictures, info, _, message = host.page(txt2img_prompt="a fox", **small)
    assert len(pictures) == 1 and json.loads(info)["prompt"] == "a fox" and "error" not in message
    hooks = probe(host).HOOKS
    hooks["before_process"] = lambda p, *args: setattr(p, "init", _raise(ValueError("<no>")))
    assert "ValueError: &lt;no&gt;" in host.page(**small)[3]
    assert host.get("/").status_code == 200


# --- starting


def test_two_doubles(extension: Path, host: Double) -> None:
    with host.options(eta_ddim=0.5):
        host.load("sd2-v")
        with Double(extension) as other:
            assert "Model: sd1," in run(other).infotexts[0]
        answer = run(host)
        assert "Model: sd2-v," in answer.infotexts[0] and "Eta DDIM: 0.5" in answer.infotexts[0]


@pytest.mark.parametrize(
    "args, expected",
    [
        ((), ["before_ui", *["ui"], "generation_info_txt2img", *["ui"] * 5, "app_started"]),
        (("--nowebui",), ["ui", "generation_info_txt2img", *["ui"] * 5, "before_ui", "app_started"]),
    ],
)
def test_order_of_the_start(extension: Path, args: tuple[str, ...], expected: list[str]) -> None:
    with Double(extension, cmd_args=args) as host:
        assert expected == probe(host).SEEN


def test_password(extension: Path) -> None:
    with Double(extension, cmd_args=("--api-auth", "user:word")) as host:
        assert host.txt2img({"steps": 2}).status == 200
        assert host.post("/sdapi/v1/txt2img", {}, auth=("user", "other")).status_code == 401
