from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lib_memnoise.__main__ import main
from lib_memnoise.lab import demo
from lib_memnoise.lab.sampling import alpha_bar, ddim, ddim_timesteps
from lib_memnoise.lab.toy import Mixture, Toy, correlation, make_toy
from lib_memnoise.mitigations.outcome import run
from lib_memnoise.prediction import SelectableDelta, magnitude
from lib_memnoise.settings import Settings, from_mapping

ROOT = Path(__file__).parents[1]
KEYS = {
    "method", "settings", "prompts", "images", "similarity", "copied", "alignment", "rows", "backward_rows",
    "magnitude_before", "magnitude_after",
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("threads")


def small_toy(dtype: torch.dtype = torch.float64) -> Toy:
    toy = make_toy(prompts=3, varied=4, size=4, smooth=3)
    m = toy.mixture
    mixture = Mixture(m.means.to(dtype), m.widths.to(dtype), m.log_weights.to(dtype))
    return Toy(mixture, toy.memorised.to(dtype), toy.themes.to(dtype))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# The sampler


def test_ddim_recovers_the_mean_of_one_gaussian() -> None:
    mean = noise(1, 4, 4, 4, seed=1)
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.long)
    timesteps = ddim_timesteps(50)
    a_first, a_last = alpha_bar(timesteps[0]), alpha_bar(timesteps[-1])

    # Without width, ε is the same all the way: what is left at the end is the mean and the last bit of noise.
    point = Mixture(mean, 0 * one, torch.zeros(1, 1, dtype=torch.float64))
    x = noise(1, 4, 4, 4)
    eps = (x - a_first**0.5 * mean) / (1 - a_first) ** 0.5
    result = ddim(lambda x, t, _: point.eps(x, t, zero), x, timesteps, 900.0, 7.0)
    torch.testing.assert_close(result, a_last**0.5 * mean + (1 - a_last) ** 0.5 * eps)
    assert correlation(result, mean) > 0.99

    # With width, the scaled mean stays the scaled mean.
    wide = replace(point, widths=0.7 * one)
    result = ddim(lambda x, t, _: wide.eps(x, t, zero), a_first**0.5 * mean, timesteps, 900.0, 7.0)
    torch.testing.assert_close(result, a_last**0.5 * mean)


@pytest.mark.parametrize("tau, off", [(999, 0), (981, 0), (900, 5), (0, 49)])
def test_guidance_off_follows_the_unconditional_row_alone(tau: float, off: int) -> None:
    calls: list[tuple[int, bool]] = []

    def eps(x: Tensor, t: int, conditional: bool) -> Tensor:
        calls.append((t, conditional))
        return torch.full_like(x, float(conditional))

    ddim(eps, noise(1, 4, 2, 2), ddim_timesteps(50), tau, 7.0)
    assert sum(not conditional for _, conditional in calls) == 49
    assert sum(conditional for _, conditional in calls) == 49 - off
    assert all(t <= tau for t, conditional in calls if conditional)


# The analytic model


def log_density(mixture: Mixture, x: Tensor, t: int, condition: int) -> Tensor:
    """log p(x_t | condition) of single latents `(N, C, H, W)`, by torch's own distributions."""
    a, weights = alpha_bar(t), mixture.log_weights[condition]
    scale = (a * mixture.widths**2 + 1 - a).sqrt()
    parts = torch.distributions.Normal(
        a**0.5 * mixture.means.flatten(1), scale[:, None].expand(-1, mixture.means[0].numel())
    )
    components = torch.distributions.Independent(parts, 1)
    return torch.distributions.MixtureSameFamily(torch.distributions.Categorical(logits=weights), components).log_prob(
        x.flatten(1)
    )


@pytest.mark.parametrize("t", [981, 601, 201, 21])
@pytest.mark.parametrize("condition", [0, 2, 3])
def test_eps_is_the_score_of_the_density(t: int, condition: int) -> None:
    toy, a, step = small_toy(), alpha_bar(t), 1e-4
    start = 5  # between pictures, not on one
    x = a**0.5 * toy.mixture.means[start : start + 2].mean(0, keepdim=True) + (1 - a) ** 0.5 * noise(1, 4, 4, 4)
    basis = torch.eye(x.numel(), dtype=x.dtype).reshape(-1, *x.shape[1:])
    density = [log_density(toy.mixture, x + sign * step * basis, t, condition) for sign in (1, -1)]
    score = ((density[0] - density[1]) / (2 * step)).reshape(x.shape)
    eps = toy.mixture.eps(x, t, torch.tensor([condition]))
    torch.testing.assert_close(eps, -((1 - a) ** 0.5) * score, rtol=1e-5, atol=1e-5)


def test_eps_is_differentiable() -> None:
    toy = small_toy()
    x = noise(2, 4, 4, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: toy.mixture.eps(x, 981, torch.tensor([1, 3])), x)


def test_conditions_are_consistent() -> None:
    """The empty prompt is the average over the prompts, and all weights sum to 1."""
    weights = small_toy().mixture.log_weights.exp()
    torch.testing.assert_close(weights.sum(1), torch.ones(4, dtype=weights.dtype), atol=1e-6, rtol=0)
    torch.testing.assert_close(weights[3], weights[:3].mean(0))


def test_components_have_unit_variance() -> None:
    mixture = make_toy().mixture
    variance = mixture.means.flatten(1).var(1, correction=0) + mixture.widths**2
    assert variance.min() > 0.5 and variance.max() < 1.5
    assert variance.mean() == pytest.approx(1, abs=0.05)


