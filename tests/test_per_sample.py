from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib_memnoise.core.delta import magnitude
from lib_memnoise.core.progress import Progress
from lib_memnoise.methods.batch import BatchContext
from lib_memnoise.methods.descent import PATIENCE
from lib_memnoise.methods.per_sample import adjust
from lib_memnoise.methods.pipeline import run, run_each
from lib_memnoise.settings import from_mapping
from tests.networks import SmallDelta, noise
from tests.reference import figure_7


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    batch=st.integers(1, 4),
    lr=st.floats(0.005, 0.05),
    fraction=st.floats(0.4, 0.95),
    weight_decay=st.sampled_from([0.0, 0.01, 0.2]),
)
def test_agrees_with_figure_7(seed: int, batch: int, lr: float, fraction: float, weight_decay: float) -> None:
    x, exact = noise(batch, seed=seed), SmallDelta(seed=seed).double()
    target = fraction * float(magnitude(exact(x)).detach().mean())
    # float64 latents are worked on in float64, so that both must stop at the very same step
    result = adjust(x.double(), exact, lr=lr, target=target, max_steps=60, weight_decay=weight_decay)
    for image in range(batch):
        expected, steps, first, last = figure_7(
            x[image], exact, lr=lr, target_loss=target, most=60, weight_decay=weight_decay
        )
        assert math.isclose(result.before[image], first, rel_tol=1e-9)
        assert result.reached[image] == (last < target)
        assert result.steps[image] == steps
        if last < target:
            torch.testing.assert_close(result.x[image], expected, atol=1e-8, rtol=1e-8)
            assert math.isclose(result.after[image], last, rel_tol=1e-8)


def test_float32_agrees_to_1e5_over_a_fixed_number_of_steps() -> None:
    x, exact = noise(3, seed=5), SmallDelta(seed=5).double()
    result = adjust(x, SmallDelta(seed=5), lr=0.01, target=0.0, max_steps=12)
    for image in range(3):
        expected, *_ = figure_7(x[image], exact, lr=0.01, target_loss=0.0, most=12)
        torch.testing.assert_close(result.x[image].double(), expected, atol=1e-5, rtol=1e-5)


def test_finished_images_are_not_evaluated_again() -> None:
    x, delta = noise(3), SmallDelta()
    before = magnitude(delta(x))
    targets = before * torch.tensor([2.0, 0.9, 0.7])
    delta.rows.clear()
    result = adjust(x, delta, lr=0.01, target=lambda _: targets, max_steps=50)
    assert result.reached.all() and result.steps[0] == 0 and 0 < result.steps[1] < result.steps[2]
    assert torch.equal(result.x[0], x[0])
    assert sum(delta.rows) == int((result.steps + 1).sum())
    assert delta.rows == sorted(delta.rows, reverse=True)


def test_an_image_does_not_depend_on_its_batch() -> None:
    x, delta = noise(4), SmallDelta()
    together = adjust(x, delta, lr=0.02, target=lambda before: 0.8 * before, max_steps=50)
    for image in range(4):
        alone = adjust(x[image : image + 1], delta, lr=0.02, target=lambda before: 0.8 * before, max_steps=50)
        assert alone.steps[0] == together.steps[image]
        torch.testing.assert_close(together.x[image], alone.x[0], atol=1e-5, rtol=1e-5)


def test_images_are_told_apart_where_delta_can_select() -> None:
    nets = [SmallDelta(seed=i) for i in range(3)]

    class Mixed:
        def __init__(self, images: list[int]) -> None:
            self.images = images

        def select(self, images: list[int]) -> Mixed:
            return Mixed([self.images[i] for i in images])

        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([nets[i](x[k : k + 1]) for k, i in enumerate(self.images)])

    x = noise(3)
    together = adjust(x, Mixed([0, 1, 2]), lr=0.02, target=lambda b: b * torch.tensor([0.95, 0.7, 0.9]), max_steps=60)
    for image, fraction in enumerate((0.95, 0.7, 0.9)):
        alone = adjust(x[image : image + 1], nets[image], lr=0.02, target=lambda b, f=fraction: f * b, max_steps=60)
        assert alone.steps[0] == together.steps[image]
        torch.testing.assert_close(together.x[image], alone.x[0], atol=1e-5, rtol=1e-5)


