"""Scores without a picture, calibrations and traces, over HTTP."""

from __future__ import annotations

import json
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lib_memnoise.core.calibration import ordinary_prompts
from lib_memnoise.settings import size_factor
from tests.contract.conftest import Studio
from tests.contract.test_automatic import scores
from tests.contract.test_generation import PROMPTS, same
from tests.contract.test_witness import lora, write_safetensors

SMALL: dict[str, Any] = {"width": 64, "height": 64, "steps": 8, "cfg_scale": 6, "sampler_name": "DDIM"}


def post(studio: Studio, path: str, body: Any) -> tuple[int, Any]:
    answer = studio.host.post(f"/memnoise/v1/{path}", json=body)
    return answer.status_code, answer.json()


def listed(studio: Studio) -> list[dict[str, Any]]:
    return list(studio.host.get("/memnoise/v1/calibrations").json())


def kept_in(studio: Studio) -> Path:
    """The folder of the host's calibrations."""
    listed(studio)  # of several doubles this one is at work then
    data = studio.host.data if studio.is_real else Path(sys.modules["modules.paths"].data_path)
    return Path(data) / "memnoise" / "calibrations"


def forget(studio: Studio) -> None:
    for path in kept_in(studio).glob("*"):
        path.unlink()


def score(studio: Studio, **body: Any) -> dict[str, Any]:
    status, answer = post(studio, "score", {**SMALL, **body})
    assert status == 200, answer
    return dict(answer)


@pytest.mark.parametrize("sampler", ["DDIM", "Euler", "UniPC", "DPM++ 2M"])
@pytest.mark.parametrize("prompt", ["negative", "AND", "long", "weight", "editing"])
def test_a_score_is_the_generations_own(studio: Studio, prompt: str, sampler: str) -> None:
    payload = {"prompt": "a red fox in the snow", "sampler_name": sampler, **PROMPTS[prompt]}
    run = studio.run({"method": "none"}, **payload, batch_size=2)
    before = studio.run(**payload)
    images = score(studio, **payload, seeds=[7, 8])["images"]
    assert [image["score"] for image in images] == pytest.approx(scores(run), rel=1e-3)
    assert [image["seed"] for image in images] == [7, 8] and all(image["rows"] >= 2 for image in images)
    assert same(before, studio.run(**payload))  # nothing is left behind


def test_a_score_with_a_lora(studio: Studio) -> None:
    if not studio.is_real:
        pytest.skip("the double has no LoRA")
    write_safetensors(studio.host.data / "models" / "Lora" / "tilt.safetensors", lora(studio))
    assert studio.host.post("/sdapi/v1/refresh-loras").status_code == 200
    found = {}
    for prompt in ("a fox", "a fox<lora:tilt:1>", "a fox"):
        found[prompt] = score(studio, prompt=prompt, seeds=[7])["images"][0]["score"]
        assert found[prompt] == pytest.approx(
            studio.run({"method": "none"}, prompt=prompt).number("magnitude"), rel=1e-3
        )
    assert found["a fox"] != pytest.approx(found["a fox<lora:tilt:1>"], rel=1e-2)


def test_random_seeds_and_several_prompts(studio: Studio) -> None:
    images = score(studio, prompts=["a fox", "a hill"], seeds=[-1, -1, 3])["images"]
    assert [image["prompt"] for image in images] == ["a fox"] * 3 + ["a hill"] * 3
    assert len({image["score"] for image in images}) == 6
    assert all(image["seed"] >= 0 for image in images)
    again = score(studio, prompt="a fox", seed=images[0]["seed"])["images"][0]
    assert again["score"] == pytest.approx(images[0]["score"], rel=1e-4)


@pytest.mark.parametrize("model", ["sd1", "sd2-v", "sdxl"])
def test_words(studio: Studio, model: str) -> None:
    studio.host.load(model)
    prompt = "a red fox in the snow"
    plain = score(studio, prompt=prompt, seed=7)["images"][0]
    image = score(studio, prompt=prompt, seed=7, words=True)["images"][0]
    assert image["score"] == pytest.approx(plain["score"], rel=1e-3)
    assert len(image["words"]) == 6 and max(size for _, size in image["words"]) == 1
    assert all(0 < size <= 1 for _, size in image["words"])
    if studio.is_real:
        assert [word for word, _ in image["words"]] == ["a", "red", "fox", "in", "the", "snow"]


