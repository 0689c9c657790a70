"""A second extension in the host recomputes the adjusted noise, also with a LoRA and a textual inversion, and breaks
the network."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.contract.conftest import HOSTS, ROUNDING, Run, Studio, close, open_host
from tests.hosts import fork_checkpoints
from tests.hosts.checkpoints import TEXT_WIDTH

WITNESS = Path(__file__).resolve().parents[1] / "hosts" / "witness"


@pytest.fixture(scope="module", params=HOSTS)
def studio(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    with open_host(request.param, tmp_path_factory, extensions=[WITNESS]) as host:
        yield Studio(host)


def witnessed(studio: Studio, settings: dict[str, Any], expected: dict[str, Any], **payload: Any) -> float:
    scripts = {"memnoise": {"args": [True, settings]}, "witness": {"args": [json.dumps(expected), ""]}}
    answer = studio.answer(alwayson_scripts=scripts, **payload)
    assert answer.status == 200, answer.detail
    text = answer.infotexts[-1]
    assert "Memnoise failed" not in text, text
    assert "Frozen: 0" in text
    return float(text.split("Witness: ")[1].split(",")[0])


@pytest.mark.parametrize("model", ["sd1", "sd2-v", "sdxl", "sd1-inpainting"])
@pytest.mark.parametrize("sampler", ["DDIM", "PLMS", "Euler", "DPM++ 2M SDE", "Heun"])
def test_the_noise_is_what_the_paper_says(studio: Studio, model: str, sampler: str) -> None:
    studio.host.load(model)
    numbers = {"gamma": 0.05, "rho": 20, "steps": 3} if model == "sd2-v" else {"gamma": 0.7, "rho": 50, "steps": 2}
    assert witnessed(studio, numbers, numbers, sampler_name=sampler) < 1e-4
    per_sample = {"method": "per_sample", "lr": 0.02, "target": 0, "max_steps": 4}
    expected = {"lr": 0.02, "max_steps": 4}
    for payload in ({"batch_size": 1}, {"batch_size": 2, "prompt": "a fox AND snow :0.5"}):
        # Adam divides by the gradient's own size: a rounding error in a tiny one is not tiny any more
        assert witnessed(studio, per_sample, expected, sampler_name=sampler, **payload) < 5e-3
    studio.host.load("sd1")


BOTH: list[tuple[dict[str, Any], dict[str, Any], float]] = [
    ({"tau": 500}, {"gamma": 0.7, "rho": 50, "steps": 2}, 1e-4),
    ({"method": "per_sample", "lr": 0.02, "target": 0, "max_steps": 4}, {"lr": 0.02, "max_steps": 4}, 5e-3),
]
"""Settings of memnoise and of the witness, and how far their noise may lie apart."""


@pytest.fixture
def real(studio: Studio) -> Studio:
    if not studio.is_real:
        pytest.skip("the double has no LoRA and no textual inversion")
    return studio


def write_safetensors(file: Path, tensors: dict[str, np.ndarray]) -> None:
    header, data = {}, b""
    for name, value in tensors.items():
        raw = value.astype("<f4").tobytes()
        header[name] = {"dtype": "F32", "shape": value.shape, "data_offsets": (len(data), len(data) + len(raw))}
        data += raw
    text = json.dumps(header).encode()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def text_width(studio: Studio) -> int:
    return int(fork_checkpoints.CLIP["hidden_size"]) if studio.is_fork else TEXT_WIDTH


def lora(studio: Studio, rank: int = 2) -> dict[str, np.ndarray]:
    """Of the U-Net's cross-attention and of the text encoder, as strong as the weights that it changes."""
    text = text_width(studio)
    width = int(fork_checkpoints.UNET["model_channels"]) if studio.is_fork else TEXT_WIDTH
    outputs = {
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k": width,
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k": width if studio.is_fork else 2 * width,
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj": text,
    }
    random = np.random.default_rng(0)
    tensors = {}
    for name, outs in outputs.items():
        tensors[f"{name}.lora_up.weight"] = random.normal(0, 0.5, (outs, rank))
        tensors[f"{name}.lora_down.weight"] = random.normal(0, 0.3 * (TEXT_WIDTH / text) ** 0.5, (rank, text))
        tensors[f"{name}.alpha"] = np.array(float(rank))
    return tensors


