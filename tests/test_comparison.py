"""What runs without a WebUI: the schedule and samplers, generation on the miniature, the comparison, the claims."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lib_memnoise.core.delta import magnitude
from lib_memnoise.core.guidance import Start
from lib_memnoise.core.schedule import ALPHAS_CUMPROD, TRAINING_STEPS, alpha_bar
from lib_memnoise.lab import claims, comparison, experiment, simulator, stats, text_table
from lib_memnoise.lab.ddim import clean_and_eps, ddim_timesteps
from lib_memnoise.lab.demo_report import page
from lib_memnoise.lab.miniature.model import Miniature, load_miniature
from lib_memnoise.lab.samplers import SAMPLERS
from lib_memnoise.registry import METHODS
from lib_memnoise.settings import Settings, from_mapping, used_settings


@pytest.fixture(scope="module")
def model() -> Miniature:
    return load_miniature()


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Sampling


def test_schedule_is_stable_diffusions() -> None:
    assert ALPHAS_CUMPROD.shape == (1000,)
    assert alpha_bar(999) ** -0.5 == pytest.approx(14.65, abs=0.01)
    assert ((1 - alpha_bar(999)) / alpha_bar(999)) ** 0.5 == pytest.approx(14.6146, abs=1e-4)


@pytest.mark.parametrize(
    "steps, first, calls", [(2, 501, 1), (20, 951, 19), (30, 991, 30), (50, 981, 49), (1000, 999, 999)]
)
def test_timesteps(steps: int, first: int, calls: int) -> None:
    timesteps = ddim_timesteps(steps)
    assert (timesteps[0], timesteps[-1], len(timesteps) - 1) == (first, 1, calls)
    assert timesteps == sorted(timesteps, reverse=True)


@pytest.mark.parametrize("steps", [-1, 0, 1, 1001])
def test_timesteps_out_of_bounds(steps: int) -> None:
    with pytest.raises(ValueError, match="from 2 to 1000"):
        ddim_timesteps(steps)


def one_picture(picture: Tensor, parameterization: str) -> Any:
    """The exact network of a distribution that is a single picture."""

    def predict(x: Tensor, t: float) -> Tensor:
        # Between the trained timesteps, k-diffusion interpolates the logarithm of σ.
        low, high = int(t), min(int(t) + 1, TRAINING_STEPS - 1)
        logs = [float(((1 - ALPHAS_CUMPROD[k]) / ALPHAS_CUMPROD[k]).log()) / 2 for k in (low, high)]
        sigma = np.exp(logs[0] + (t - low) * (logs[1] - logs[0]))
        a = 1 / (1 + sigma**2)
        eps = (x - a**0.5 * picture) / (1 - a) ** 0.5
        return eps if parameterization == "eps" else a**0.5 * eps - (1 - a) ** 0.5 * picture

    return predict


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("parameterization", ["eps", "v"])
def test_samplers_find_the_only_picture(sampler: str, parameterization: str) -> None:
    picture, x = noise(1, 4, 4, 4, seed=1), noise(1, 4, 4, 4)
    result = SAMPLERS[sampler].sample(one_picture(picture, parameterization), x, 50, parameterization)
    # DDIM stops at t = 1, where 3 % of the noise is left.
    torch.testing.assert_close(result, picture, atol=0.15 if sampler == "DDIM" else 1e-3, rtol=0)


def test_ddim_keeps_the_noise_of_a_point() -> None:
    picture, x = noise(1, 4, 4, 4, seed=1), noise(1, 4, 4, 4)
    a, last = alpha_bar(981), alpha_bar(1)
    eps = (x - a**0.5 * picture) / (1 - a) ** 0.5
    result = SAMPLERS["DDIM"].sample(one_picture(picture, "eps"), x, 50, "eps")
    torch.testing.assert_close(result, last**0.5 * picture + (1 - last) ** 0.5 * eps)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_first_input_is_what_the_sampler_asks_first(sampler: str) -> None:
    seen: list[tuple[Tensor, float]] = []

    def predict(x: Tensor, t: float) -> Tensor:
        seen.append((x, t))
        return torch.zeros_like(x)

    x = noise(1, 4, 4, 4).float()
    SAMPLERS[sampler].sample(predict, x, 20, "eps")
    first, t = SAMPLERS[sampler].first(x, 20)
    assert seen[0][1] == t and torch.equal(seen[0][0], first)


def test_clean_and_eps_agree_between_parameterizations() -> None:
    picture, eps = noise(2, 4, 4, 4, seed=1), noise(2, 4, 4, 4)
    a = alpha_bar(500)
    x = a**0.5 * picture + (1 - a) ** 0.5 * eps
    for kind, output in (("eps", eps), ("v", a**0.5 * eps - (1 - a) ** 0.5 * picture)):
        for found, expected in zip(clean_and_eps(x, output, 500, kind), (picture, eps)):
            torch.testing.assert_close(found, expected)


# Generation on the miniature


CAPTIONS = ["a fox", "an owl on a red background"]


def generate(model: Miniature, settings: Settings, **kwargs: Any) -> simulator.Generated:
    return simulator.generate(model, CAPTIONS, simulator.noises([1, 2]), settings, **kwargs)


@pytest.mark.parametrize(
    "settings, sampler, rows",
    [
        (comparison.COMPARED["none"], "DDIM", 98),
        (comparison.COMPARED["static tau"], "DDIM", 93),
        (comparison.COMPARED["batch-wise"], "DDIM", 98 + 4 * 2 - 5),
        (Settings(enabled=True, preset="sd2_v"), "Euler", 100 + 4 * 4 - 4),
    ],
)
def test_rows(model: Miniature, settings: Settings, sampler: str, rows: int) -> None:
    """Those of the benchmarks' table; looking costs nothing that is counted."""
    for looking in (False, True):
        found = generate(model, settings, sampler=sampler, looking=looking)
        assert found.forward.tolist() == [rows, rows] and found.backward.tolist() == [0, 0]
    assert len(found.trace) == (49 if sampler == "DDIM" else 50)


