"""Calibrations: made before a generation that needs one, serving at other timesteps, with prompts of one's own."""

from __future__ import annotations

import functools
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lib_memnoise.core.calibration import ORDINARY, ordinary_prompts, unit
from lib_memnoise.core.schedule import alpha_bar
from tests.contract.conftest import ROUNDING, Studio, close
from tests.contract.test_generation import same
from tests.contract.test_img2img import payload as img2img
from tests.contract.test_requests import plot
from tests.contract.test_scores import SMALL, forget, kept_in, listed, post, score

FLAGGED = {"when": "flagged"}
CALIBRATED = {"preset": "calibrated"}


@pytest.fixture(autouse=True)
def uncalibrated(studio: Studio) -> Iterator[None]:
    forget(studio)
    yield
    forget(studio)


def calibrate(studio: Studio, **body: Any) -> dict[str, Any]:
    status, made = post(studio, "calibrate", {**SMALL, **body})
    assert status == 200, made
    return dict(made)


# Before a generation


@pytest.mark.parametrize(
    ("payload", "options"),
    [
        ({"batch_size": 2, "n_iter": 2}, {}),
        ({"sampler_name": "Euler a", "negative_prompt": "blurry"}, {"randn_source": "CPU"}),
        ({"tiling": True, "subseed": 3, "subseed_strength": 0.3}, {"persistent_cond_cache": False}),
        ({"prompt": "a fox, " * 40, "override_settings": {"token_merging_ratio": 0.5}}, {}),
    ],
    ids=["batches", "ancestral", "tiling", "token merging"],
)
@pytest.mark.parametrize("settings", [FLAGGED, CALIBRATED], ids=["flagged", "preset"])
def test_a_generation_calibrates_first_and_is_the_same(
    studio: Studio, settings: dict[str, Any], payload: dict[str, Any], options: dict[str, Any]
) -> None:
    with studio.options(options):
        first = studio.run(settings, **payload)
        (made,) = listed(studio)
        assert (made["count"], made["source"], made["width"]) == (ORDINARY, "built-in", 64)
        second = studio.run(settings, **payload)
        assert same(first, second) and first.infotexts == second.infotexts
        assert (
            first.read("Memnoise calibration") == made["text"] == f"120 built-in prompts at timestep {made['timestep']}"
        )
        assert listed(studio) == [made]
        plain = studio.run(**payload)
        for image in range(first.count):
            assert first.read("Memnoise failed", image) is None
            if first.read("Memnoise mitigated", image) == "False":
                assert close(first.pictures[image], plain.pictures[image]) <= ROUNDING


def test_calibrating_costs_its_rows_once(studio: Studio) -> None:
    if studio.is_real:
        pytest.skip("rows are counted in the double")
    rows = []
    for _ in range(2):
        studio.run(FLAGGED)
        rows.append(studio.host.rows)
    assert rows[0] == rows[1] + 2 * ORDINARY


def test_a_plot_calibrates_once(studio: Studio) -> None:
    answer = plot(studio, ("Seed", "1,2,3"), args=[True, FLAGGED])
    assert answer.status == 200 and len(listed(studio)) == 1
    if not studio.is_real:
        assert sum(call.rows for call in studio.host.calls) < 2 * ORDINARY + 3 * 2 * 10


def test_a_threshold_of_the_users_needs_none(studio: Studio) -> None:
    run = studio.run({**FLAGGED, "threshold": 1000})
    assert run.read("Memnoise mitigated") == "False" and listed(studio) == []
    assert run.read("Memnoise calibration") is None


def test_what_the_host_was_doing_goes_on(studio: Studio) -> None:
    if studio.is_real:
        pytest.skip("the host's state is seen in the double")
    from modules import processing, shared
    from modules.sd_hijack import model_hijack

    from lib_memnoise.webui.nested import STATE, host_set_aside

    p = processing.StableDiffusionProcessingTxt2Img(tiling=True)
    encoder: Any = model_hijack
    tile = model_hijack.apply_circular
    if studio.is_fork:
        studio.run()  # loads the checkpoint
        encoder = shared.sd_model
        tile = functools.partial(processing.apply_circular_forge, encoder)
    tile(True)
    encoder.comments, encoder.extra_generation_params = ["said"], {"Emphasis": "None"}
    shared.state.begin(job="outer")
    shared.state.job_count, shared.state.textinfo = 3, "drawing"
    before = {name: getattr(shared.state, name) for name in STATE}

    def drawn() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(1))

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = drawn()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    with host_set_aside(p):
        assert shared.state.job_no == 0 and shared.state.current_latent is None
        drawn()
        shared.state.nextjob()
        shared.state.job, shared.state.job_count, shared.state.skipped = "inner", 60, True
        tile(False)
        encoder.comments, encoder.extra_generation_params = [], {}
    assert drawn() == expected
    assert {name: getattr(shared.state, name) for name in STATE} == before and not shared.state.skipped
    assert encoder.tiling_enabled if studio.is_fork else encoder.circular_enabled
    assert encoder.comments == ["said"] and encoder.extra_generation_params == {"Emphasis": "None"}
    tile(False)
    encoder.comments, encoder.extra_generation_params = [], {}
    shared.state.end()


