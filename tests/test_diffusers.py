"""The helper for diffusers, on tiny pipelines of random weights that are made here: nothing is downloaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

from lib_memnoise.core.delta import magnitude  # noqa: E402
from lib_memnoise.core.guidance import transition_point  # noqa: E402
from lib_memnoise.diffusers import mitigate  # noqa: E402
from lib_memnoise.errors import SettingError, Unsupported  # noqa: E402
from lib_memnoise.methods import batch_wise  # noqa: E402
from lib_memnoise.methods.batch import BatchContext  # noqa: E402
from lib_memnoise.methods.pipeline import run  # noqa: E402
from lib_memnoise.settings import from_mapping  # noqa: E402

SIDE = 16
STEPS = 10
WORDS = ("a", "red", "fox", "in", "the", "snow", "blurred")
PROMPT = "a red fox in the snow"


def tokenizer(folder: Path) -> Any:
    tokens = ["<|startoftext|>", "<|endoftext|>", *(f"{word}</w>" for word in WORDS), *"abcdefghijklmnopqrstuvwxyz"]
    tokens += [f"{letter}</w>" for letter in "abcdefghijklmnopqrstuvwxyz" if f"{letter}</w>" not in tokens]
    merges = ["#version: 0.2"]
    for word in WORDS:
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        while len(pieces) > 1:
            merges.append(f"{pieces[0]} {pieces[1]}")
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
            tokens += [piece for piece in pieces[:1] if piece not in tokens]
    (folder / "vocab.json").write_text(json.dumps({token: k for k, token in enumerate(tokens)}), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(merges), encoding="utf-8")
    return transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)


def text_encoder(kind: Any, vocabulary: int) -> Any:
    return kind(
        transformers.CLIPTextConfig(
            vocab_size=vocabulary, hidden_size=32, intermediate_size=37, num_attention_heads=4, num_hidden_layers=2,
            projection_dim=32, bos_token_id=0, eos_token_id=1, pad_token_id=1,
        )
    ).eval()  # fmt: skip


def unet(width: int, **more: Any) -> Any:
    return diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, sample_size=SIDE, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=width, attention_head_dim=8, **more,
    ).eval()  # fmt: skip


def autoencoder() -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4,
        up_block_types=("UpDecoderBlock2D",) * 2, in_channels=3, out_channels=3,
    ).eval()  # fmt: skip


def scheduler(kind: str = "DDIMScheduler", prediction: str = "epsilon") -> Any:
    # As Stable Diffusion's repositories have them; a pipeline corrects other values of DDIM's.
    more = {"steps_offset": 1, "clip_sample": False} if kind == "DDIMScheduler" else {}
    return getattr(diffusers, kind)(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction, **more
    )  # fmt: skip


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Any:
    torch.manual_seed(0)
    words = tokenizer(tmp_path_factory.mktemp("tokenizer"))
    pipe = diffusers.StableDiffusionPipeline(
        vae=autoencoder(), text_encoder=text_encoder(transformers.CLIPTextModel, len(words)), tokenizer=words,
        unet=unet(32), scheduler=scheduler(), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Any:
    torch.manual_seed(1)
    words = tokenizer(tmp_path_factory.mktemp("tokenizer"))
    more = {
        "addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 80,
        "use_linear_projection": True,
    }  # fmt: skip
    pipe = diffusers.StableDiffusionXLPipeline(
        vae=autoencoder(), text_encoder=text_encoder(transformers.CLIPTextModel, len(words)), tokenizer=words,
        text_encoder_2=text_encoder(transformers.CLIPTextModelWithProjection, len(words)), tokenizer_2=words,
        unet=unet(64, **more), scheduler=scheduler("EulerDiscreteScheduler"), add_watermarker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(seeds: list[int]) -> Tensor:
    return torch.stack([torch.randn(4, SIDE, SIDE, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def delta_of(pipe: Any, kind: str = "DDIMScheduler", prediction: str = "epsilon") -> Callable[[Tensor], Tensor]:
    """Δ(x, T) of one image, written anew."""
    steps = scheduler(kind, prediction)
    steps.set_timesteps(STEPS)
    t = steps.timesteps[0]
    ids = pipe.tokenizer(["", PROMPT], padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        empty, text = pipe.text_encoder(ids)[0].split(1)

    def delta(x: Tensor) -> Tensor:
        given = steps.scale_model_input(x * steps.init_noise_sigma, t)
        return pipe.unet(given, t, text).sample - pipe.unet(given, t, empty).sample

    return delta


@torch.no_grad()
def test_none_is_the_pipelines_own_picture(sd: Any) -> None:
    found = mitigate(sd, PROMPT, seeds=[5], settings={"method": "none"}, num_inference_steps=STEPS)
    assert torch.equal(found.arguments["latents"], drawn([5]))
    mine = sd(**found.arguments, output_type="pt").images
    plain = sd(PROMPT, latents=drawn([5]), num_inference_steps=STEPS, output_type="pt").images
    assert torch.equal(mine, plain)
    assert found.reports[0].before == pytest.approx(float(magnitude(delta_of(sd)(drawn([5])))), rel=1e-4)
    assert found.reports[0].forward_rows == 2 + 2 * STEPS
    assert found.infotext[0]["Memnoise"] == "none" and "Memnoise magnitude" in found.infotext[0]
    # As the WebUI's: what follows the preset is not spelled out.
    followed = mitigate(sd, PROMPT, seeds=[5], settings={"method": "batch_wise"}, num_inference_steps=STEPS)
    assert not {"Memnoise gamma", "Memnoise tau"} & followed.infotext[0].keys()
    assert "gamma=0.7" in followed.infotext[0]["Memnoise used"]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    "kind", ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "HeunDiscreteScheduler"]
)
@torch.no_grad()
def test_the_noise_is_that_of_the_method_for_this_delta(sd: Any, kind: str, prediction: str) -> None:
    """What the WebUI runs, `methods.pipeline.run`, gives the same noise for the same Δ; so does Algorithm 1 itself."""
    before = sd.scheduler
    try:
        sd.scheduler = scheduler(kind, prediction)
        found = mitigate(
            sd, PROMPT, seeds=[5], settings={"method": "batch_wise", "gamma": 0.7, "rho": 20, "steps": 2},
            num_inference_steps=STEPS,
        )  # fmt: skip
        first = float(sd.scheduler.timesteps[0]) if sd.scheduler.timesteps is not None else 0.0
    finally:
        sd.scheduler = before
    delta, x, used = delta_of(sd, kind, prediction), drawn([5]), found.reports[0].used
    expected = batch_wise.adjust(x, delta, gamma=0.7, rho=float(str(used["rho"])), steps=2)
    assert torch.allclose(
        found.arguments["latents"], expected[0] if isinstance(expected, tuple) else expected, atol=1e-5
    )
    assert not torch.allclose(found.arguments["latents"], x, atol=1e-3)
    native = "eps" if prediction == "epsilon" else "v"
    webui = run(x, delta, found.settings, BatchContext(native, first=first))
    assert torch.allclose(found.arguments["latents"], webui.x, atol=1e-5)


@pytest.mark.parametrize("negative", [None, "blurred"])
@torch.no_grad()
def test_guidance_is_held_back_until_tau(sd: Any, negative: str | None) -> None:
    """DDIM and guidance, step by step as Algorithm 1 has it; each image of the batch on its own."""
    tau, scale = 500.0, 7.5
    found = mitigate(
        sd, [PROMPT, "a fox"], seeds=[5, 6], settings={"method": "static", "tau": tau}, negative_prompt=negative,
        num_inference_steps=STEPS, guidance_scale=scale,
    )  # fmt: skip
    mine = sd(**found.arguments, output_type="latent").images

    steps, x = scheduler(), drawn([5, 6])
    steps.set_timesteps(STEPS)

    def encode(texts: list[str]) -> Tensor:
        ids = sd.tokenizer(texts, padding="max_length", max_length=77, return_tensors="pt").input_ids
        return sd.text_encoder(ids)[0]

    text, empty, unwanted = encode([PROMPT, "a fox"]), encode([""] * 2), encode([negative or ""] * 2)
    for t in steps.timesteps:
        if float(t) > tau:
            eps = sd.unet(x, t, empty).sample
        else:
            against = sd.unet(x, t, unwanted).sample
            eps = against + scale * (sd.unet(x, t, text).sample - against)
        x = steps.step(eps, t, x).prev_sample
    assert torch.allclose(mine, x, atol=1e-3)


@torch.no_grad()
def test_a_transition_point_is_waited_for(sd: Any) -> None:
    found = mitigate(
        sd, PROMPT, seeds=[5], settings={"method": "dynamic", "latest": 100}, num_inference_steps=STEPS
    )  # fmt: skip
    guidance = found.arguments["callback_on_step_end"]
    sd(**found.arguments, output_type="latent")
    (start,) = guidance.starts
    assert len(start.curve) >= 3
    values = [value for _, value in start.curve]
    point = transition_point(start.curve)
    # It goes by the curve: what is seen of it ends one step after its first minimum, or at the latest.
    if point is None:
        assert start.curve[-1][0] > 100 and not any(a > b < c for a, b, c in zip(values, values[1:], values[2:]))
    else:
        assert values[-3] > values[-2] < values[-1] and start.curve[-2][0] == point


def test_per_sample_descends(sd: Any) -> None:
    settings = {"method": "per_sample", "target": 0.7, "target_kind": "fraction", "lr": 0.05, "max_steps": 20}
    found = mitigate(sd, PROMPT, seeds=[5, 6], settings=settings, num_inference_steps=STEPS)
    for report in found.reports:
        assert report.before is not None and report.after is not None and report.steps
        assert report.after < 0.7 * report.before or report.notes
        assert report.backward_rows == 2 * report.steps
    assert all(weight.requires_grad for weight in sd.unet.parameters())
    delta = delta_of(sd)
    with torch.no_grad():
        again = magnitude(delta(found.arguments["latents"][:1]))
    assert float(again) == pytest.approx(found.reports[0].after, rel=1e-3)


@torch.no_grad()
def test_sdxl(sdxl: Any) -> None:
    found = mitigate(sdxl, PROMPT, seeds=[5], settings={"method": "static", "tau": 500}, num_inference_steps=STEPS)
    mine = sdxl(**found.arguments, output_type="latent").images
    # With guidance from the first step on it is the pipeline's own picture, and without a prompt the empty one's.
    whole = mitigate(sdxl, PROMPT, seeds=[5], settings={"method": "none"}, num_inference_steps=STEPS)
    own = sdxl(PROMPT, latents=drawn([5]), num_inference_steps=STEPS, guidance_scale=7.5, output_type="latent").images
    assert torch.allclose(sdxl(**whole.arguments, output_type="latent").images, own, atol=1e-5)
    never = mitigate(sdxl, PROMPT, seeds=[5], settings={"method": "static", "tau": 0}, num_inference_steps=STEPS)
    assert not torch.allclose(mine, own, atol=1e-3)
    rows = never.arguments["callback_on_step_end"].rows(500.0)
    assert all(torch.equal(*value.chunk(2)) for value in rows)


def test_flagged_images_alone_are_mitigated(sd: Any) -> None:
    scores = [report.before for report in mitigate(sd, PROMPT, seeds=[5, 6], settings={"method": "none"}).reports]
    low, high = sorted(scores)
    factor = (4 * SIDE * SIDE / (4 * 64 * 64)) ** 0.5
    settings = {"method": "batch_wise", "when": "flagged", "threshold": (low + high) / 2 / factor}
    found = mitigate(sd, PROMPT, seeds=[5, 6], settings=settings)
    moved = [not torch.equal(a, b) for a, b in zip(found.arguments["latents"], drawn([5, 6]))]
    assert moved == [score == high for score in scores]
    assert [text["Memnoise mitigated"] for text in found.infotext] == [str(value) for value in moved]


@pytest.mark.parametrize(
    ("settings", "error", "sentence"),
    [
        ({"method": "batch"}, SettingError, "method"),
        ({"gamma": 11}, SettingError, "from 0 to 10"),
        ({"method": "cross_attention"}, Unsupported, "method = cross_attention"),
        ({"preset": "calibrated"}, Unsupported, "preset = calibrated"),
        ({"method": "opposite_guidance"}, Unsupported, "opposite = 5"),
        ({"trace": "on"}, Unsupported, "trace = on"),
    ],
)
def test_what_cannot_be_done_is_said(sd: Any, settings: dict[str, Any], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        mitigate(sd, PROMPT, seeds=[5], settings=settings)


def test_each_image_takes_a_prompt(sd: Any) -> None:
    with pytest.raises(ValueError, match="2 prompts for 1 seeds"):
        mitigate(sd, [PROMPT, PROMPT], seeds=[5], settings={})


def test_unresolved_settings_reach_no_method() -> None:
    with pytest.raises(TypeError, match="resolved"):
        run(drawn([1]), lambda x: x, from_mapping({"method": "none"}), BatchContext("eps"))  # type: ignore[arg-type]