BAD: list[tuple[Any, str]] = [
    ([], "must be a JSON object"),
    ({}, "the prompt is missing; prompt must be a text or a list of texts"),
    ({"prompt": ""}, "an empty prompt has no score"),
    ({"prompt": ["a", " "]}, "an empty prompt has no score"),
    ({"prompt": 3}, "prompt = 3 is not valid; it must be a text or a list of texts."),
    ({"prompts": [""]}, 'prompts = [""] is not valid; it must be a text or a list of texts that are not empty'),
    ({"prompts": []}, "prompts = [] is not valid; it must be a text or a list of texts, at least one."),
    ({"prompt": "a", "prompts": ["b"]}, "prompt and prompts are both given; a score takes one of them."),
    ({"prompt": "a" * 10_001}, "prompt has 10001 characters; it may have 10000."),
    ({"prompt": ["a"] * 5000}, "5000 images are too many for one score; it may have 256."),
    ({"prompt": "a", "seeds": list(range(300))}, "300 images are too many"),
    (
        {"prompt": "a", "seed": "x"},
        'seed = "x" is not valid; it must be a whole number from -1 (a random one) to 4294967295, or',
    ),
    ({"prompt": "a", "width": 100000}, "width = 100000 is not valid"),
    ({"prompt": "a", "height": 100}, "height = 100 is not valid; it must be a multiple of 8 from 64 to 2048."),
    (
        {"prompt": "a", "sampler_name": "Eular"},
        'sampler_name = "Eular" is not valid (did you mean "Euler"?); it must be one of',
    ),
    (
        {"prompt": "a", "cfg_scale": 1},
        "cfg_scale = 1 is not valid; it must be a number above 1, for there is no guidance",
    ),
    ({"prompt": "a", "steps": 0}, "steps = 0 is not valid"),
    ({"prompt": "a", "step": 9}, 'there is no "step" in a score (did you mean "steps"?); it may have prompt'),
    ({"prompt": "a", "CFG scale": 9}, 'there is no "CFG scale" in a score (did you mean "cfg_scale"?)'),
    (
        {"prompt": "a", "scheduler": "Karas"},
        'scheduler = "Karas" is not valid (did you mean "Karras"?); it must be one',
    ),
    ({"prompt": "a", "styles": ["no such style"]}, 'styles = "no such style" is not valid'),
    ({"prompt": "a", "negative_prompt": ["x"]}, 'negative_prompt = ["x"] is not valid; it must be a text.'),
    ({"prompt": "a", "words": 1}, "words = 1 is not valid; it must be true or false."),
]


@pytest.mark.parametrize(("body", "words"), BAD, ids=lambda value: str(value)[:40])
def test_bad_requests(studio: Studio, body: Any, words: str) -> None:
    if isinstance(body, dict):
        body = {**SMALL, **body}
    status, answer = post(studio, "score", body)
    assert status == 422 and words in answer["detail"], answer
    assert answer["detail"].count("\n") == 0 and len(answer["detail"]) < (1500 if studio.is_fork else 700)


def test_scores_queue_with_generations(studio: Studio) -> None:
    alone = score(studio, prompt="a fox", seeds=[7, 8])["images"]
    picture = studio.run({"tau": 500})
    with ThreadPoolExecutor(4) as pool:
        scored = [pool.submit(score, studio, prompt="a fox", seeds=[7, 8]) for _ in range(3)]
        pictures = [pool.submit(studio.run, {"tau": 500}) for _ in range(3)]
        assert all(answer.result()["images"] == alone for answer in scored)
        assert all(same(run.result(), picture) for run in pictures)


def test_calibration(studio: Studio) -> None:
    forget(studio)
    first = score(studio, prompt="a red fox in the snow", seed=7)
    status, made = post(studio, "calibrate", {**SMALL, "prompts": ordinary_prompts(40)})
    assert status == 200 and made["count"] == 40 and made["width"] == 64 and made["timestep"] == 876
    assert 0 < made["lowest"] <= made["median"] <= made["highest"] == made["threshold"]
    assert {name: value for name, value in made.items() if name != "notes"} in listed(studio)
    second = score(studio, prompt="a red fox in the snow", seed=7)
    assert not first["calibrated"] and second["calibrated"] and second["threshold"] == made["threshold"]
    assert second["notes"] == [] and second["calibration"]["promise"] == made["promise"]
    percentile = second["images"][0]["percentile"]
    assert first["images"][0]["percentile"] is None and 0 <= percentile <= 100

    # Generations go by it: rates, and the preset made of it.
    run = studio.run({"when": "flagged", "false_positives": 0.5})
    assert (run.read("Memnoise mitigated") == "True") == (percentile > 52)
    assert "calibrated" not in (run.read("Memnoise note") or "")
    factor = size_factor(4 * 8 * 8, "eps")
    used = studio.run({"preset": "calibrated"}).read("Memnoise used") or ""
    assert f"gamma={min(0.63 * factor / made['median'], 10):.3g}"[:9] in used
    target = studio.run({"preset": "calibrated", "method": "per_sample", "max_steps": 1}).read("Memnoise used") or ""
    assert f"target={made['median']:.3g}"[:9] in target


