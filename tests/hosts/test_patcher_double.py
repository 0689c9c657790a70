"""What hosts that patch a U-Net do otherwise than A1111, in their double."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("gradio")
pytest.importorskip("torchsde")

from .double.host import Double  # noqa: E402
from .patcher_double.host import PatcherDouble  # noqa: E402
from .test_double import PROBE, ROUNDING, close, counted, run, samplers, told  # noqa: E402

REPOSITORY = Path(__file__).resolve().parents[2]
HIRES: dict[str, Any] = {
    "enable_hr": True, "denoising_strength": 0.6, "hr_additional_modules": ["Use same choices"], "sampler_name": "Euler"
}  # fmt: skip


@pytest.fixture(scope="module")
def doubles() -> Iterator[tuple[Double, PatcherDouble]]:
    """A1111's, and the other, each started anew when it is used after the other."""
    # Forge has no other timesteps than whole ones.
    with (
        Double(PROBE, settings={"enable_quantization": True}) as a1111,
        PatcherDouble(PROBE, extensions=[REPOSITORY]) as patcher,
    ):
        yield a1111, patcher


@pytest.fixture
def host(doubles: tuple[Double, PatcherDouble]) -> Iterator[PatcherDouble]:
    told(doubles[1])
    with doubles[1].options():
        yield doubles[1]


def does(host: PatcherDouble, **hooks: Callable[..., Any]) -> None:
    """Have the probe call these functions in its hooks."""
    from modules import script_loading

    deeds = script_loading.loaded_scripts[f"{PROBE}/scripts/probe.py"].DEEDS
    deeds.update(hooks)
    told(host, **{hook: hook for hook in hooks})


def unet() -> Any:
    from modules import shared

    return shared.sd_model.forge_objects.unet


OTHERWISE = ("DDIM CFG++", "UniPC", "LCM")
"""Forge's do not divide the scale, have whole timesteps only, and have no boundary conditions."""
REQUESTS: list[dict[str, Any]] = [
    *({"sampler_name": name, "steps": 6} for name in samplers() if name not in OTHERWISE),
    {"prompt": "a fox AND snow :0.5 AND a hill :1.2", "sampler_name": "Euler"},
    {"prompt": "a fox", "negative_prompt": "blurry", "sampler_name": "Euler", "s_min_uncond": 3.0},
    {**HIRES, "hr_cfg": 5},
]


def test_pictures_are_a1111s(doubles: tuple[Double, PatcherDouble]) -> None:
    """Where both hosts follow the same rules; the networks are the same."""
    requests = [(model, request) for model in ("sd1", "sd2-v", "sdxl", "sd1-inpainting") for request in REQUESTS]
    pictures = []
    for host in doubles:
        pictures.append([])
        for model, request in requests:
            if host.checkpoint != model:
                host.load(model)
            pictures[-1].append(run(host, **request))
        host.load("sd1")
    for (model, request), a, b in zip(requests, *pictures):
        adaptive = request["sampler_name"] == "DPM adaptive"  # which chooses its steps by what it sees
        assert close(a, b) <= (3 if adaptive else ROUNDING), (model, request)


def test_nothing_is_left_of_it(doubles: tuple[Double, PatcherDouble]) -> None:
    a1111, patcher = doubles
    patcher.activate()
    a1111.activate()
    from modules import processing, sd_models, shared

    assert not hasattr(shared.sd_model, "forge_objects") and not hasattr(sd_models, "forge_model_reload")
    assert not hasattr(processing.StableDiffusionProcessingTxt2Img(), "modified_noise")


def test_a_checkpoint_is_loaded_late_and_in_inference_mode(host: PatcherDouble) -> None:
    from modules import shared

    run(host)
    before = shared.sd_model
    host.load("sd1-b")
    assert shared.sd_model is before
    run(host)
    assert shared.sd_model is not before and shared.sd_model.sd_checkpoint_info.variant == "sd1-b"
    assert all(weight.is_inference() for weight in unet().model.parameters())
    host.load("sd1")


def test_the_network_takes_sigmas_and_has_to_be_loaded(host: PatcherDouble) -> None:
    from backend.sampling.sampling_function import sampling_prepare
    from modules import shared

    run(host)
    model, x, sigma = unet().model, torch.randn(2, 4, 8, 8), torch.tensor([14.6146])
    text = shared.sd_model.get_learned_conditioning(["a fox", ""])
    with torch.inference_mode():
        with pytest.raises(RuntimeError, match="not loaded"):
            model.apply_model(14.6146 * x, sigma.expand(2), c_crossattn=text)
        sampling_prepare(unet(), x)
        denoised = model.apply_model(14.6146 * x, sigma.expand(2), c_crossattn=text)
        assert denoised.shape == x.shape and denoised.std() < 3