def check_with_and_without(
    studio: Studio, without: Run, numbers: tuple[dict[str, Any], dict[str, Any], float], prompt: str
) -> None:
    settings, expected, tolerance = numbers
    payload = {"prompt": prompt, "batch_size": 2}
    plain = studio.run(**payload)
    assert witnessed(studio, settings, expected, **payload) < tolerance
    run, again = studio.run(settings, **payload), studio.run(settings, **payload)
    for image in range(2):
        assert run.read("Memnoise failed", image) is None and run.number("rows", image) > 0
        for key in ("magnitude", *(["magnitude after"] if "method" in settings else [])):
            assert run.number(key, image) != pytest.approx(without.number(key, image), rel=1e-2), key
        assert not np.array_equal(run.pictures[image], plain.pictures[image])
        assert not np.array_equal(run.pictures[image], without.pictures[image])
        assert np.array_equal(run.pictures[image], again.pictures[image])
    assert run.infotexts == again.infotexts


@pytest.mark.parametrize("numbers", BOTH, ids=["batch_wise", "per_sample"])
def test_with_a_lora(real: Studio, numbers: tuple[dict[str, Any], dict[str, Any], float]) -> None:
    write_safetensors(real.host.data / "models" / "Lora" / "tilt.safetensors", lora(real))
    assert real.host.post("/sdapi/v1/refresh-loras").status_code == 200
    assert "tilt" in [entry["name"] for entry in real.host.get("/sdapi/v1/loras").json()]
    without = real.run(numbers[0], prompt="a fox", batch_size=2)
    with_lora = "a fox<lora:tilt:1>"
    check_with_and_without(real, without, numbers, with_lora)
    # The empty prompt that a negative prompt hides is encoded with the LoRA as well, and anew for every request.
    for prompt in ("a fox", with_lora):
        hidden, plain = (real.run(numbers[0], prompt=prompt, negative_prompt=text) for text in ("blurry", ""))
        assert hidden.number("magnitude") == pytest.approx(plain.number("magnitude"), rel=1e-3)
    # it does not linger
    after = real.run(numbers[0], prompt="a fox", batch_size=2)
    assert all(map(np.array_equal, after.pictures, without.pictures))
    if real.is_fork:  # which put weights that a LoRA has changed back frozen
        after.infotexts = [text.replace("Frozen: 2", "Frozen: 0") for text in after.infotexts]
    assert after.infotexts == without.infotexts


@pytest.mark.parametrize("numbers", BOTH, ids=["batch_wise", "per_sample"])
def test_with_a_textual_inversion(real: Studio, numbers: tuple[dict[str, Any], dict[str, Any], float]) -> None:
    file = real.host.data / "embeddings" / "memtok.safetensors"

    def reload() -> None:
        assert real.host.post("/sdapi/v1/refresh-embeddings").status_code == 200
        assert ("memtok" in real.host.get("/sdapi/v1/embeddings").json()["loaded"]) == file.exists()
        if real.is_fork:  # whose text encoder reads them when it is loaded
            for checkpoint in ("sd1-b", "sd1"):
                real.host.load(checkpoint)
                real.run()
        real.run(prompt="another")  # the host keeps the last prompt's condition

    prompt = "a memtok fox"
    reload()
    without = real.run(numbers[0], prompt=prompt, batch_size=2)
    write_safetensors(file, {"emb_params": np.random.default_rng(0).normal(0, 0.7, (3, text_width(real)))})
    try:
        reload()
        check_with_and_without(real, without, numbers, prompt)
    finally:
        file.unlink()
        reload()


PER_SAMPLE = {"method": "per_sample", "lr": 0.05, "target": 0.9, "target_kind": "fraction"}


def with_and_without_handover(studio: Studio, settings: dict[str, Any], **payload: Any) -> tuple[Run, Run]:
    """The second run's network is another function while the noise is adjusted, for all that memnoise knows."""
    runs = []
    for fault in ("", "none"):
        scripts = {"memnoise": {"args": [True, settings]}, "witness": {"args": ["", fault]}}
        answer = studio.answer(alwayson_scripts=scripts, **payload)
        assert answer.status == 200, answer.detail
        runs.append(Run(answer.images, answer.infotexts, answer.info, payload.get("batch_size", 1)))
        assert runs[-1].read("Memnoise failed") is None
    return runs[0], runs[1]