def test_too_few_to_calibrate(studio: Studio) -> None:
    status, answer = post(studio, "calibrate", {**SMALL, "prompts": ["a fox"] * 19})
    assert status == 422 and "it takes 20 different prompts; these are 1." in answer["detail"]


def trace_of(studio: Studio, run: Any) -> list[dict[str, Any]]:
    answer = studio.host.get(f"/memnoise/v1/trace/{run.read('Memnoise trace id')}")
    assert answer.status_code == 200
    return list(answer.json()["images"])


@pytest.mark.parametrize("sampler", ["DDIM", "Euler", "Heun"])
def test_trace(studio: Studio, sampler: str) -> None:
    payload = {"sampler_name": sampler, "batch_size": 2, "steps": 12}
    plain, traced = studio.run({"method": "none"}, **payload), studio.run({"method": "none", "trace": "on"}, **payload)
    assert same(plain, traced) and traced.number("rows") == plain.number("rows")  # with guidance on it is free
    for image, found in enumerate(trace_of(studio, traced)):
        points = found["points"]
        assert points[0]["magnitude"] == pytest.approx(traced.number("magnitude", image), rel=1e-3)
        assert all(point["guided"] and point["against"] == "empty" for point in points)
        assert 2 * len(points) == traced.number("rows", image)
        timesteps = [point["t"] for point in points]
        assert timesteps == sorted(timesteps, reverse=True) or sampler == "Heun"

    held, free = studio.run({"tau": 500, "trace": "on"}, **payload), studio.run({"tau": 500}, **payload)
    assert all(np.abs(a.astype(float) - b).mean() < 0.5 for a, b in zip(held.pictures, free.pictures))
    for image, found in enumerate(trace_of(studio, held)):
        off = [point for point in found["points"] if not point["guided"]]
        assert off and held.number("rows", image) == free.number("rows", image) + len(off)
        assert found["tau"] == 500 and all(point["t"] > 500 for point in off)


def test_a_trace_says_what_it_is_measured_against(studio: Studio) -> None:
    run = studio.run({"tau": 500, "trace": "on"}, negative_prompt="blurry", steps=12)
    points = trace_of(studio, run)[0]["points"]
    assert {(point["guided"], point["against"]) for point in points} == {(False, "empty"), (True, "negative")}


@pytest.mark.parametrize("sampler", ["DDIM", "Euler a", "DPM++ SDE"])
def test_the_noise_as_drawn_is_traced_too(studio: Studio, sampler: str) -> None:
    """The picture is the same as without; the other curve is that of guidance held back alone (γ̃ = 0)."""
    payload = {"sampler_name": sampler, "batch_size": 2, "steps": 6}
    settings = {"preset": "custom", "tau": 500}
    traced, both = (studio.run({**settings, "trace": trace}, **payload) for trace in ("on", "compare"))
    held = studio.run({**settings, "gamma": 0, "trace": "on"}, **payload)
    assert same(traced, both) and traced.info["all_seeds"] == both.info["all_seeds"]
    curves, alone = trace_of(studio, both), trace_of(studio, held)
    for image, found in enumerate(curves):
        assert found["points"] == trace_of(studio, traced)[image]["points"]
        drawn, expected = found["drawn"], alone[image]["points"]
        assert [point["t"] for point in drawn] == [point["t"] for point in expected]
        assert [p["magnitude"] for p in drawn] == pytest.approx([p["magnitude"] for p in expected], rel=1e-3)
        assert drawn[0]["magnitude"] != found["points"][0]["magnitude"]
        extra = both.number("rows", image) - traced.number("rows", image)
        assert extra == 2 * len(drawn)
    assert studio.run({"method": "none", "trace": "compare"}).number("rows") == studio.run({"method": "none"}).number(
        "rows"
    )  # nothing is adjusted, so there is nothing to compare


