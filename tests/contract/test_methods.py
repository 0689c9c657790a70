"""The methods that change what the network hears, and those that draw from the image's seed."""

from __future__ import annotations

from typing import Any

import pytest

from lib_memnoise.registry import METHODS
from tests.contract.conftest import ROUNDING, Studio, close
from tests.contract.test_generation import SAMPLERS, same

PROMPT_METHODS = ["random_tokens", "prompt_embedding", "cross_attention", "padding_fix"]
QUICK: dict[str, dict[str, Any]] = {
    "per_sample": {"max_steps": 2, "target": 0},
    "prompt_embedding": {"max_steps": 3, "target": 0, "lr": 0.01},
    "sail": {"max_steps": 1, "redraws": 0, "target": 0},
    "divin": {"temperature": 0.1},
    "dynamic": {"latest": 500},
    "opposite_guidance": {"latest": 500},
    "cross_attention": {"bos_scale": 3},
}


def settings_of(method: str) -> dict[str, Any]:
    return {"method": method, **QUICK.get(method, {})}


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("none", "noise_selection")])
def test_every_method_changes_the_picture_and_nothing_after_it(studio: Studio, method: str) -> None:
    payload: dict[str, Any] = {"steps": 6, "batch_size": 2}
    before = studio.run(**payload)
    run = studio.run(settings_of(method), **payload)
    again = studio.run(settings_of(method), **payload)
    after = studio.run(**payload)
    assert same(before, after) and same(run, again)
    for image in range(2):
        assert run.read("Memnoise", image) == method and run.read("Memnoise failed", image) is None
        assert close(run.pictures[image], before.pictures[image]) > 0.1, image


@pytest.mark.parametrize("sampler", ["DDIM", "Euler a", "DPM++ 2M", "UniPC", "PLMS"])
@pytest.mark.parametrize("method", PROMPT_METHODS)
def test_prompt_methods_work_in_every_sampler_beside_and_beyond_others(
    studio: Studio, method: str, sampler: str
) -> None:
    payload: dict[str, Any] = {
        "sampler_name": sampler,
        "steps": 5,
        "prompt": "a fox AND snow :0.5, in [winter:summer:3]",
    }
    settings = settings_of(method)
    together = studio.run(settings, **payload, batch_size=2)
    alone = studio.run(settings, **{**payload, "seed": 8})
    assert together.read("Memnoise failed") is None
    assert close(together.pictures[1], alone.pictures[0]) <= ROUNDING
    assert close(alone.pictures[0], studio.run(**{**payload, "seed": 8}).pictures[0]) > 0.1


def test_random_tokens_are_in_the_metadata_and_make_the_image_again(studio: Studio) -> None:
    run = studio.run({"method": "random_tokens", "tokens": 3}, batch_size=2)
    texts = [run.read("Memnoise prompt", image) or "" for image in range(2)]
    assert texts[0] != texts[1]
    for image, text in enumerate(texts):
        words = ["a", "red", "fox", "in", "the", "snow"]
        assert len(text.split(" ")) >= len(words) + 3 and set(words) <= set(text.split(" "))
        assert run.infotexts[image + len(run.infotexts) - 2].split("\n")[0] == "a red fox in the snow"
        # the text alone, as a prompt of its own, is the same picture
        plain = studio.run(prompt=text, seed=7 + image)
        assert close(plain.pictures[0], run.pictures[image]) <= ROUNDING
    assert run.number("rows") == studio.run({"method": "none", "reference": "negative"}).number("rows")


@pytest.mark.parametrize("model", ["sd1", "sd2-v", "sdxl"])
@pytest.mark.parametrize("count", [1, 8])
def test_exactly_so_many_tokens_more(studio: Studio, model: str, count: int) -> None:
    if studio.is_real:
        pytest.skip("its tokenizer cannot be asked from here")
    studio.host.load(model)
    from lib_memnoise.webui import tokens

    for prompt in ("a red fox, in the snow.", "(a fox : 1.2) AND [a : b : 3] snow : 0.5", "a, " * 40):
        settings = {"method": "random_tokens", "tokens": count}
        run = studio.run(settings, prompt=prompt, batch_size=20, steps=2)
        before = tokens.token_count(prompt, 8)
        for image in range(20):
            text = run.read("Memnoise prompt", image) or ""
            assert tokens.token_count(text, 2) == before + count, text
            weights, edited = ("1.2)", "0.5") if "AND" in prompt else (), "[a : b : 3]" in prompt
            assert all(f": {weight}" in text for weight in weights) and ("[a : b : 3]" in text) == edited
    studio.host.load("sd1")