def test_a_target_out_of_reach_keeps_the_best_and_says_so() -> None:
    x, delta = noise(2), SmallDelta()
    result = adjust(x, delta, lr=1.0, target=0.0, max_steps=15)  # so large a step that it jumps about
    assert not result.reached.any() and (result.steps == 15).all()
    assert (result.after <= result.before).all()
    torch.testing.assert_close(magnitude(delta(result.x)), result.after, rtol=1e-5, atol=1e-5)


def test_no_steps_allowed() -> None:
    x, delta = noise(2), SmallDelta()
    result = adjust(x, delta, lr=0.01, target=1e9, max_steps=0)
    assert result.reached.all() and torch.equal(result.x, x)
    result = adjust(x, delta, lr=0.01, target=0.0, max_steps=0)
    assert not result.reached.any() and torch.equal(result.x, x) and delta.rows == [2, 2]


def test_an_answer_that_is_not_finite_ends_its_own_image_only() -> None:
    x, net = noise(2), SmallDelta()

    class Broken:
        def __init__(self, images: list[int]) -> None:
            self.images = images

        def select(self, images: list[int]) -> Broken:
            return Broken([self.images[i] for i in images])

        def __call__(self, z: torch.Tensor) -> torch.Tensor:
            factor = torch.tensor([math.nan if i == 0 else 1.0 for i in self.images])
            return net(z) * factor.reshape(-1, 1, 1, 1)

    result = adjust(x, Broken([0, 1]), lr=0.02, target=lambda b: 0.8 * b, max_steps=50)
    assert torch.equal(result.x[0], x[0]) and not result.reached[0] and math.isnan(result.before[0])
    assert result.reached[1]