def test_each_pass_starts_from_a_clean_network(host: PatcherDouble) -> None:
    found = []

    def sampling(p: Any, *args: Any, **kwargs: Any) -> None:
        found.append((p.is_hr_pass, "mark" in unet().model_options))
        p.sd_model.forge_objects.unet = patched = unet().clone()
        patched.model_options["mark"] = True

    does(host, sampling=sampling)
    run(host, **HIRES, hr_cfg=5, n_iter=2)
    assert found == [(False, False), (True, True), (True, False)] * 2


def test_the_noise_is_taken_from_an_attribute(host: PatcherDouble) -> None:
    plain = run(host)
    left = []

    def sampling(p: Any, *args: Any, noise: Any, **kwargs: Any) -> None:
        p.modified_noise = 0.8 * noise

    does(host, sampling=sampling, post_sample=lambda p, *args: left.append(p.modified_noise))
    assert close(plain, run(host)) > ROUNDING and left == [None]
    does(host, sampling=lambda p, *args, x, **kwargs: x.mul_(0.8))
    by_hand = run(host)
    does(host, sampling=sampling)
    assert close(by_hand, run(host)) <= ROUNDING


def test_the_hires_pass_has_a_scale_of_its_own(host: PatcherDouble) -> None:
    rows = [call[1] for call in counted(host, **HIRES, hr_cfg=1, steps=4)]
    assert rows == [2] * 4 + [1] * 4
    assert [call[1] for call in counted(host, **HIRES, hr_cfg=4, cfg_scale=1, steps=4)] == [1] * 4 + [2] * 4


def test_there_is_no_negative_prompt_at_scale_one(host: PatcherDouble) -> None:
    seen = []
    does(host, sampling=lambda p, *args, uc, **kwargs: seen.append(uc))
    run(host, cfg_scale=1)
    run(host, cfg_scale=2)
    assert seen[0] is None and seen[1] is not None


@pytest.mark.parametrize("short_of_memory", [False, True])
def test_chunks(host: PatcherDouble, short_of_memory: bool) -> None:
    """A wrapper of the network sees chunks of one row an image, the unconditional one first."""
    seen = []

    def wrapper(apply_model: Any, args: dict[str, Any]) -> Any:
        seen.append((args["cond_or_uncond"], len(args["input"]), args["c"]["transformer_options"]["cond_indices"]))
        return apply_model(args["input"], args["timestep"], **args["c"])

    def sampling(p: Any, *args: Any, **kwargs: Any) -> None:
        p.sd_model.forge_objects.unet = patched = unet().clone()
        patched.set_model_unet_function_wrapper(wrapper)

    request = {"prompt": "a fox AND snow :0.5", "batch_size": 2, "steps": 2, "sampler_name": "Euler"}
    plain = run(host, **request)
    host.set_options({"batch_cond_uncond": not short_of_memory})
    does(host, sampling=sampling)
    assert close(plain, run(host, **request)) <= ROUNDING
    if short_of_memory:
        assert seen == [([1], 2, []), ([0], 2, [0, 1]), ([0], 2, [0, 1])] * 2
    else:
        assert seen == [([1, 0, 0], 6, [2, 3, 4, 5])] * 2


class ControlNet:
    previous_controlnet = None

    def get_control(self, x: Any, t: Any, cond: Any, batched_number: int) -> dict[str, list[Any]]:
        return {"output": [0.2 * torch.tanh(x)]}


def test_memnoise_and_a_controlnet(host: PatcherDouble) -> None:
    """What it adds is in the magnitude and its gradient, and that the network empties lists does no harm."""

    def sampling(p: Any, *args: Any, **kwargs: Any) -> None:
        p.sd_model.forge_objects.unet = patched = unet().clone()
        patched.add_patched_controlnet(ControlNet())

    settings = {"method": "per_sample", "max_steps": 3, "target": 0}
    scripts = {"memnoise": {"args": [True, settings]}}
    without, plain = run(host, alwayson_scripts=scripts), run(host)
    does(host, sampling=sampling)
    controlled, answer = run(host), run(host, alwayson_scripts=scripts)
    assert "Memnoise failed" not in answer.infotexts[0] and "steps taken: 3" in answer.infotexts[0]
    pictures = [plain, without, controlled, answer]
    assert all(close(a, b) > ROUNDING for k, a in enumerate(pictures) for b in pictures[:k])