def test_what_cannot_have_so_many_more_is_said(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    if studio.is_real:
        pytest.skip("its tokenizer cannot be changed from here")
    plain = studio.run()
    from lib_memnoise.webui import tokens

    monkeypatch.setattr(tokens, "token_count", lambda text, steps: 2 * len(text))
    run = studio.run({"method": "random_tokens"})
    assert "the prompt has exactly 4 more" in (run.read("Memnoise failed") or "") and same(run, plain)


@pytest.mark.parametrize("padding", ["pad", "end", "both"])
def test_the_padding_fix_leaves_the_host_s_conditions_alone(studio: Studio, padding: str) -> None:
    before = studio.run()
    run = studio.run({"method": "padding_fix", "padding": padding})
    assert run.read("Memnoise failed") is None
    assert close(run.pictures[0], before.pictures[0]) > 0.1
    assert same(studio.run(), before)


def test_cross_attention_of_one_is_no_change_to_the_bit(studio: Studio) -> None:
    settings = {"method": "cross_attention", "bos_scale": 1, "mask_padding": False}
    assert same(studio.run(settings, batch_size=2), studio.run(batch_size=2))


def test_the_prompt_s_vectors_cost_one_unconditional_row(studio: Studio) -> None:
    run = studio.run({"method": "prompt_embedding", "max_steps": 3, "target": 0, "lr": 0.01}, steps=6)
    plain = studio.run({"method": "none"}, steps=6)
    assert run.number("magnitude after") < run.number("magnitude")
    # 1 unconditional and 4 of the prompt; the first step asks for the unconditional one and, perhaps, the last again
    more = run.number("rows") - plain.number("rows")
    assert 3 <= more <= 4 and run.number("backward rows") == 3


def test_noise_selection_hands_the_chosen_noise_on(studio: Studio) -> None:
    plain = studio.run({"method": "none"}, batch_size=2)
    run = studio.run({"method": "noise_selection", "candidates": 5}, batch_size=2)
    notes = [run.read("Memnoise note", image) or "" for image in range(2)]
    # Where both images keep their noise the pictures are those without, to the bit, and nothing is handed on.
    others = 8 if any("was chosen" in note for note in notes) else 10
    for image in range(2):
        assert run.number("magnitude", image) == plain.number("magnitude", image)
        assert run.number("magnitude after", image) <= run.number("magnitude", image)
        assert run.number("rows", image) == plain.number("rows", image) + others
        chosen = "was chosen" in notes[image]
        assert chosen == (run.number("magnitude after", image) < run.number("magnitude", image))
    assert same(studio.run({"method": "noise_selection", "candidates": 1}, batch_size=2), studio.run(batch_size=2))


@pytest.mark.parametrize("method", PROMPT_METHODS)
def test_images_that_are_left_alone_are_heard_as_they_are(studio: Studio, method: str) -> None:
    scores = studio.run({"method": "none"}, batch_size=3)
    sizes = sorted(scores.number("magnitude", image) for image in range(3))
    settings = {**settings_of(method), "when": "flagged", "threshold": (sizes[0] + sizes[1]) / 2 * 8}
    run, plain = studio.run(settings, batch_size=3), studio.run(batch_size=3)
    left = [image for image in range(3) if run.read("Memnoise mitigated", image) == "False"]
    assert len(left) == 1
    for image in range(3):
        difference = close(run.pictures[image], plain.pictures[image])
        assert difference <= ROUNDING if image in left else difference > 0.1


@pytest.mark.parametrize("method", ["random_tokens", "padding_fix", "cross_attention"])
def test_guidance_may_start_later_as_well(studio: Studio, method: str) -> None:
    now, later = (studio.run({**settings_of(method), "guidance": "tau", "tau": tau}) for tau in (999, 500))
    assert later.read("Memnoise failed") is None and later.number("rows") < 16
    assert close(now.pictures[0], later.pictures[0]) > ROUNDING


@pytest.mark.parametrize("method", PROMPT_METHODS)
def test_long_prompts_and_negative_prompts(studio: Studio, method: str) -> None:
    run = studio.run(settings_of(method), prompt="a fox, " * 60, negative_prompt="blurry", steps=5)
    assert run.read("Memnoise failed") is None
    assert (
        close(run.pictures[0], studio.run(prompt="a fox, " * 60, negative_prompt="blurry", steps=5).pictures[0]) > 0.1
    )


@pytest.mark.parametrize("method", ["random_tokens", "padding_fix", "cross_attention", "noise_selection"])
def test_the_hires_pass_only_if_asked(studio: Studio, method: str) -> None:
    payload: dict[str, Any] = {"enable_hr": True, "hr_scale": 2, "denoising_strength": 0.7, "steps": 4}
    first = studio.run(settings_of(method), **payload)
    both = studio.run({**settings_of(method), "hires": True}, **payload)
    assert both.read("Memnoise failed") is None
    assert both.number("rows") > first.number("rows")
    assert close(first.pictures[0], both.pictures[0]) > 0.1


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_method_in_every_sampler(studio: Studio, sampler: str) -> None:
    payload: dict[str, Any] = {"sampler_name": sampler, "steps": 4, "batch_size": 2}
    plain = studio.run(**payload)
    for method in METHODS:
        run = studio.run(settings_of(method), **payload)
        for image in range(2):
            assert run.read("Memnoise", image) == method and run.read("Memnoise failed", image) is None, method
        changed = any(close(a, b) > 0.1 for a, b in zip(run.pictures, plain.pictures))
        assert changed or method in ("none", "noise_selection"), method
    assert same(studio.run(**payload), plain)


@pytest.mark.parametrize("method", PROMPT_METHODS)
def test_a_refiner_takes_over(studio: Studio, method: str) -> None:
    payload: dict[str, Any] = {
        "refiner_checkpoint": "sd1-b.safetensors", "refiner_switch_at": 0.5, "steps": 6, "sampler_name": "Euler"
    }  # fmt: skip
    run, plain = studio.run(settings_of(method), **payload), studio.run(**payload)
    assert run.read("Memnoise failed") is None
    assert close(run.pictures[0], plain.pictures[0]) > 0.1
    told = "refiner took over" in (run.read("Memnoise note") or "")
    assert told == (method == "prompt_embedding")


def test_other_checkpoints(studio: Studio) -> None:
    for checkpoint in ("sd2-v", "sdxl", "sd1-inpainting"):
        studio.host.load(checkpoint)
        for method in METHODS:
            run = studio.run(settings_of(method), steps=4)
            failed = run.read("Memnoise failed")
            pads_with_zero = method == "padding_fix" and "pads with token 0 already" in (failed or "")
            assert failed is None or pads_with_zero, (checkpoint, method)


OPTIMISATIONS = ["sdp-no-mem", "sdp", "sub-quadratic", "V1", "InvokeAI", "Doggettx", "None"]


@pytest.mark.parametrize("masked", [True, False])
def test_attention_is_the_same_under_every_optimisation(studio: Studio, masked: bool) -> None:
    if not studio.is_real:
        pytest.skip("the double has one attention")
    settings = {"method": "cross_attention", "bos_scale": 3, "mask_padding": masked}
    pictures = []
    has_choice = "cross_attention_optimization" in studio.host.get("/sdapi/v1/options").json()
    for options in [{"cross_attention_optimization": name} for name in OPTIMISATIONS] if has_choice else [{}]:
        with studio.options(options):
            run = studio.run(settings, steps=5, batch_size=2)
            assert run.read("Memnoise failed") is None, options
            assert close(run.pictures[0], studio.run(steps=5, batch_size=2).pictures[0]) > 0.1, options
            pictures.append(run.pictures)
    assert all(close(a, b) <= ROUNDING for other in pictures for a, b in zip(pictures[0], other))


@pytest.mark.parametrize("fails", [False, True])
def test_what_a_method_needs_and_is_not_there(studio: Studio, monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    if studio.is_real:
        pytest.skip("its parts cannot be taken away from here")
    plain = studio.run()
    from lib_memnoise.webui import conditioning, tokens

    monkeypatch.setattr(conditioning, "cross_attentions", lambda unet: [])
    monkeypatch.setattr(tokens, "text_encoders", lambda: [])
    for method, reason in (
        ("cross_attention", "no cross-attention was found in the network"),
        ("padding_fix", "the text encoder pads with token 0 already"),
        ("random_tokens", "the text encoder cannot be reached"),
    ):
        settings = {"method": method, "fail_instead": fails}
        if fails:
            answer = studio.answer([True, settings])
            assert answer.status == 500 and reason in answer.detail
        else:
            run = studio.run(settings)
            assert reason in (run.read("Memnoise failed") or "") and same(run, plain)