def test_needs_a_gradient() -> None:
    net = SmallDelta()

    def delta(z: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return net(z)

    with pytest.raises(RuntimeError, match="no gradient"):
        adjust(noise(1), delta, lr=0.01, target=0, max_steps=3)


def test_works_under_no_grad_and_leaves_no_weight_gradients() -> None:
    delta = SmallDelta()
    with torch.no_grad():
        result = adjust(noise(2), delta, lr=0.02, target=lambda b: 0.8 * b, max_steps=50)
    assert result.reached.all() and not result.x.requires_grad
    assert all(weight.grad is None for weight in delta.parameters())


def test_half_precision_network_keeps_a_float32_latent() -> None:
    result = adjust(noise(2), SmallDelta(dtype=torch.bfloat16), lr=0.02, target=lambda b: 0.8 * b, max_steps=80)
    assert result.x.dtype is torch.float32 and result.reached.all()
    # weight decay acts on every element, by less than bfloat16 could hold
    assert not torch.equal(result.x, result.x.bfloat16().float())


def test_half_precision_unet() -> None:
    """A real U-Net in float16: gradients survive where those of single elements are below its smallest numbers."""
    from lib_memnoise.lab.experiment import subjects
    from lib_memnoise.lab.miniature.model import load_miniature

    model = load_miniature()
    caption = subjects(memorised=True, held_out=False)[0].caption
    context = torch.cat([model.encode([caption]), model.encode([""])])
    x = noise(1, 16)
    found = {}
    for dtype in (torch.float32, torch.float16):
        unet = model.unet.to(dtype)

        def delta(z: torch.Tensor, unet: torch.nn.Module = unet, dtype: torch.dtype = dtype) -> torch.Tensor:
            t = torch.full((2 * len(z),), 981.0, dtype=dtype)
            cond, uncond = unet(torch.cat([z, z]).to(dtype), t, context.to(dtype)).chunk(2)
            return cond - uncond

        try:
            found[dtype] = adjust(x, delta, lr=0.02, target=lambda before: 0.5 * before, max_steps=60)
        except RuntimeError as error:
            if "not implemented for 'Half'" not in str(error):
                raise
            pytest.skip("this torch has no float16 on the processor")
    whole, half = found[torch.float32], found[torch.float16]
    assert half.x.dtype is torch.float32 and half.reached.all()
    assert abs(int(half.steps) - int(whole.steps)) <= 1
    moved, expected = (half.x - x).flatten(), (whole.x - x).flatten()
    assert torch.cosine_similarity(moved, expected, dim=0) > 0.98


@given(seed=st.integers(0, 1000), lr=st.floats(0.02, 0.1), fraction=st.floats(0.5, 0.95))
@settings(max_examples=15, deadline=None)
def test_steps_on_the_sphere_have_one_length_and_keep_the_noise_s(seed: int, lr: float, fraction: float) -> None:
    x, exact = noise(2, seed=seed).double(), SmallDelta(seed=seed).double()
    target = fraction * float(magnitude(exact(x)).detach().mean())
    result = adjust(x, exact, lr=lr, target=target, max_steps=20, rule="sphere")
    for image in range(2):
        moved, best, least, steps = x[image].clone(), x[image], math.inf, 0
        for step in range(21):
            leaf = moved.clone().requires_grad_()
            loss = exact(leaf[None]).norm()
            if loss.item() <= least:
                best, least = moved, loss.item()
            if loss.item() < target or step == 20:
                break
            (g,) = torch.autograd.grad(loss, leaf)
            moved = moved - lr * math.sqrt(moved.numel()) * g / g.norm()
            moved, steps = moved * x[image].norm() / moved.norm(), steps + 1
        torch.testing.assert_close(result.x[image], best, atol=1e-8, rtol=1e-8)
        assert int(result.steps[image]) == steps
        assert math.isclose(result.x[image].norm(), x[image].norm(), rel_tol=1e-9)


def test_a_hopeless_descent_is_given_up_and_others_are_not() -> None:
    x, delta = noise(3), SmallDelta()
    first = magnitude(delta(x)).detach()
    slow = {"lr": 0.0005, "max_steps": 100}
    whole = adjust(x, delta, target=0.0, **slow)
    fell = first - whole.after
    targets = torch.stack([first[0] - 0.9 * fell[0], 0.02 * first[1], whole.after[2] * 0.98])
    told: list[Progress] = []
    result = adjust(x, delta, target=lambda _: targets, patience=20, on_progress=told.append, **slow)
    assert result.reached.tolist() == [True, False, False] and result.hopeless.tolist() == [False, True, False]
    # far from the target it ends as soon as there is a pace to go by, just short of it only with its last step
    assert result.steps[1] == 20 and result.steps[2] == 100 and 20 < result.steps[0] < 100
    alone = adjust(x[2:], delta, target=float(targets[2]), **slow)
    torch.testing.assert_close(result.x[2:], alone.x, atol=1e-5, rtol=1e-5)
    # as in the paper, nothing is given up unless that is asked for; and a target of 0 asks for all steps
    assert (adjust(x, delta, target=lambda _: targets, **slow).steps[1:] == 100).all()
    assert (adjust(x, delta, target=0.0, patience=20, **slow).steps == 100).all()

    assert [progress.done for progress in told] == list(range(101)) and told[0].running == 3
    assert all(progress.most == 100 and progress.unit == "step" for progress in told)
    assert told[0].value == pytest.approx(float(first[1])) and told[0].target == pytest.approx(float(targets[1]))
    assert told[19].running == 3 and told[20].running == 2 and told[99].running == 1
    assert "step 20 of at most 100, 2 images running, magnitude" in str(told[20])


def test_the_product_gives_up_and_says_so() -> None:
    x = noise(2)
    settings = from_mapping({"method": "per_sample", "target": 0.02, "target_kind": "fraction", "lr": 0.0005})
    outcome = run(x, SmallDelta(), settings.resolved("sd1"), BatchContext("eps"))
    assert outcome.steps is not None and (outcome.steps == PATIENCE).all()
    assert outcome.notes[0] == [
        "the target was not reached in 30 steps, too slowly to reach it in 100, and the image has the best noise found"
    ]


@pytest.mark.parametrize(
    ("given", "most", "unit"),
    [
        ({"method": "per_sample", "target": 0.9, "target_kind": "fraction"}, 100, "step"),
        ({"method": "sail", "target": 0, "max_steps": 3, "redraws": 2}, 9, "step"),
        ({"method": "noise_selection", "candidates": 6}, 6, "noise"),
        ({"method": "batch_wise", "steps": 5}, 5, "adjustment"),
    ],
    ids=lambda value: value["method"] if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("way", [run, run_each])
def test_progress_never_goes_back(given: dict[str, Any], most: int, unit: str, way: Any) -> None:
    told: list[Progress] = []
    context = BatchContext("eps", seeds=[1, 2], on_progress=told.append)
    way(noise(2), SmallDelta(), from_mapping(given).resolved("sd1"), context)
    assert {progress.most for progress in told} == {most * (2 if way is run_each else 1)}
    done = [progress.done for progress in told]
    assert done == sorted(done) and done[-1] <= told[-1].most and {progress.unit for progress in told} == {unit}
    assert all(progress.running <= 2 for progress in told)