@pytest.mark.parametrize("settings", [FLAGGED, CALIBRATED], ids=["flagged", "preset"])
def test_an_interrupt_while_calibrating_ends_the_request(studio: Studio, settings: dict[str, Any]) -> None:
    answered = threading.Event()

    def interrupt() -> None:
        while not answered.wait(0.05):
            studio.host.post("/sdapi/v1/interrupt")

    stop = threading.Thread(target=interrupt)
    stop.start()
    try:
        answer = studio.answer([True, settings])
    finally:
        answered.set()
        stop.join()
    assert answer.status == 200 and answer.images == [] and listed(studio) == []
    assert studio.run(settings).read("Memnoise calibration") is not None


class Trouble:
    """The double's probes fail in a way of one's choice."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch

    def __call__(self, error: Exception, **state: Any) -> None:
        from modules import shared

        from lib_memnoise.webui.services import scoring

        def run_probe(*args: Any) -> Any:
            for name, value in state.items():
                setattr(shared.state, name, value)
            raise error

        self.monkeypatch.setattr(scoring, "run_probe", run_probe)


@pytest.fixture
def trouble(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> Trouble:
    if studio.is_real:
        pytest.skip("probes are made to fail in the double")
    return Trouble(monkeypatch)


@pytest.mark.parametrize("settings", [FLAGGED, CALIBRATED], ids=["flagged", "preset"])
@pytest.mark.parametrize(
    ("error", "words"),
    [(RuntimeError("boom\nmore"), "could not be calibrated: boom."), (torch.OutOfMemoryError("x"), "out of memory.")],
)
def test_a_failure_while_calibrating_fails_the_request(
    studio: Studio, trouble: Trouble, error: Exception, words: str, settings: dict[str, Any]
) -> None:
    trouble(error)
    answer = studio.answer([True, settings])
    assert answer.status == 500 and words in answer.detail and answer.images == []
    assert listed(studio) == [] and studio.run().images


def test_a_skip_while_calibrating_skips_that_alone(studio: Studio, trouble: Trouble) -> None:
    from lib_memnoise.webui.services.scoring import Stopped

    trouble(Stopped("memnoise: interrupted."), skipped=True)
    run = studio.run(FLAGGED)
    assert same(run, studio.run({}))
    note = run.read("Memnoise note") or ""
    assert "calibration of the checkpoint was skipped" in note and "every image counts as memorised" in note
    answer = studio.answer([True, CALIBRATED])
    assert answer.status == 422 and "was skipped" in answer.detail


# Where there can be none


def test_img2img_goes_by_a_calibration_or_mitigates(studio: Studio) -> None:
    """T of a picture that is sampled on is far from where noise alone begins; with a strength near 1 it is not."""
    far, near = img2img(denoising_strength=0.5), img2img(denoising_strength=1.0, steps=40)
    run, always = studio.run(FLAGGED, **far), studio.run({}, **far)
    assert close(run.pictures[0], always.pictures[0]) <= ROUNDING and run.read("Memnoise used") is not None
    assert run.read("Memnoise magnitude") is not None and run.read("Memnoise mitigated") is None
    assert "every image counts as memorised" in (run.read("Memnoise note") or "") and listed(studio) == []
    answer = studio.answer([True, CALIBRATED], **far)
    assert answer.status == 422 and "preset calibrated cannot be used here: the checkpoint is not" in answer.detail
    assert studio.run(FLAGGED, **near).read("Memnoise mitigated") in ("True", "False")
    assert len(listed(studio)) == 1
    assert studio.run(CALIBRATED, **near).read("Memnoise failed") is None


HIRES = {"enable_hr": True, "hr_scale": 2, "hr_upscaler": "Latent", "denoising_strength": 0.7}


def test_a_hires_pass_follows_the_first_ones_decision(studio: Studio) -> None:
    """One calibration, for the first pass, is all that it takes."""
    run, always = studio.run({**FLAGGED, "hires": True}, **HIRES), studio.run({"hires": True}, **HIRES)
    assert run.read("Memnoise calibration") is not None and "128x128" not in (run.read("Memnoise note") or "")
    assert run.read("Memnoise mitigated") == str(run.read("Memnoise hires used") is not None)
    assert len(listed(studio)) == 1 and always.images
    answer = studio.answer([True, {**CALIBRATED, "hires": True}], **HIRES)
    assert answer.status == 422 and "hires pass at 128x128" in answer.detail
    assert studio.run(CALIBRATED, **HIRES).read("Memnoise failed") is None


def test_flow_models_are_told_as_before(studio: Studio) -> None:
    if studio.is_real:
        pytest.skip("there is no flow model")
    studio.host.load("sd3")
    assert "flow models" in (studio.run(FLAGGED).read("Memnoise failed") or "")
    answer = studio.answer([True, CALIBRATED])
    assert answer.status == 422 and "flow models" in answer.detail


# At another timestep


def test_a_calibration_serves_at_near_timesteps(studio: Studio) -> None:
    made = calibrate(studio, steps=20)
    assert made["timestep"] == 951
    unit_of = {t: unit("eps", alpha_bar(t)) for t in (901, 951, 981)}
    for steps, t in ((50, 981), (10, 901)):
        run = studio.run(FLAGGED, steps=steps)
        assert run.read("Memnoise calibration") == "120 built-in prompts at timestep 951"
        found = score(studio, prompt="a red fox in the snow", seed=7, steps=steps)
        assert found["timestep"] == t and unit_of[t] != unit_of[951]
        assert found["threshold"] == pytest.approx(made["threshold"] * unit_of[t] / unit_of[951], rel=1e-4)
        assert found["calibration"]["timestep"] == 951
        flagged = found["images"][0]["flagged"]
        assert run.read("Memnoise mitigated") == str(flagged)
    assert len(listed(studio)) == 1
    studio.run(FLAGGED, steps=8)
    assert {made["timestep"] for made in listed(studio)} == {951, 876}
    studio.run(FLAGGED, steps=20, width=128)
    assert len(listed(studio)) == 3


def test_a_damaged_calibration_is_made_again_and_said(studio: Studio) -> None:
    calibrate(studio)
    (path,) = kept_in(studio).glob("*.json")
    path.write_text("{")
    run = studio.run(FLAGGED)
    assert "damaged" in (run.read("Memnoise note") or "") and run.read("Memnoise mitigated") in ("True", "False")
    assert len(listed(studio)) == 1


# Without one


def test_without_a_calibration_there_is_no_verdict(studio: Studio) -> None:
    found = score(studio, prompt="a red fox in the snow", seed=7)
    (image,) = found["images"]
    assert (found["calibrated"], found["threshold"], found["calibration"]) == (False, None, None)
    assert image["score"] > 0 and (image["flagged"], image["percentile"]) == (None, None)
    assert "not calibrated" in image["verdict"] and "memorised" not in image["verdict"]
    assert "/memnoise/v1/calibrate" in found["notes"][0]
    run = studio.run({"method": "none"})
    assert run.read("Memnoise magnitude") is not None and run.read("Memnoise mitigated") is None


def test_a_rate_that_cannot_be_promised_is_said(studio: Studio) -> None:
    calibrate(studio)
    assert studio.run(FLAGGED).read("Memnoise note") is None
    note = studio.run({**FLAGGED, "false_positives": 0.001}).read("Memnoise note") or ""
    assert "cannot promise less than 0.83 %, it takes 999" in note


def test_scores_against_the_negative_prompt_are_others(studio: Studio) -> None:
    for negative, told in (("blurry", True), ("", False)):
        run = studio.run({**FLAGGED, "reference": "negative"}, negative_prompt=negative)
        assert ("scores are against the negative prompt" in (run.read("Memnoise note") or "")) is told


# With other prompts


def test_own_prompts(studio: Studio) -> None:
    prompts = [f"a fox with {k} red balloons" for k in range(25)]
    made = calibrate(studio, prompts=[*prompts, f" {prompts[3]} ", f"<lora:tilt:1>{prompts[4]}"])
    assert (made["source"], made["count"]) == ("own", 25)
    assert made["text"] == "25 prompts of the user's own at timestep 876"
    assert "cannot promise less than 3.8 %" in made["promise"] and made["false_positives_95"][1] > 0.1
    assert "if one of these is memorised" in made["notes"][-1] and "red balloons" in made["notes"][-1]
    assert listed(studio) == [{name: value for name, value in made.items() if name != "notes"}]


def test_prompts_of_several_lengths_score_as_each_alone(studio: Studio) -> None:
    """The host repeats a shorter prompt's last token in a batch with a longer one."""
    prompts = [f"a fox with {k} balloons" + ", in the deep snow" * (30 if k % 3 == 1 else 0) for k in range(20)]
    made = calibrate(studio, prompts=prompts)
    alone = [score(studio, prompt=prompt, seed=k)["images"][0]["score"] for k, prompt in enumerate(prompts)]
    assert made["median"] == pytest.approx(float(np.median(alone)), rel=1e-3)
    assert [made["lowest"], made["highest"]] == pytest.approx([min(alone), max(alone)], rel=1e-3)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"source": "elsewhere"}, 'source = "elsewhere" is not valid; it must be one of built-in, own, recent.'),
        ({"source": ["own"]}, 'source = ["own"] is not valid'),
        ({"source": "own"}, "source = own needs prompts"),
        ({"source": "recent", "prompts": ["a"]}, "source = recent takes no prompts beside its own"),
        ({"prompts": [f"<lora:tilt:{k}>" for k in range(30)]}, "it takes 20 different prompts; these are 0."),
        ({"prompts": []}, "prompts = [] is not valid"),
        ([], "must be a JSON object"),
    ],
    ids=str,
)
def test_bad_sources(studio: Studio, body: Any, words: str) -> None:
    status, answer = post(studio, "calibrate", {**SMALL, **body} if isinstance(body, dict) else body)
    assert status == 422 and words in answer["detail"], answer