@pytest.mark.parametrize("sampler, calls", [("DDIM", 9), ("Euler", 10)])
def test_rows_per_sample(model: Miniature, sampler: str, calls: int) -> None:
    """steps + 1 evaluations, the last of which is the sampler's first."""
    found = generate(model, comparison.COMPARED["per-sample"], steps=10, sampler=sampler)
    assert found.outcome is not None and found.outcome.steps is not None
    steps = found.outcome.steps
    assert torch.equal(found.forward, 2 * calls + 2 * steps)
    assert torch.equal(found.backward, 2 * steps)
    assert (found.after < 0.5 * found.before).all()


def test_opposite_guidance_goes_away_from_the_prompt(model: Miniature) -> None:
    x, t = simulator.noises([1, 2]), 981.0
    network = simulator.make_network(model, CAPTIONS)
    starts = [Start(900.0, opposite=3.0), Start(900.0)]
    with torch.no_grad():
        found = simulator.Guided(network, starts)(x, t)
        assert network.forward.tolist() == [2, 1]
        delta, unconditional = network.delta(x, t)
    torch.testing.assert_close(found, unconditional - torch.tensor([3.0, 0.0])[:, None, None, None] * delta)
    with torch.no_grad():
        guided = simulator.Guided(network, starts)(x, 881.0)
    torch.testing.assert_close(guided, simulator.Guided(network, [Start(), Start()])(x, 881.0))


