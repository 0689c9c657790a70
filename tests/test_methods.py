"""The methods of the comparison, each against an independent implementation on small networks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lib_memnoise.core.delta import magnitude, select
from lib_memnoise.lab.miniature.networks import TransformerBlock, UNet
from lib_memnoise.methods import divin, noise_selection, prompt_embedding, random_tokens, sail
from lib_memnoise.methods.batch import BatchContext, Outcome, Prompt
from lib_memnoise.methods.pipeline import run, run_each, run_some
from lib_memnoise.registry import METHODS
from lib_memnoise.settings import SettingError, Settings, from_mapping
from lib_memnoise.torch_utils.cross_attention import PLAIN, Row, cross_attentions, scaled
from tests.networks import SmallDelta, noise
from tests.reference import adam, attention

INITIAL = BatchContext(
    "eps", alpha_bar=0.3, seeds=[11, 12, 13, 14], texts=["a b", "c", "d e f", "g"], vocabulary=lambda: ["x"]
)


def test_every_method_has_a_module_and_none_depends_on_the_batch() -> None:
    delta = Spoken(4)
    for name in METHODS:
        chosen = Settings(enabled=True, method=name, target=0.8, target_kind="fraction", lr=0.02, temperature=0.1)
        chosen = chosen.resolved("sd1")
        x = noise(4)
        together, apart = (way(x, delta, chosen, INITIAL) for way in (run, run_each))
        torch.testing.assert_close(together.x, apart.x, atol=1e-5, rtol=1e-5)
        assert together.prompts.keys() == apart.prompts.keys() and together.notes == apart.notes
        assert not together.failed
        for image, prompt in together.prompts.items():
            assert prompt.text == apart.prompts[image].text
            if prompt.vectors is not None:
                torch.testing.assert_close(prompt.vectors, apart.prompts[image].vectors, atol=1e-5, rtol=1e-5)
        some = run_some([1, 3], x, delta, INITIAL, lambda x, d, context, chosen=chosen: run(x, d, chosen, context))
        assert torch.equal(some.x[[0, 2]], x[[0, 2]])
        torch.testing.assert_close(some.x[[1, 3]], together.x[[1, 3]], atol=1e-5, rtol=1e-5)
        assert some.prompts.keys() == together.prompts.keys() & {1, 3}


# Random tokens

WORDS = st.lists(st.sampled_from(["a", "fox", "(red", "hat:1.2)", "AND", ":0.5", "BREAK", "[cat:dog:0.3]"]), min_size=1)


@given(WORDS, st.integers(0, 8), st.integers(0, 2**32 - 1))
def test_random_tokens_are_inserted_between_words(words: list[str], count: int, seed: int) -> None:
    words = ["a", *words]
    text = " ".join(words)
    generator = BatchContext("eps", seeds=[seed]).generator(0)
    found, added = random_tokens.insert(text, ["zork", "", "quux"], count, generator)
    assert len(added) == count and set(added) <= {"zork", "quux"}
    assert [word for word in found.split(" ") if word not in ("zork", "quux")] == words
    # what ends a part stays at its end
    for before, after in zip(found.split(" "), found.split(" ")[1:]):
        if after in ("AND", ":0.5", "BREAK"):
            assert before not in ("zork", "quux") or words[words.index(after) - 1] == before
    again = random_tokens.insert(text, ["zork", "", "quux"], count, BatchContext("eps", seeds=[seed]).generator(0))
    assert again == (found, added)


@pytest.mark.parametrize(
    ("text", "never"),
    [
        ("(fox : 1.2) in snow", ["fox zork", ": zork"]),
        ("(fox :1.2) in", ["fox zork"]),
        ("[cat : dog : 0.3] runs", ["[cat zork", ": zork", "dog zork"]),
        ("[a cat|a dog] runs", ["[a zork", "a zork dog]"]),
        ("a [very big cat", ["very zork", "big zork", "cat zork"]),
        ("fox : 0.5 AND snow :0.4", [": zork", "0.5 zork", "zork :", "0.4 zork"]),
        ("fox: 0.5 AND snow", [": zork", "0.5 zork"]),
        ("\\[ a \\]", []),
    ],
)
def test_random_tokens_leave_the_syntax_alone(text: str, never: list[str]) -> None:
    found = set()
    for seed in range(80):
        one, _ = random_tokens.insert(text, ["zork"], 1, BatchContext("eps", seeds=[seed]).generator(0))
        assert one.replace("zork ", "", 1) == text or one.removesuffix(" zork") == text
        assert not any(part in one for part in never), one
        found.add(one)
    assert len(found) == {0: 4}.get(len(never), len(found)) >= 2


def test_random_tokens_are_drawn_again_until_the_count_is_right() -> None:
    context = BatchContext(
        "eps",
        seeds=[1, 2],
        texts=["a b", "c"],
        vocabulary=lambda: ["one", "two pieces"],
        tokens=lambda t: len(t.split()),
    )
    settings = Settings(method="random_tokens", tokens=3).resolved("sd1")
    for prompt in run(noise(2), SmallDelta(), settings, context).prompts.values():
        assert prompt.text is not None and prompt.text.split().count("one") == 3 and "two" not in prompt.text
    never = replace(context, vocabulary=lambda: ["two pieces"])
    with pytest.raises(RuntimeError, match="exactly 3 more"):
        run(noise(2), SmallDelta(), settings, never)


def test_random_tokens_are_uniform_over_tokens_and_places() -> None:
    places: dict[int, int] = {}
    tokens: dict[str, int] = {}
    for seed in range(3000):
        text, (token,) = random_tokens.insert("a b", ["u", "v", "w"], 1, BatchContext("eps", seeds=[seed]).generator(0))
        places[text.split(" ").index(token)] = places.get(text.split(" ").index(token), 0) + 1
        tokens[token] = tokens.get(token, 0) + 1
    # binomial, n = 3000, p = 1/3: a standard deviation of 26
    assert all(abs(count - 1000) < 130 for count in (*places.values(), *tokens.values()))
    assert len(places) == len(tokens) == 3


def test_a_text_encoder_without_vocabulary_is_refused() -> None:
    with pytest.raises(RuntimeError, match="random tokens need a text encoder"):
        run(
            noise(1),
            SmallDelta(),
            Settings(method="random_tokens").resolved("sd1"),
            BatchContext("eps", seeds=[1], texts=["a"]),
        )


# Noise


def test_what_is_drawn_is_noise_and_an_image_s_own() -> None:
    x = torch.zeros(4, 4, 64, 64)
    drawn = torch.stack([INITIAL.noise(x, image, k) for image in range(4) for k in range(4)])
    assert abs(float(drawn.mean())) < 0.01 and abs(float(drawn.std()) - 1) < 0.01
    assert float(torch.corrcoef(drawn.flatten(1)).fill_diagonal_(0).abs().max()) < 0.05
    assert torch.equal(INITIAL.select([2]).noise(x[2:3], 0, 1), INITIAL.noise(x, 2, 1))
    seeded = torch.randn(4, 64, 64, generator=torch.Generator().manual_seed(11))
    assert not torch.equal(INITIAL.noise(x, 0, 0), seeded)


@given(st.integers(0, 1000), st.integers(1, 6))
@settings(max_examples=20, deadline=None)
def test_noise_selection_takes_the_least_of_all(seed: int, candidates: int) -> None:
    x, delta = noise(2, seed=seed), SmallDelta(seed=seed)
    context = BatchContext("eps", seeds=[seed, seed + 1])
    best, before, after, chosen = noise_selection.adjust(x, delta, context, candidates=candidates)
    for image in range(2):
        every = [x[image], *(context.noise(x, image, k) for k in range(1, candidates))]
        sizes = [float(delta(one[None]).detach().norm()) for one in every]
        assert int(chosen[image]) == min(range(candidates), key=sizes.__getitem__)
        assert torch.equal(best[image], every[int(chosen[image])])
        assert math.isclose(before[image], sizes[0], rel_tol=1e-5) and math.isclose(
            after[image], min(sizes), rel_tol=1e-5
        )


@pytest.mark.parametrize("kind", ["eps", "v"])
def test_divin_is_one_langevin_step(kind: str) -> None:
    x, delta = noise(2).double(), SmallDelta().double()
    context = BatchContext(kind, alpha_bar=0.3, seeds=[1, 2])
    found, before = divin.adjust(x, delta, context, eta=0.05, temperature=0.6)
    for image in range(2):
        leaf = x[image : image + 1].clone().requires_grad_()

        def clean(out: Tensor, leaf: Tensor = leaf) -> Tensor:
            a, b = math.sqrt(0.3), math.sqrt(0.7)
            return a * leaf - b * out if kind == "v" else (leaf - b * out) / a

        unconditional = torch.randn(1, 4, 8, 8, dtype=torch.float64)
        energy = (clean(unconditional + delta(leaf)) - clean(unconditional)).square().sum()
        (gradient,) = torch.autograd.grad(energy, leaf)
        xi = context.noise(x, image, 0)
        expected = x[image] - 0.05 * (0.6 * gradient[0] + x[image]) + math.sqrt(0.1) * xi
        torch.testing.assert_close(found[image], expected)
        assert math.isclose(before[image], float(delta(leaf).detach().norm()), rel_tol=1e-9)


@given(st.integers(0, 1000), st.sampled_from(["eps", "v"]), st.floats(0.5, 0.95), st.integers(0, 2))
@settings(max_examples=15, deadline=None)
def test_sail_agrees_with_its_loss_and_adam(seed: int, kind: str, fraction: float, redraws: int) -> None:
    x, delta = noise(2, seed=seed).double(), SmallDelta(seed=seed).double()
    context = BatchContext(kind, alpha_bar=0.3, seeds=[seed, 7])

    def loss(leaf: Tensor) -> Tensor:
        d = delta(leaf[None])
        probed = delta(leaf[None] + d / d.norm())
        return (math.sqrt(0.3) if kind == "v" else 1.0) * probed.norm() + 0.05 * leaf.norm()

    target = fraction * float(loss(x[0]).detach())
    found = sail.adjust(x, delta, context, lr=0.05, alpha=0.05, target=target, max_steps=10, redraws=redraws)
    for image in range(2):
        best: Any = (None, 0, math.inf)
        taken = 0
        for attempt in range(redraws + 1):
            start = x[image] if attempt == 0 else context.noise(x, image, attempt)
            one = adam(loss, start, lr=0.05, target=target, most=10)
            taken += one[1]
            best = one if one[2] <= best[2] else best
            if one[2] < target:
                break
        torch.testing.assert_close(found.x[image], best[0], atol=1e-7, rtol=1e-7)
        assert int(found.steps[image]) == taken and bool(found.reached[image]) == (best[2] < target)


# The prompt's vectors


class Spoken:
    """Δ of images whose prompts are vectors: a `PromptedDelta`."""

    def __init__(self, images: int, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(3)
        self.every = [torch.randn(1 + image % 2, 5, 8, generator=generator).to(dtype) for image in range(images)]
        self.net = SmallDelta(dtype=dtype)
        self.asked: list[list[int]] = []

    @property
    def vectors(self) -> list[Tensor]:
        return self.every

    @property
    def fixed(self) -> list[int]:
        return [0]

    def __call__(self, x: Tensor) -> Tensor:
        return torch.cat([self.of(x[i], vectors) for i, vectors in enumerate(self.every)])

    def of(self, x: Tensor, vectors: Tensor) -> Tensor:
        hidden = self.net.first(x[None].to(vectors.dtype))
        said = torch.tanh(vectors).mean((0, 1)).reshape(1, -1, 1, 1)
        return self.net.second(torch.tanh(hidden + said)) - self.net.second(torch.tanh(hidden))

    def select(self, images: list[int]) -> Spoken:
        part = Spoken(0)
        part.net, part.every = self.net, [self.every[i] for i in images]
        return part

    def conditioned(self, x: Tensor) -> Callable[[list[Tensor], list[int]], Tensor]:
        def attended(vectors: list[Tensor], images: list[int]) -> Tensor:
            self.asked.append(images)
            return torch.cat([self.of(x[i], vector) for i, vector in zip(images, vectors)])

        return attended


@pytest.mark.parametrize("fraction", [0.6, 0.9])
def test_prompt_embedding_agrees_with_adamw_on_the_vectors(fraction: float) -> None:
    x, delta = noise(3).double(), Spoken(3, torch.float64)
    found = prompt_embedding.adjust(x, delta, lr=0.05, target=lambda before: fraction * before, max_steps=10)
    for image in range(3):
        start = delta.every[image]
        first = float(delta.of(x[image], start).detach().norm())

        def loss(leaf: Tensor, image: int = image) -> Tensor:
            # zeroed, not absent: the decay still takes hold of the start token
            held = torch.cat([leaf[:, :1].detach(), leaf[:, 1:]], dim=1)
            return delta.of(x[image], held).norm()

        expected, steps, _ = adam(loss, start, lr=0.05, target=fraction * first, most=10, decay=0.01)
        torch.testing.assert_close(found.vectors[image], expected, atol=1e-8, rtol=1e-8)
        assert int(found.steps[image]) == steps and math.isclose(found.before[image], first, rel_tol=1e-9)
    # those that have reached their target are not asked for again
    assert [len(images) for images in delta.asked] == sorted((len(images) for images in delta.asked), reverse=True)


def test_only_images_whose_vectors_moved_are_heard_otherwise() -> None:
    chosen = Settings(method="prompt_embedding", target=1e-6, target_kind="absolute", max_steps=0).resolved("sd1")
    outcome = run(noise(2), Spoken(2), chosen, INITIAL)
    assert outcome.prompts == {} and "was not reached in 0 steps" in outcome.notes[0][0]
    with pytest.raises(RuntimeError, match="vectors cannot be reached"):
        run(noise(1), SmallDelta(), chosen, INITIAL)


# Cross-attention


@pytest.mark.parametrize("masked", [True, False])
def test_attention_is_scaled_and_masked_on_its_rows_alone(masked: bool) -> None:
    torch.manual_seed(0)
    block = TransformerBlock(16, 12, 2).double()
    x, context = torch.randn(3, 9, 16).double(), torch.randn(3, 7, 12).double()
    rows = [Row(1.4, (0,), (0, 1, 2, 3) if masked else None), PLAIN, Row(1.4, (0,), (0, 1) if masked else None)]
    plain, itself = block.attn2(x, context), block.attn1(x)
    with scaled(block, rows):
        found = block.attn2(x, context=context)
        assert torch.equal(block.attn1(x), itself)
    assert torch.equal(found[1], plain[1])
    for row in (0, 2):
        q, k, v = (block.attn2.to_q(x[row]), block.attn2.to_k(context[row]), block.attn2.to_v(context[row]))
        kept = rows[row].kept
        heads = [
            attention(
                q[:, h : h + 8], k[:, h : h + 8], v[:, h : h + 8], c=1.4, heard=None if kept is None else len(kept)
            )
            for h in (0, 8)
        ]
        torch.testing.assert_close(found[row], block.attn2.to_out(torch.cat(heads, 1)))
    assert torch.equal(block.attn2(x, context), plain)


def test_every_chunk_s_start_is_scaled_behind_a_mask_too() -> None:
    torch.manual_seed(1)
    block = TransformerBlock(8, 8, 1).double()
    x, context = torch.randn(1, 3, 8).double(), torch.randn(1, 6, 8).double()
    with scaled(block, [Row(2.0, (0, 3), (0, 1, 3, 4))]):
        found = block.attn2(x, context=context)
    kept = context[0, [0, 1, 3, 4]]
    q, k, v = block.attn2.to_q(x[0]), block.attn2.to_k(kept), block.attn2.to_v(kept)
    k[[0, 2]] *= 2
    torch.testing.assert_close(found[0], block.attn2.to_out(attention(q, k, v)))


def small_unet() -> UNet:
    return UNet(
        in_channels=4, out_channels=4, model_channels=32, attention_resolutions=[1], num_res_blocks=1, channel_mult=[1],
        num_heads=2, context_dim=16,
    )  # fmt: skip


def test_attention_is_as_it_was_whatever_happens() -> None:
    unet = small_unet().eval()
    before = {name: dict(module.__dict__) for name, module in unet.named_modules()}
    x, t, context = torch.randn(2, 4, 8, 8), torch.full((2,), 500.0), torch.randn(2, 7, 16)

    with pytest.raises(ZeroDivisionError), scaled(unet, [PLAIN, Row(2.0, (0,))]):
        unet(x, t, context)
        raise ZeroDivisionError
    with pytest.raises(RuntimeError, match="changed the batch"), scaled(unet, [Row(2.0, (0,))]):
        unet(x, t, context)
    with pytest.raises(RuntimeError, match="without its cross-attention"), scaled(unet, [Row(2.0, (0,))]):
        pass
    with pytest.raises(RuntimeError, match="no cross-attention"), scaled(torch.nn.Linear(1, 1), [PLAIN]):
        pass
    assert {name: dict(module.__dict__) for name, module in unet.named_modules()} == before
    assert not any(module.to_k._forward_hooks for module in cross_attentions(unet))  # type: ignore[union-attr]


def test_a_scale_of_one_changes_no_bit() -> None:
    unet = small_unet().eval()
    x, t, context = torch.randn(2, 4, 8, 8), torch.full((2,), 500.0), torch.randn(2, 7, 16)
    with torch.no_grad():
        plain = unet(x, t, context)
        with scaled(unet, [Row(1.0, (0,)), PLAIN]):
            assert torch.equal(unet(x, t, context), plain)
        with scaled(unet, [Row(1.3, (0,)), PLAIN]):
            other = unet(x, t, context)
    assert torch.equal(other[1], plain[1]) and not torch.equal(other[0], plain[0])


# Settings


def test_transition_points_need_guidance_that_starts_later() -> None:
    for method in ("static", "dynamic", "opposite_guidance"):
        with pytest.raises(SettingError, match=f'guidance = "first" leaves the method {method} nothing to do'):
            from_mapping({"method": method, "guidance": "first"})
        assert from_mapping({"method": method, "guidance": "tau", "tau": 800}).start == "tau"
    assert Settings(method="opposite_guidance").resolved("sd1").opposite == 5
    assert Settings(method="dynamic").resolved("sd1").opposite == 0


def test_a_preset_has_numbers_of_a_method_s_own() -> None:
    found = Settings(method="prompt_embedding").resolved("sd1")
    assert (found.lr, found.target, found.max_steps) == (0.05, 1.581, 10)
    assert Settings(method="per_sample").resolved("sd1").target == 0.9
    sail_v = Settings(method="sail").resolved("sd2_v")
    assert (sail_v.alpha, sail_v.target, sail_v.target_kind) == (0.01, 0.5, "fraction")
    calibrated = {"threshold": 2.0, "gamma": 1.0, "target": 3.0, "target_kind": "absolute"}
    assert Settings(method="sail", preset="calibrated").resolved("sd1", calibrated).target == 0.5
    assert Settings(method="prompt_embedding", preset="calibrated").resolved("sd1", calibrated).target == 3.0


def test_images_that_failed_are_not_heard_otherwise() -> None:
    x = noise(2)
    x[0] = math.nan
    outcome: Outcome = run(x, SmallDelta(), Settings(method="padding_fix").resolved("sd1"), INITIAL)
    assert outcome.prompts == {1: Prompt(pad_zero=True, zero_end=True)} and 0 in outcome.failed
    assert float(magnitude(select(SmallDelta(), [1])(outcome.x[1:])).detach()) > 0