def save(folder: Path, prompt: str, more: str = "") -> None:
    """A picture as the host saves it."""
    folder.mkdir(exist_ok=True)
    info = PngInfo()
    text = f"{prompt}\nNegative prompt: blurry\nSteps: 8, Sampler: DDIM, CFG scale: 6, Seed: 7, Size: 64x64{more}"
    info.add_text("parameters", text)
    Image.new("RGB", (8, 8)).save(folder / f"{len(list(folder.iterdir())):05}.png", pnginfo=info)


def test_prompts_of_recent_pictures(studio: Studio, tmp_path: Path) -> None:
    with studio.options({"outdir_txt2img_samples": str(tmp_path)}):
        status, answer = post(studio, "calibrate", {**SMALL, "source": "recent"})
        assert status == 422 and "0 pictures" in answer["detail"], answer
        for k in range(24):
            save(tmp_path / f"{k % 2}", f"a fox, with {k} balloons<lora:tilt:1>")
            save(tmp_path / "again", "a fox, with 3 balloons", ", Memnoise: batch_wise, Memnoise magnitude: 0.1")
        for k in range(4):
            save(tmp_path / "0", f"a memorised fox {k}", ", Memnoise: batch_wise, Memnoise mitigated: True")
        (tmp_path / "broken.png").write_bytes(b"\x89PNG")
        Image.new("RGB", (8, 8)).save(tmp_path / "nothing.png")
        # The double saves none.
        for ending in ("jpg", "webp") if studio.is_real else ():
            with studio.options({"samples_save": True, "samples_format": ending}):
                studio.run(prompt=f"a fox as {ending}", save_images=True)
        made = calibrate(studio, source="recent")
    more = 2 if studio.is_real else 0
    assert (made["source"], made["count"]) == ("recent", 24 + more)
    assert made["notes"][0] == f"{52 + more} pictures of {tmp_path} have {24 + more} different prompts"
    assert made["notes"][1] == "4 pictures are left out that were flagged as memorised"
    assert "balloons" in made["notes"][2] and "lora" not in made["notes"][2]
    assert made["promise"] == listed(studio)[0]["promise"]
    expected = calibrate(studio, prompts=ordinary_prompts(20))
    assert expected["source"] == "own" and len(listed(studio)) == 1
