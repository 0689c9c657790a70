"""How well scores tell memorised prompts from ordinary ones."""

from __future__ import annotations

import json

import numpy as np
import pytest

from lib_memnoise.__main__ import main
from lib_memnoise.core.calibration import unit
from lib_memnoise.core.calibration_store import serves
from lib_memnoise.core.delta import magnitude
from lib_memnoise.core.schedule import alpha_bar
from lib_memnoise.lab import detection, timestep_transfer
from lib_memnoise.lab.detection import (
    MOST,
    Line,
    Plan,
    Scores,
    left_alone,
    left_alone_text,
    line,
    measured,
    report,
    true_positives,
)
from lib_memnoise.lab.experiment import seed_of, subjects
from lib_memnoise.lab.miniature.model import load_miniature
from lib_memnoise.lab.simulator import FirstDelta, make_network, noises

pytestmark = pytest.mark.usefixtures("threads")


def normal(mean: float, subjects: int, images: int, seed: int) -> Scores:
    values = mean + np.random.default_rng(seed).standard_normal((2, subjects, images, MOST))
    return Scores(*values)


def test_true_positives_at_a_rate() -> None:
    ordinary = np.arange(1000.0)
    # The ⌈1001 · 0.99⌉ = 991st smallest is 990.
    assert true_positives(np.array([989.0, 990.0, 991.0, 2000.0]), ordinary) == 0.5
    assert true_positives(ordinary + 1e6, ordinary) == 1.0
    assert true_positives(ordinary, ordinary) == pytest.approx(0.01, abs=0.002)


def test_a_line_on_scores_of_known_distribution() -> None:
    """Normal scores 2 apart: AUC = Φ(2/√2); with 4 noises averaged Φ(4/√2), and TPR = Φ(2·√n − 2.326)."""
    from scipy.stats import norm

    memorised, ordinary, scale = (
        normal(m, s, i, k) for k, (m, s, i) in enumerate(((2, 40, 50), (0, 2000, 1), (0, 500, 1)))
    )
    for count in (1, 4):
        found = line("magnitude", count, memorised, ordinary, scale, Plan(resamples=200))
        expected = norm.cdf(2 * count**0.5 / 2**0.5)
        assert found.auc == pytest.approx(expected, abs=0.01)
        assert found.true_positives == pytest.approx(norm.cdf(2 * count**0.5 - norm.ppf(0.99)), abs=0.08)
        assert found.auc_low <= found.auc <= found.auc_high and found.low <= found.true_positives <= found.high
        assert found.rows == 2 * count
    both = line("both", 1, memorised, ordinary, scale, Plan(resamples=20))
    assert both.auc == pytest.approx(norm.cdf(2.0), abs=0.01)  # two independent measures are worth two noises


def test_measured_is_the_score() -> None:
    model = load_miniature()
    chosen = subjects(memorised=True, held_out=True)[:2]
    found = measured(model, chosen, 1, 3, lambda done: None)
    network = make_network(model, [chosen[1].caption] * MOST)
    delta = FirstDelta(network, "DDIM")(noises([seed_of(1, i, 3) for i in range(MOST)]))
    np.testing.assert_allclose(found.magnitude[1, 0], magnitude(delta).detach().numpy(), rtol=1e-4)
    assert (abs(found.cosine) <= 1).all()


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detection, "DEVELOPMENT", 20)


def test_the_score_tells_what_was_memorised(capsys: pytest.CaptureFixture[str]) -> None:
    """Held-out prompts. The full table, with 500 ordinary prompts, is `python -m lib_memnoise score`."""
    main(["score", "--images", "1", "--ordinary", "60", "--json", "--threads", "1"])
    lines = [Line(**entry) for entry in json.loads(capsys.readouterr().out)]
    of = {(entry.measure, entry.noises): entry for entry in lines}
    assert of["magnitude", 1].auc >= 0.9 and of["magnitude", 1].caption_auc >= 0.97
    assert of["magnitude", 8].auc >= of["magnitude", 1].auc - 0.01
    text = report(lines, Plan(images=1, ordinary=60))
    assert "60 held-out ordinary prompts" in text and len(text.splitlines()) > len(lines)


def test_scores_of_prompts(capsys: pytest.CaptureFixture[str]) -> None:
    caption = subjects(memorised=True, held_out=True)[0].caption
    main(["score", caption, "a", "--noises", "2", "--json", "--threads", "1"])
    memorised, other = json.loads(capsys.readouterr().out)
    assert memorised["prompt"] == caption and len(memorised["scores"]) == 2
    assert min(memorised["scores"]) > max(other["scores"])
    main(["score", caption, "--noises", "2", "--threads", "1"])
    assert f"{sum(memorised['scores']) / 2:.4f}  {caption}" in capsys.readouterr().out


def test_ordinary_images_are_left_alone() -> None:
    found = left_alone(load_miniature(), batches=2)
    assert found.images == 8 and found.unflagged_batches >= 1
    assert found.identical == 4 * found.unflagged_batches and found.extra_rows == 0
    assert "bit-identical" in left_alone_text(found)


def test_a_threshold_of_another_timestep(capsys: pytest.CaptureFixture[str]) -> None:
    main(["score", "--timesteps", "--ordinary", "32", "--json", "--threads", "1"])
    records = json.loads(capsys.readouterr().out)
    found = {(one["calibrated_at"], one["scored_at"]): one for one in records}
    assert len(found) == len(timestep_transfer.TIMESTEPS) ** 2
    for t in timestep_transfer.TIMESTEPS:
        # The 99 % quantile lies below the largest one.
        assert found[t, t]["raw"] == found[t, t]["false_positives"] == 1 / 32
    near = [one for (t, other), one in found.items() if serves(t, other)]
    assert max(one["false_positives"] for one in near) < max(one["raw"] for one in near)
    assert max(one["false_positives"] for one in near) < max(one["false_positives"] for one in records)


def test_false_positives_by_another_threshold() -> None:
    scores = np.stack([np.arange(1.0, 101.0), np.arange(51.0, 151.0)])
    assert timestep_transfer.false_positives(scores, rate=0.1).tolist() == [[0.1, 0.6], [0.0, 0.1]]
    assert timestep_transfer.false_positives(scores * [[1], [3]], np.array([1.0, 3.0]), 0.1).tolist() == [
        [0.1, 0.6],
        [0.0, 0.1],
    ]
    every = np.repeat(scores[:1], len(timestep_transfer.TIMESTEPS), axis=0)
    text = timestep_transfer.report(every, "eps")
    assert "100 ordinary prompts" in text and text.count("\n   981 ") == 0 and text.count("\n  981 ") == 3


@pytest.mark.parametrize("parameterization", ["eps", "v"])
def test_a_unit_is_a_difference_of_clean_latents(parameterization: str) -> None:
    """Two predictions at one x whose clean latents differ by 1."""
    bar, x = alpha_bar(951), 0.3

    def output(clean: float) -> float:
        eps = (x - bar**0.5 * clean) / (1 - bar) ** 0.5
        return eps if parameterization == "eps" else bar**0.5 * eps - (1 - bar) ** 0.5 * clean

    assert abs(output(1.7) - output(0.7)) == pytest.approx(unit(parameterization, bar))