def test_guidance_starts_at_each_images_own_transition_point(model: Miniature) -> None:
    """Where that is follows from the curve that the same image has with guidance off all the way."""
    waiting = Settings(enabled=True, preset="sd1", method="none", guidance="transition", latest=400)
    free = generate(model, Settings(enabled=True, preset="sd1", method="none", guidance="tau", tau=0), looking=True)
    found = generate(model, waiting, looking=True)
    for image in range(2):
        curve = [(t, float(size[image])) for t, size in free.trace]
        falls = [a > b < c for (_, a), (_, b), (_, c) in zip(curve, curve[1:], curve[2:])]
        minimum = falls.index(True) + 2 if True in falls else len(curve)  # the step that shows it
        first_on = min(minimum, next(k for k, (t, _) in enumerate(curve) if t <= 400))
        torch.testing.assert_close(
            torch.stack([size[image] for _, size in found.trace[: first_on + 1]]),
            torch.stack([size[image] for _, size in free.trace[: first_on + 1]]),
            rtol=1e-3,
            atol=1e-3,
        )
        after = first_on + 1
        assert not torch.isclose(found.trace[after][1][image], free.trace[after][1][image], rtol=1e-3)
        assert found.forward[image] == 2 * len(curve)  # hearing the prompt costs the row that guidance off saves


def test_few_steps_begin_below_tau_and_wait_for_its_share(model: Miniature) -> None:
    found = generate(model, Settings(enabled=True, method="static"), steps=4)  # 751, 501, 251
    assert found.forward.tolist() == [5, 5] and found.outcome is not None
    assert found.outcome.used["tau"] == 740  # 751 is above it
    found = generate(model, Settings(enabled=True), steps=4)
    assert found.outcome is not None and found.outcome.used["tau"] == pytest.approx(900 / 981 * 751)
    assert found.forward.tolist() == [8 + 5, 8 + 5]
    asked = generate(model, Settings(enabled=True, tau=900), steps=4)
    assert asked.forward.tolist() == [8 + 6, 8 + 6]