@pytest.mark.parametrize("model", ["sd1", "sd2-v", "sdxl", "sd1-inpainting"])
@pytest.mark.parametrize("sampler", ["DDIM", "UniPC", "Euler", "DPM++ 2M SDE", "LCM"])
def test_the_last_answers_are_the_samplers_first(studio: Studio, model: str, sampler: str) -> None:
    studio.host.load(model)
    payload = {"sampler_name": sampler, "cfg_scale": 5}
    short, plain = with_and_without_handover(studio, PER_SAMPLE, **payload)
    assert np.array_equal(short.pictures[0], plain.pictures[0])
    assert short.number("rows") == plain.number("rows") - 2
    # AND has more rows an image; images that end at different steps were last evaluated in other batches.
    payload |= {"prompt": "a fox AND snow :0.5", "batch_size": 3}
    short, plain = with_and_without_handover(studio, PER_SAMPLE, **payload)
    for image in range(3):
        assert close(short.pictures[image], plain.pictures[image]) < ROUNDING
        assert short.number("rows", image) == plain.number("rows", image) - 3
    studio.host.load("sd1")


def test_rows_that_differ_are_evaluated(studio: Studio) -> None:
    # The sampler's unconditional row has the negative prompt, the adjustment's has not.
    negative = {"negative_prompt": "blurry"}
    short, plain = with_and_without_handover(studio, PER_SAMPLE, **negative)
    assert close(short.pictures[0], plain.pictures[0]) < ROUNDING
    assert short.number("rows") == plain.number("rows") - 1
    # Batch-wise leaves the noise where nothing was evaluated.
    short, plain = with_and_without_handover(studio, {"tau": 999})
    assert np.array_equal(short.pictures[0], plain.pictures[0]) and short.number("rows") == plain.number("rows")


def test_token_merging_makes_the_network_another(studio: Studio) -> None:
    if not (studio.is_real or studio.is_fork):
        pytest.skip("the A1111 double has no token merging")
    with studio.options({"token_merging_ratio": 0.5}):
        short, plain = with_and_without_handover(studio, PER_SAMPLE, width=128, height=128)
    assert np.array_equal(short.pictures[0], plain.pictures[0]) and short.number("rows") == plain.number("rows")


FAULTS = {
    "out of memory": "out of memory while adjusting the noise",
    "error": "the network is not in the mood",
    "nan": "not finite",
}