def test_traces_are_saved_beside_the_pictures(studio: Studio, tmp_path: Path) -> None:
    if not studio.is_real:
        pytest.skip("the double saves no pictures")
    options = {"samples_save": True, "outdir_txt2img_samples": str(tmp_path), "memnoise_save_traces": True}
    with studio.options(options):
        run = studio.run({"trace": "on"}, batch_size=2, save_images=True)
        studio.run({}, save_images=True)
    saved = sorted(path for path in tmp_path.rglob("*.png") if ".memnoise." not in path.name)
    traces = sorted(tmp_path.rglob("*.memnoise.json"))
    assert len(saved) == 3 and len(traces) == 2
    for image, path in enumerate(traces):
        found = json.loads(path.read_text(encoding="utf-8"))
        assert found["images"] == [trace_of(studio, run)[image]]
        assert path.with_suffix("").with_suffix(".png") in saved
        with Image.open(path.with_suffix(".png")) as plot:
            assert plot.width > 300


@pytest.mark.parametrize("method", ["batch_wise", "none"])
def test_no_guidance_is_said(studio: Studio, method: str) -> None:
    run = studio.run({"method": method}, cfg_scale=1)
    assert "the CFG scale 1 is no guidance" in (run.read("Memnoise note") or "")
    assert "no guidance" not in (studio.run({"method": method}).read("Memnoise note") or "")


@pytest.mark.parametrize("sampler", ["DDIM", "Euler"])
def test_a_transition_point_is_the_first_minimum(studio: Studio, sampler: str) -> None:
    """Of several seeds some have one: where guidance starts follows from the traced curve."""
    payload = {"sampler_name": sampler, "batch_size": 4, "steps": 30, "prompt": "a fox AND snow :0.5"}
    settings = {"method": "none", "guidance": "transition", "latest": 100, "trace": "on"}
    run = studio.run(settings, **payload)
    for image, found in enumerate(trace_of(studio, run)):
        curve = [point["magnitude"] for point in found["points"] if not point["guided"]]
        on = [point for point in found["points"] if point["guided"]]
        falls = [k for k in range(1, len(curve) - 1) if curve[k - 1] > curve[k] < curve[k + 1]]
        assert falls == []  # guidance would have started there
        if found["transition"] is not None:
            assert curve[-2] > curve[-1] < on[0]["magnitude"]
            assert found["transition"] == found["points"][len(curve) - 1]["t"]
            assert run.number("transition at", image) == pytest.approx(found["transition"], rel=1e-3)


def test_no_such_trace(studio: Studio) -> None:
    answer = studio.host.get("/memnoise/v1/trace/none")
    assert answer.status_code == 404 and 'no trace "none"' in answer.json()["detail"]


def test_calibrations_do_not_clash(studio: Studio) -> None:
    body = {**SMALL, "prompts": ordinary_prompts(20), "steps": 5}
    with ThreadPoolExecutor(3) as pool:
        made = [answer[1] for answer in pool.map(lambda _: post(studio, "calibrate", body), range(3))]
    assert made[0] == made[1] == made[2]
    made[0].pop("notes")
    assert listed(studio).count(made[0]) == 1


def test_a_calibration_can_be_interrupted(studio: Studio) -> None:
    body = {**SMALL, "prompts": ordinary_prompts(250), "steps": 7}
    answered = threading.Event()

    def interrupt() -> None:
        # An interrupt before the job has begun is forgotten, so one is not enough.
        while not answered.wait(0.05):
            studio.host.post("/sdapi/v1/interrupt")

    stop = threading.Thread(target=interrupt)
    stop.start()
    try:
        status, answer = post(studio, "calibrate", body)
    finally:
        answered.set()
        stop.join()
    assert status == 409 and answer["detail"] == "memnoise: interrupted.", answer
    assert all(made["timestep"] != 858 for made in listed(studio))
    assert studio.run().images
    json.dumps(answer)


@pytest.mark.parametrize(
    ("path", "body", "sentence"),
    [
        ("score", {"prompt": "a", "negative_prompt": f"[a:b:{'9' * 400}]"}, "a number in the prompt is too large"),
        ("calibrate", {"sorce": "recent"}, 'did you mean "source"?'),
    ],
)
def test_prompts_that_the_host_cannot_read(studio: Studio, path: str, body: dict[str, Any], sentence: str) -> None:
    small = {"width": 64, "height": 64, "steps": 4, "sampler_name": "DDIM"} if path == "score" else {}
    answer = studio.host.post(f"/memnoise/v1/{path}", {**body, **small})
    assert answer.status_code == 422 and sentence in answer.text.replace("\\", "")


def test_a_score_that_is_no_number_has_no_verdict(running: Any) -> None:
    if running.is_real:
        pytest.skip("the module is looked at from within")
    from lib_memnoise.webui.services import scoring

    assert scoring.verdict(float("nan"), 0.01, None) == scoring.NOT_A_NUMBER
    assert scoring.verdict(float("inf"), 0.01, None) == scoring.NOT_A_NUMBER