def test_correlation() -> None:
    x = noise(3, 4, 4, 4)
    torch.testing.assert_close(correlation(2 * x + 1, x), torch.ones(3, dtype=x.dtype))
    expected = [np.corrcoef(a.flatten(), b.flatten())[0, 1] for a, b in zip(x.numpy(), x.flip(0).numpy())]
    np.testing.assert_allclose(correlation(x, x.flip(0)).numpy(), expected)


# The comparison


def network_of(toy: Toy, images: int) -> demo.Network:
    return demo.make_network(toy, torch.arange(toy.prompts).repeat_interleave(images))


@pytest.mark.parametrize("name, rows", [("none", 98), ("static tau", 93), ("batch-wise", 98 + 4 * 2 - 5)])
def test_rows(name: str, rows: int) -> None:
    toy = small_toy(torch.float32)
    network = network_of(toy, 2)
    demo.generate(network, demo.noises(toy, 2, 0), demo.COMPARED[name], 50)
    assert network.forward.tolist() == [rows] * 6
    assert network.backward.tolist() == [0] * 6


def test_rows_per_sample() -> None:
    toy = small_toy(torch.float32)
    network = network_of(toy, 2)
    x = demo.noises(toy, 2, 0)
    settings = demo.COMPARED["per-sample"].resolved(demo.PRESET)
    outcome = run(x, demo.FirstDelta(network, 981), settings, parameterization="eps")
    assert outcome.steps is not None and outcome.steps.unique().numel() > 1  # or select is not put to the test
    assert network.forward.tolist() == (2 * (outcome.steps + 1)).tolist()
    assert network.backward.tolist() == (2 * outcome.steps).tolist()


def test_delta_selects_prompts() -> None:
    toy = small_toy()
    x = noise(3, 4, 4, 4)
    delta = demo.FirstDelta(network_of(toy, 1), 981)
    assert isinstance(delta, SelectableDelta)
    torch.testing.assert_close(delta.select([2, 0])(x[[2, 0]]), delta(x)[[2, 0]])


def test_noises_do_not_depend_on_how_many() -> None:
    toy = small_toy()
    few, many = demo.noises(toy, 2, 3), demo.noises(toy, 5, 3)
    assert torch.equal(few.reshape(3, 2, -1), many.reshape(3, 5, -1)[:, :2])
    assert not torch.equal(few, demo.noises(toy, 2, 4))


def test_static_tau_leaves_the_noise_alone() -> None:
    toy = small_toy(torch.float32)
    x = demo.noises(toy, 1, 0)
    adjusted, _ = demo.generate(network_of(toy, 1), x, demo.COMPARED["static tau"], 10)
    assert torch.equal(adjusted, x)


def test_unmitigated_images_are_mostly_copies_and_the_paper_method_has_an_effect() -> None:
    records = {record["method"]: record for record in demo.compare(images=2)}
    assert records["none"]["copied"] > 0.7
    assert records["batch-wise"]["copied"] < records["static tau"]["copied"] < records["none"]["copied"]
    assert records["batch-wise"]["magnitude_after"] < records["batch-wise"]["magnitude_before"]
    assert records["none"]["magnitude_after"] == records["none"]["magnitude_before"]


def test_the_memorised_picture_is_what_the_magnitude_sees() -> None:
    """The toy has the paper's signal: ‖Δ‖ of a prompt with a memorised picture is above that of one without."""
    values = []
    for memorised_share in (0.99, 1 / 17):
        toy = make_toy(memorised_share=memorised_share)
        values.append(float(magnitude(demo.FirstDelta(network_of(toy, 2), 981)(demo.noises(toy, 2, 0))).mean()))
    assert values[0] > values[1]


# The command line


def records_of(capsys: pytest.CaptureFixture[str], *argv: str) -> list[dict[str, Any]]:
    main(["demo", "--json", *argv])
    captured = capsys.readouterr()
    assert captured.err.strip() == demo.STATEMENT
    return json.loads(captured.out)


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ("--seed", "5", "--images", "1", "--steps", "10")
    records = records_of(capsys, *argv)
    assert [record["method"] for record in records] == ["none", "static tau", "batch-wise", "per-sample"]
    for record in records:
        assert record.keys() == KEYS
        assert record["images"] == 1 and record["prompts"] == 8
        settings = from_mapping(record["settings"])  # as the API takes them
        assert settings.enabled == (record["method"] != "none")
        assert all(np.isfinite(value) for value in record.values() if isinstance(value, float))
    assert records_of(capsys, *argv) == records
    assert records_of(capsys, "--seed", "6", *argv[2:]) != records


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    main(["demo", "--images", "1", "--steps", "2"])
    out = capsys.readouterr().out
    assert out.startswith("An analytic toy") and "no evidence about Stable Diffusion" in out
    for name in demo.COMPARED:
        assert f"\n{name}  " in out


def test_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(**_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "compare", stop)
    with pytest.raises(SystemExit) as stopped:
        main(["demo"])
    assert stopped.value.code == 130


def test_settings_of_the_comparison_follow_the_preset() -> None:
    assert demo.COMPARED["static tau"].resolved(demo.PRESET).tau == 900
    assert demo.COMPARED["per-sample"].resolved(demo.PRESET).target == 0.5
    assert demo.COMPARED["per-sample"].resolved(demo.PRESET).target_kind == "fraction"
    assert demo.COMPARED["batch-wise"] == Settings(enabled=True)