def test_an_empty_caption_is_left_alone(model: Miniature) -> None:
    noise = simulator.noises([1, 2])
    plain = simulator.generate(model, ["", CAPTIONS[1]], noise, Settings(), steps=10)
    for settings in (Settings(enabled=True), Settings(enabled=True, when="flagged", threshold=0.0)):
        found = simulator.generate(model, ["", CAPTIONS[1]], noise, settings, steps=10)
        assert torch.equal(found.noise[0], noise[0]) and not torch.equal(found.noise[1], noise[1])
        torch.testing.assert_close(found.latents[0], plain.latents[0], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(found.latents[1], plain.latents[1], atol=0.01)


def test_looking_changes_nothing(model: Miniature) -> None:
    plain, looked = (generate(model, comparison.COMPARED["batch-wise"], steps=10, looking=k) for k in (False, True))
    torch.testing.assert_close(plain.latents, looked.latents)
    torch.testing.assert_close(looked.trace[0][1], looked.after, rtol=1e-4, atol=1e-4)


def test_images_do_not_depend_on_their_batch(model: Miniature) -> None:
    together = generate(model, comparison.COMPARED["batch-wise"], steps=10)
    alone = simulator.generate(model, CAPTIONS[1:], simulator.noises([2]), comparison.COMPARED["batch-wise"], steps=10)
    torch.testing.assert_close(together.latents[1:], alone.latents, rtol=1e-2, atol=1e-2)


def test_static_tau_leaves_the_noise_alone(model: Miniature) -> None:
    assert torch.equal(generate(model, comparison.COMPARED["static tau"], steps=10).noise, simulator.noises([1, 2]))


def test_noises_are_the_seeds() -> None:
    assert torch.equal(simulator.noises([3, 4])[1], simulator.noises([4])[0])
    first = [experiment.seed_of(s, i, 0) for s in range(20) for i in range(1000)]
    assert len(set(first)) == len(first)


# The comparison


def test_memorised_prompts_are_copied_and_the_methods_help(model: Miniature) -> None:
    chosen = experiment.subjects(memorised=True, held_out=True)[:4]
    found = comparison.compare(model, chosen, images=2)
    none, static, batch_wise, per_sample = found.records
    assert none["copied"] >= 0.75  # of eight
    assert batch_wise["similarity"] < static["similarity"] < none["similarity"]
    assert per_sample["similarity"] < none["similarity"] - 0.1
    for record in (batch_wise, per_sample):
        assert record["magnitude_after"] < record["magnitude_before"]


def test_a_copy_of_another_memorised_picture_is_a_copy() -> None:
    pictures = experiment.to_pictures(experiment.references()[[4, 5, 4, 5]])
    chosen = [*experiment.subjects(memorised=True, held_out=True), *experiment.subjects(memorised=True, held_out=False)]
    own = next(subject for subject in chosen if subject.memorised == 4)
    array = np.zeros(4, np.float32)
    part = experiment.Part(
        pictures.numpy(), np.ones((4, 4, 16, 16), np.float32), experiment.likeness(pictures).numpy(),
        *[array] * 5, np.empty((0, 4), np.float32), [],
    )  # fmt: skip
    found = experiment.collected([own, experiment.Subject("a fox", ("fox",), None)], 2, [part])
    assert found.copied.tolist() == [[True, True], [True, True]]
    assert found.copied_own.tolist() == [[True, False], [False, False]]
    record = experiment.record("none", Settings(), "eps", found)
    assert (record["copied"], record["copied_own"]) == (1.0, 0.5)  # of two images with a picture of their own
    assert record["similarity"] == pytest.approx(1) and record["similarity_own"] < 0.9
    assert np.isnan(found.similarity_own[1]).all() and (found.similarity_own[0] <= found.similarity[0]).all()


def test_what_was_seen_of_another_prompts_pictures(model: Miniature) -> None:
    """Of these eight images batch-wise leaves copies of more pictures than the prompt's own."""
    caption = "a fish and a strawberry on a red background, limited"
    (subject,) = comparison.own_subjects([caption])
    assert subject.memorised is not None
    # its first seed is 1000
    found = experiment.study(model, [subject], Settings(enabled=True, preset="sd1"), images=8, seed=1000)
    assert (found.similarity_own <= found.similarity).all()
    assert found.copied.sum() >= found.copied_own.sum() + 3
    assert found.copied_own.sum() <= 3


def test_page_has_everything_in_it(model: Miniature) -> None:
    chosen = comparison.own_subjects(["a fox", experiment.subjects(memorised=True, held_out=True)[0].caption])
    assert [subject.memorised is None for subject in chosen] == [True, False]
    found = comparison.compare(model, chosen, images=1, steps=3, looking=True)
    text = page(found)
    assert not re.search(r'(?:src|href)="(?!data:)|url\(|@import|<script', text)
    # Four methods' image of each prompt, one memorised picture, two plots.
    assert text.count("<img") == 4 * 2 + 1 + 2
    for record in found.records:
        assert f"<td>{record['method']}</td>" in text
        assert record["similarity_own"] is not None and record["similarity_own"] <= 1


def test_records_of_prompts_without_a_picture(model: Miniature) -> None:
    methods = {"none": Settings()}
    subjects = comparison.own_subjects(["a fox"])
    found = comparison.compare(model, subjects, methods=methods, images=1, steps=3, looking=True)
    assert all(record["copied_own"] is None and record["similarity_own"] is None for record in found.records)
    assert all(-1 <= record["similarity"] <= 1 for record in found.records)
    assert "–" in comparison.table(found.records) and "to its own picture" not in page(found)


def test_markdown() -> None:
    record = {
        "method": "none", "copied": 0.5, "copied_own": None, "similarity": -0.051, "similarity_own": -0.2,
        "alignment": 1, "rows": 98.4, "backward_rows": 0, "magnitude_before": 7.0, "magnitude_after": 7.81,
    }  # fmt: skip
    assert text_table.markdown([record]) == [
        "| | copied any | copied own | similarity any | similarity own | alignment | rows | backward | ‖Δ‖ after |",
        "|---|---|---|---|---|---|---|---|---|",
        "| none | 50 % | – | −0.05 | −0.20 | 1.00 | 98 | 0 | 7.81 |",
    ]


# The claims


def test_bootstrap_interval_of_a_mean() -> None:
    values = np.random.default_rng(0).normal(3.0, 1.0, 400)
    low, high = stats.interval(400, statistic=lambda drawn: float(values[drawn].mean()))
    assert low < 3.0 < high and high - low == pytest.approx(2 * 1.96 / 20, rel=0.15)


def images(similarity: float, alignment: float, captions: int = 4, fall: float = 0.6) -> experiment.Images:
    rng = np.random.default_rng(int(1000 * similarity + alignment))
    like = similarity + 0.01 * rng.standard_normal((captions, 3))
    one = np.ones((captions, 3))
    empty = torch.empty(0)
    timesteps = [980.0 - 20 * k for k in range(49)]
    trace = np.where(np.arange(49) < 10, 1.0, 1 - fall)[:, None, None] * one
    return experiment.Images(
        empty, empty, like, like - 0.05, alignment * one, 5 * one, one, one, one, one, trace, timesteps
    )


def measured(**changed: Any) -> claims.Measured:
    curve = {900.0: images(0.6, 0.9), 800.0: images(0.4, 0.7), 980.0: images(0.95, 0.95)}
    kept = {
        "none": images(0.95, 0.95),
        "unguided": images(0.1, 0.1),
        "curve": curve,
        "batch_wise": images(0.3, 0.9),
        "per_sample": images(0.5, 0.94),
        "half": images(0.6, 0.94),
        "displaced": curve[900.0],
        "controls": images(0.2, 0.9),
        "ordinary": images(0.2, 0.9),
        "control_scores": np.full((4, 3), 2.0),
        "points": [],
    }
    return claims.Measured(**{**kept, **changed})


def test_claims_hold_where_they_should() -> None:
    judged = claims.judge(measured())
    assert all(claim.holds for claim in judged)
    ratio = next(claim for claim in judged if "ratio" in claim.claim)
    assert ratio.value == pytest.approx(0.3 / 0.6, abs=0.02) and ratio.low <= ratio.value <= ratio.high
    assert ratio.own is not None and ratio.own[0] == pytest.approx(0.25 / 0.55, abs=0.02)
    assert [claim.own is None for claim in judged if "alignment" in claim.claim and "same" not in claim.claim] == [
        True
    ] * 4


def test_copies_of_another_picture_decide_the_claims() -> None:
    """Per-sample's images that are others' pictures are no success."""
    others = dataclasses.replace(images(0.9, 0.94), similarity_own=images(0.5, 0.94).similarity)
    judged = claims.judge(measured(per_sample=others), resamples=200)
    claim = next(claim for claim in judged if "a quarter of the first magnitude" in claim.claim)
    assert not claim.holds and claim.value < 0.1 and claim.own is not None and claim.own[0] > 0.3


@pytest.mark.parametrize(
    "changed, claim",
    [
        ({"none": images(0.7, 0.95)}, "copied without mitigation"),
        ({"controls": images(0.9, 0.9)}, "controls are not"),
        ({"controls": images(0.2, 0.5)}, "controls are recognisable"),
        ({"ordinary": images(0.2, 0.5)}, "ordinary prompts are recognisable"),
        ({"batch_wise": images(0.5, 0.9)}, "at the same alignment"),
        ({"batch_wise": images(0.3, 0.6)}, "at the same alignment"),
        ({"per_sample": images(0.9, 0.94)}, "to a quarter of the first magnitude, is less similar"),
        ({"per_sample": images(0.5, 0.8)}, "to a quarter, keeps the alignment"),
        ({"half": images(0.9, 0.94)}, "to half of the first magnitude, is less similar"),
        ({"half": images(0.5, 0.8)}, "to half, keeps the alignment"),
        ({"displaced": images(0.3, 0.9)}, "random displacement"),
        ({"control_scores": np.full((4, 3), 9.0)}, "AUC"),
        ({"unguided": images(0.1, 0.1, fall=0.3)}, "sharp drop"),
    ],
)
def test_claims_fail_where_they_should(changed: dict[str, Any], claim: str) -> None:
    failed = [judged.claim for judged in claims.judge(measured(**changed), resamples=200) if not judged.holds]
    assert any(claim in text for text in failed)


def test_random_displacement_is_as_long(model: Miniature) -> None:
    chosen = experiment.subjects(memorised=True, held_out=True)[:2]
    x = simulator.noises([experiment.seed_of(s, i, 1) for s in range(2) for i in range(2)])
    moved = x + torch.arange(1, 5.0)[:, None, None, None] * torch.ones_like(x)
    other = claims.displaced(chosen, 2, 1, moved)
    torch.testing.assert_close(magnitude(other - x), magnitude(moved - x))
    assert (torch.cosine_similarity((other - x).flatten(1), (moved - x).flatten(1)).abs() < 0.2).all()


def test_auc() -> None:
    assert stats.auc(np.array([3.0, 4.0]), np.array([1.0, 2.0])) == 1
    assert stats.auc(np.array([1.0, 4.0]), np.array([2.0, 3.0])) == 0.5


# Every method


def test_every_method_is_compared_by_settings_that_the_api_takes() -> None:
    compared = [settings for settings in comparison.EVERY.values() if settings.enabled]
    assert {settings.method for settings in compared} == set(METHODS) - {"none"}
    for settings in compared:
        given = {name: value for name, value in used_settings(settings).items() if value is not None}
        assert from_mapping(given) == settings


def generated(model: Miniature, method: str, captions: list[str], **values: Any) -> simulator.Generated:
    settings = Settings(enabled=True, method=method, **values)
    return simulator.generate(model, captions, simulator.noises(range(len(captions))), settings, seeds=[5, 6], steps=4)


CAPTIONS = ["a fox on a red background", "an owl and a fox on a blue background"]


def test_another_text_is_the_prompt_of_that_text(model: Miniature) -> None:
    run = generated(model, "random_tokens", CAPTIONS, tokens=2)
    assert run.outcome is not None
    texts = [run.outcome.prompts[image].text or "" for image in range(2)]
    assert all(len(text.split()) == len(caption.split()) + 2 for text, caption in zip(texts, CAPTIONS))
    alone = simulator.generate(model, texts, simulator.noises(range(2)), Settings(), steps=4)
    assert torch.equal(run.latents, alone.latents) and run.forward.tolist() == [6, 6]
    assert torch.equal(run.after, alone.before)  # ‖Δ‖ of the prompt as it was heard


def test_what_changes_the_prompt_changes_nothing_at_its_neutral_value(model: Miniature) -> None:
    plain = simulator.generate(model, CAPTIONS, simulator.noises(range(2)), Settings(), steps=4)
    for method, values in (
        ("cross_attention", {"bos_scale": 1.0, "mask_padding": False}),
        ("random_tokens", {"tokens": 0}),
        ("noise_selection", {"candidates": 1}),
    ):
        assert torch.equal(generated(model, method, CAPTIONS, **values).latents, plain.latents), method
    # whose first answers come from other batches
    same = generated(model, "prompt_embedding", CAPTIONS, max_steps=0).latents
    torch.testing.assert_close(same, plain.latents, atol=1e-2, rtol=1e-2)


def test_the_vectors_cost_their_own_rows_alone(model: Miniature) -> None:
    run = generated(model, "prompt_embedding", CAPTIONS, target=1e-3, target_kind="fraction", max_steps=3)
    # an unconditional row, and four of the prompt; where the last is the best, the first step asks for neither
    assert all(6 + 5 - 2 <= rows <= 6 + 5 for rows in run.forward.tolist()) and run.backward.tolist() == [3, 3]
    assert (run.after < run.before).all()