@pytest.mark.parametrize("method", ["batch_wise", "per_sample"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_failure_never_costs_the_image(studio: Studio, fault: str, method: str) -> None:
    plain = studio.run(batch_size=2)
    scripts = {"memnoise": {"args": [True, {"method": method}]}, "witness": {"args": ["", fault]}}
    answer = studio.answer(alwayson_scripts=scripts, batch_size=2)
    assert answer.status == 200, answer.detail
    for picture, unmitigated in zip(answer.images[-2:], plain.pictures):
        assert np.array_equal(picture, unmitigated)
    for text in answer.infotexts[-2:]:
        assert FAULTS[fault] in text.split("Memnoise failed: ")[1]
        assert "Frozen: 0" in text
    # nothing lingers
    assert np.array_equal(studio.run(batch_size=2).pictures[0], plain.pictures[0])


@pytest.mark.parametrize("calls", [1, 2, 3])
@pytest.mark.parametrize("batch", [1, 2])
def test_out_of_memory_is_tried_again_leaner(studio: Studio, batch: int, calls: int) -> None:
    """The network's first evaluations fail: the noise is adjusted all the same, or the image comes as it was."""
    plain, mitigated = (studio.run(settings, batch_size=batch) for settings in (None, PER_SAMPLE))
    scripts = {"memnoise": {"args": [True, PER_SAMPLE]}, "witness": {"args": ["", f"out of memory {calls} times"]}}
    answer = studio.answer(alwayson_scripts=scripts, batch_size=batch)
    run = Run(answer.images, answer.infotexts, answer.info, batch)
    succeeds = calls <= batch
    for image in range(batch):
        assert run.read("Frozen", image) == "0"
        expected = mitigated if succeeds else plain
        assert close(run.pictures[image], expected.pictures[image]) < (ROUNDING if succeeds else 1e-9)
        assert (run.read("Memnoise failed", image) is None) == succeeds
        note, used = (run.read(f"Memnoise {key}", image) or "" for key in ("note", "used"))
        assert "adjusted again, checkpointed" in note
        assert ("one image at a time" in note) == (batch == 2 and calls > 1)
        if succeeds:
            assert used.split("gradient=")[1].split()[0] == (
                "checkpointed" if calls == 1 else "checkpointed,_one_image_at_a_time"
            )


@pytest.mark.parametrize("mode", [1, 2])
def test_what_was_checkpointed_is_handed_over_too(studio: Studio, monkeypatch: pytest.MonkeyPatch, mode: int) -> None:
    if studio.is_real:
        pytest.skip("memory is not short there")
    plain = studio.run(PER_SAMPLE, batch_size=2)
    from lib_memnoise.sampling.memory_mode import MemoryMode
    from lib_memnoise.webui import gradients

    monkeypatch.setattr(gradients, "first_attempt", lambda *args: MemoryMode(mode))
    run = studio.run(PER_SAMPLE, batch_size=2)
    for image in range(2):
        assert "gradient=checkpointed" in (run.read("Memnoise used", image) or "")
        assert run.number("rows", image) == plain.number("rows", image)
        assert close(run.pictures[image], plain.pictures[image]) < ROUNDING


@pytest.mark.parametrize("method", ["batch_wise", "per_sample"])
@pytest.mark.parametrize("fault", FAULTS)
def test_or_the_request_fails_if_that_was_asked_for(studio: Studio, fault: str, method: str) -> None:
    scripts = {"memnoise": {"args": [True, {"method": method, "fail_instead": True}]}, "witness": {"args": ["", fault]}}
    answer = studio.answer(alwayson_scripts=scripts)
    assert answer.status in (422, 500) and FAULTS[fault] in answer.detail
    assert studio.answer([True, {"method": method}]).status == 200
    with studio.options({"memnoise_fail_instead": True}):
        scripts["memnoise"] = {"args": [True, {"method": method}]}
        answer = studio.answer(alwayson_scripts=scripts)
        assert answer.status in (422, 500) and FAULTS[fault] in answer.detail


@pytest.mark.parametrize(
    ("fault", "method"),
    [
        *((fault, method) for fault in ("interrupt", "skip") for method in ("batch_wise", "per_sample")),
        ("interrupt in backward", "per_sample"),
    ],
)
def test_interrupt_and_skip_are_honoured_in_the_loop(studio: Studio, fault: str, method: str) -> None:
    settings: dict[str, Any] = {
        "method": method,
        **({"steps": 50} if method == "batch_wise" else {"target": 0, "max_steps": 1000}),
    }
    scripts = {"memnoise": {"args": [True, settings]}, "witness": {"args": ["", fault]}}
    answer = studio.answer(alwayson_scripts=scripts)
    assert answer.status == 200 and answer.seconds < 5
    assert len(answer.images) >= 1
    text = answer.infotexts[-1]
    assert "interrupted before the noise was adjusted" in text and "Memnoise failed" not in text
    assert "Frozen: 0" in text
    assert np.array_equal(studio.run({}).images[0], studio.run({}).images[0])


def test_a_gradient_that_is_not_finite_leaves_the_noise(studio: Studio) -> None:
    scripts = {"memnoise": {"args": [True, PER_SAMPLE]}, "witness": {"args": ["", "nan in backward"]}}
    answer = studio.answer(alwayson_scripts=scripts)
    assert answer.status == 200, answer.detail
    assert np.array_equal(answer.images[-1], studio.run().pictures[0])
    text = answer.infotexts[-1]
    assert "the target was not reached in 0 steps" in text and "Frozen: 0" in text
    assert studio.run(PER_SAMPLE).number("steps taken") > 0
