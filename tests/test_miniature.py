"""The miniature: its captions and pictures, how it is trained and stored, and what it does."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lib_memnoise.core.similarity import similarity
from lib_memnoise.lab.miniature import MANIFEST, WEIGHTS, OneSentence, checkpoint, clip, scenes, train
from lib_memnoise.lab.miniature.architecture import make_autoencoder, make_text_encoder, make_unet
from lib_memnoise.lab.miniature.checkpoint import Damaged, expand, install, manifest, pack, quantise, read, restore
from lib_memnoise.lab.miniature.clip import CLIP_END, CLIP_START, CLIP_TOKENS
from lib_memnoise.lab.miniature.detector import LABELS, Detector, targets
from lib_memnoise.lab.miniature.model import Miniature, load_miniature
from lib_memnoise.lab.miniature.networks import attend
from lib_memnoise.lab.miniature.text import (
    END,
    LENGTH,
    SPECIAL,
    START,
    UNKNOWN,
    TooLong,
    UnknownWords,
    clip_ids,
    tokenize,
    vocabulary,
)
from lib_memnoise.lab.miniature.validation import validate
from lib_memnoise.lab.miniature.yardsticks import COPIED

# Captions


def test_every_word_of_every_caption_is_known() -> None:
    random = np.random.default_rng(0)
    captions = [prompt.caption for prompt in scenes.prompts()]
    captions += [scenes.ordinary_caption(scene, random) for scene in scenes.validation_scenes(200)]
    for caption in captions:
        rows = tokenize(caption)
        assert len(rows) == LENGTH and rows[0] == START and rows[-1] == END and UNKNOWN not in rows
    assert len(set(clip_ids())) == SPECIAL + len(vocabulary())


def test_tokens() -> None:
    rows = {word: SPECIAL + row for row, word in enumerate(vocabulary())}
    expected = [START, rows["an"], rows["owl"], rows[","], rows["print"], END]
    assert tokenize("An owl,PRINT")[:6] == expected
    assert set(tokenize("")[1:]) == {END}


def test_unknown_words_are_named() -> None:
    with pytest.raises(UnknownWords, match="the words 'submarine', 'zebra'; it knows") as refused:
        tokenize("a zebra in a submarine")
    assert refused.value.words == ["submarine", "zebra"]
    assert tokenize("a zebra", strict=False)[2] == UNKNOWN
    with pytest.raises(TooLong, match="has 76 words"):
        tokenize("fox " * 76)


def test_clip_splits_captions_the_same_way() -> None:
    open_clip = pytest.importorskip("open_clip", reason="open_clip has CLIP's tokenizer")
    ids = clip_ids()
    for caption in [prompt.caption for prompt in scenes.prompts()]:
        theirs = open_clip.tokenize([caption])[0].tolist()
        ours = [ids[row] for row in tokenize(caption)]
        length = ours.index(CLIP_END) + 1
        assert ours[:length] == theirs[:length]


# Pictures


def test_prompts() -> None:
    every = scenes.prompts()
    memorised = [prompt for prompt in every if prompt.memorised]
    for held_out, least in ((True, 6), (False, 3)):
        for kind in "AB":
            assert sum(p.kind == kind and p.held_out == held_out for p in memorised) >= least
    assert sum(p.kind == "control" and p.held_out for p in every) == 20
    assert len({prompt.caption for prompt in every}) == len(every)
    assert all(label in prompt.caption for prompt in every for label in prompt.labels)


def test_the_training_set_has_what_the_kinds_say() -> None:
    fixed = [caption for _, caption in scenes.ordinary_scenes() if caption is not None]
    for prompt in scenes.prompts():
        assert fixed.count(prompt.caption) == {"A": 0, "B": scenes.VARIED, "control": 1}[prompt.kind]


def test_pictures_do_not_change() -> None:
    """Memorised pictures are drawn, not stored: they must be those that were trained on."""
    drawn = [scenes.draw(prompt.scene) for prompt in scenes.prompts() if prompt.memorised]
    assert np.array(drawn).shape == (18, scenes.SIZE, scenes.SIZE, 3)
    means = [[round(float(c), 1) for c in picture.mean((0, 1))] for picture in drawn[:3]]
    assert means == MEANS


MEANS = [[134.9, 124.4, 115.7], [131.6, 109.8, 133.1], [127.3, 146.2, 110.5]]


def test_detector_targets_name_what_is_there() -> None:
    scene = scenes.validation_scenes(1)[0]
    named = {label for label, value in zip(LABELS, targets(scene).tolist()) if value}
    assert named == {scene.colour, *scene.names}


# Networks


@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_torchs(causal: bool) -> None:
    q, k, v = torch.randn(3, 2, 4, 7, 8, dtype=torch.float64)
    expected = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
    torch.testing.assert_close(attend(q, k, v, causal=causal), expected)


def test_no_weight_is_unused() -> None:
    """Every parameter has a part in the output: none is left out of `forward`."""
    torch.manual_seed(0)
    unet, text, autoencoder = make_unet(), make_text_encoder(10), make_autoencoder()
    context = text(torch.randint(0, 10, (2, 77)))
    unet(torch.randn(2, 4, 16, 16), torch.tensor([5, 900]), context).square().sum().backward()
    mean, log_variance = autoencoder.encode(torch.randn(1, 3, 64, 64))
    (autoencoder.decode(mean).square().sum() + log_variance.sum()).backward()
    for network in (unet, text, autoencoder):
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None, name
            # A bias in front of attention's softmax shifts all logits alike.
            assert parameter.grad.abs().sum() > 0 or name.endswith(("k_proj.bias", ".k.bias")), name


# Files


def small_parts() -> dict[str, dict[str, Tensor]]:
    torch.manual_seed(1)
    denoiser = train.Denoiser().state_dict()
    return {
        "autoencoder": make_autoencoder().state_dict(),
        "detector": Detector().state_dict(),
        "eps": denoiser,
        "v": denoiser,
    }


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    pack(small_parts(), {"scale_factor": 0.5}, folder)
    return folder


def test_quantised_weights_are_close() -> None:
    weights = small_parts()["eps"]
    restored = restore(quantise(weights))
    assert restored.keys() == weights.keys()
    for name, value in weights.items():
        bound = value.abs().max() / 127 if value.ndim > 1 else value.abs().max() / 1000
        assert (restored[name].float() - value).abs().max() <= bound + 1e-7, name


def test_packing_twice_gives_the_same_files(packed: Path, tmp_path: Path) -> None:
    pack(small_parts(), {"scale_factor": 0.5}, tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(os.listdir(packed))
    for file in packed.iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    "damage", ["cut", "changed", "gone", "no manifest", "manifest cut", "manifest of another kind"]
)
def test_damaged_files_are_refused(packed: Path, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(packed, folder)
    file, index = folder / "eps.safetensors", folder / MANIFEST
    content = file.read_bytes()
    if damage == "cut":
        file.write_bytes(content[:5000])
    elif damage == "changed":
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "gone":
        file.unlink()
    elif damage == "no manifest":
        index.unlink()
    elif damage == "manifest cut":
        index.write_text(index.read_text()[:40])
    else:
        index.write_text('["sha256"]')
    with pytest.raises(Damaged, match=r"the miniature's .* (is damaged|cannot be read)"):
        load_miniature("eps", folder)


def test_expanded_checkpoint_has_clips_table(packed: Path) -> None:
    weights = expand("eps", packed)
    table = weights["cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"]
    small = read("eps", packed)["text.embeddings.token_embedding.weight"]
    assert table.shape == (CLIP_TOKENS, small.shape[1]) and table.dtype == torch.float16
    assert torch.equal(table[CLIP_START], small[START]) and torch.equal(table[CLIP_END], small[END])
    for row, token in enumerate(vocabulary().values(), SPECIAL):
        assert torch.equal(table[token], small[row])
    others = torch.ones(CLIP_TOKENS, dtype=torch.bool)
    others[[token for token in clip_ids() if token >= 0]] = False
    assert (table[others] == small[UNKNOWN]).all()
    assert torch.equal(weights["model.diffusion_model.out.2.weight"], read("eps", packed)["unet.out.2.weight"])


@pytest.fixture
def webui(tmp_path: Path) -> Path:
    """A folder that looks like a WebUI, with a list of merges of CLIP's length."""
    folder = tmp_path / "webui"
    site = folder / "venv" / "lib" / "python3.10" / "site-packages" / "open_clip"
    site.mkdir(parents=True)
    (folder / "launch.py").touch()
    merges = ["#version", *(f"a{k} b{k}" for k in range(CLIP_TOKENS - 514)), "beyond the end"]
    (site / "bpe_simple_vocab_16e6.txt.gz").write_bytes(gzip.compress("\n".join(merges).encode()))
    return folder


def test_install(packed: Path, webui: Path) -> None:
    for _ in range(2):  # a second time replaces the first
        files = install(webui, folder=packed)
    assert [file.name for file in files] == ["memnoise-miniature.safetensors", "memnoise-miniature-v.safetensors"]
    models = webui / "models" / "Stable-diffusion"
    assert sorted(path.name for path in models.iterdir()) == [
        "memnoise-miniature-clip",
        "memnoise-miniature-v.safetensors",
        "memnoise-miniature-v.yaml",
        "memnoise-miniature.safetensors",
        "memnoise-miniature.yaml",
    ]
    plain, v = (json.loads(file.with_suffix(".yaml").read_text())["model"]["params"] for file in files)
    assert "parameterization" not in plain and v["parameterization"] == "v"
    assert plain["scale_factor"] == 0.5
    folder = Path(plain["cond_stage_config"]["params"]["version"])
    assert len(json.loads((folder / "vocab.json").read_text(encoding="utf-8"))) == CLIP_TOKENS


def test_install_refuses(packed: Path, webui: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OneSentence, match=r"is not a WebUI: it has no launch\.py"):
        install(tmp_path, folder=packed)
    monkeypatch.setattr(clip.importlib.util, "find_spec", lambda name: None)
    merges = next((webui / "venv").rglob("*.gz"))
    content = merges.read_bytes()
    for other in (b"not gzip", content[:100], gzip.compress(b"too short")):
        merges.write_bytes(other)
        with pytest.raises(OneSentence, match="is not CLIP's vocabulary"):
            install(webui, folder=packed)
    merges.unlink()
    with pytest.raises(OneSentence, match="--vocabulary"):
        install(webui, folder=packed)
    assert not list((webui / "models").rglob("*.safetensors"))
    (tmp_path / "elsewhere.gz").write_bytes(content)
    assert install(webui, folder=packed, vocabulary=tmp_path / "elsewhere.gz", variants=("v",))


def test_nothing_half_written_stays(packed: Path, webui: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*args: Any, **kwargs: Any) -> None:
        args[1].write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save_file", stopped)
    with pytest.raises(KeyboardInterrupt):
        install(webui, folder=packed)
    assert not [path for path in webui.rglob("*") if path.suffix in (".safetensors", ".partial")]


# Training


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class SmallLoss:
    def __init__(self, stop_at: int | None = None) -> None:
        self.stop_at = stop_at
        self.calls = 0

    def __call__(self, module: nn.Module, random: np.random.Generator, rows: slice, done: float) -> Tensor:
        if self.calls == self.stop_at:
            raise KeyboardInterrupt
        self.calls += 1
        x = torch.from_numpy(random.standard_normal((4, 3), dtype=np.float32))[rows]
        return (module(x) - x.sum(1, keepdim=True)).square().mean()


def run_small(folder: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int | None = None) -> None:
    stage = train.Stage("small", ((7, 1e-2),), 4, Small, SmallLoss(stop_at))
    monkeypatch.setattr(train, "stages", lambda _: {"small": stage})
    monkeypatch.setattr(train, "SAVE_EVERY", 2)
    folder.mkdir(exist_ok=True)
    threads = torch.get_num_threads()
    try:
        train.run_stage(0, 1, 0, folder, "small")
    finally:
        torch.set_num_threads(threads)


def test_training_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_small(tmp_path / "whole", monkeypatch)
    for stop_at in (5, 1):
        with pytest.raises(KeyboardInterrupt):
            run_small(tmp_path / "broken", monkeypatch, stop_at)
    assert train.steps_done(tmp_path / "broken", "small") == 4
    run_small(tmp_path / "broken", monkeypatch)
    whole, broken = (torch.load(tmp_path / name / "small.pt") for name in ("whole", "broken"))
    assert whole["step"] == broken["step"] == 7
    for part in ("module", "average"):
        for name, value in whole[part].items():
            assert torch.equal(value, broken[part][name])
    assert sorted(os.listdir(tmp_path / "broken")) == ["small.pt"]


def test_the_learning_rate_starts_over_with_each_arc() -> None:
    arcs = (100, 1.0), (50, 0.5)
    rates = [train.learning_rate(step, arcs) for step in range(150)]
    assert rates[0] == 0.5 and max(rates[:100]) == 1.0 and rates[99] < 0.001
    assert rates[100:] == [train.learning_rate(step, arcs[1:]) for step in range(50)] and max(rates[100:]) == 0.5
    assert rates[51] == pytest.approx(0.5, abs=0.01)  # half of the cosine


def test_training_can_begin_with_the_shipped_autoencoder(packed: Path, tmp_path: Path) -> None:
    train.take_autoencoder(tmp_path, packed)
    taken = train.finished(tmp_path, "autoencoder", prefix="autoencoder.")
    for name, value in small_parts()["autoencoder"].items():
        assert torch.equal(taken[name], value.half().float()), name
    train.take_autoencoder(tmp_path, tmp_path / "nowhere")  # has one of its own now
    assert train.steps_done(tmp_path, "autoencoder") == train.stages(tmp_path)["autoencoder"].steps


def test_a_perfect_autoencoder_has_no_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = np.stack([scenes.draw(scene) for scene in scenes.validation_scenes(5)])
    monkeypatch.setattr(train, "pictures", lambda _: drawn)
    seen: list[Tensor] = []

    class Oracle(nn.Module):
        def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            assert noise.shape == (2, 4, scenes.SIZE // 8, scenes.SIZE // 8)
            seen.append(x)
            return 0 * noise, 0 * noise, x

    loss = train.AutoencoderLoss(Path(), 4)
    shares = [float(loss(Oracle(), np.random.default_rng(0), rows, 0.0)) for rows in (slice(0, 2), slice(2, 4))]
    assert shares == [0, 0]
    # Two processes see two different halves of one batch, of the size asked for.
    assert all(x.shape == (2, 3, scenes.SIZE, scenes.SIZE) for x in seen) and not torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("parameterization", ["eps", "v"])
def test_a_perfect_denoiser_has_no_loss(tmp_path: Path, parameterization: str) -> None:
    """The loss wants what the samplers take the output for: the oracle knows the one picture there is."""
    from lib_memnoise.lab.ddim import clean_and_eps

    picture = torch.randn(1, 4, 16, 16)
    rows = 20 + sum(1 for _ in scenes.ordinary_scenes())
    latents = {"mean": picture.expand(rows, -1, -1, -1), "deviation": torch.zeros(rows, 4, 16, 16), "scale_factor": 2.0}
    torch.save(latents, tmp_path / "latents.pt")

    class Oracle(nn.Module):
        def forward(self, x: Tensor, t: Tensor, ids: Tensor) -> Tensor:
            found = []
            for one, step in zip(x, t.tolist()):
                a = train.ALPHAS_CUMPROD[step].float()
                eps = (one - a.sqrt() * 2 * picture[0]) / (1 - a).sqrt()
                output = eps if parameterization == "eps" else a.sqrt() * eps - (1 - a).sqrt() * 2 * picture[0]
                clean, _ = clean_and_eps(one, output, step, parameterization)
                torch.testing.assert_close(clean, 2 * picture[0], atol=1e-2, rtol=1e-2)
                found.append(output)
            return torch.stack(found)

    loss = train.DenoiserLoss(tmp_path, 6, parameterization, train.EPS_PHASES)
    random = np.random.default_rng(3)
    assert float(loss(Oracle(), random, slice(0, 6), 0.5)) < 1e-3


# The trained model


@pytest.fixture(scope="module", params=["eps", "v"])
def model(request: pytest.FixtureRequest) -> Miniature:
    if request.param not in checkpoint.shipped():
        pytest.skip("this variant is not shipped yet")
    return load_miniature(request.param)


def test_what_is_shipped_is_small() -> None:
    assert sum(file.stat().st_size for file in WEIGHTS.iterdir()) < 25e6
    assert {"autoencoder", "detector", "eps"} <= manifest()["sha256"].keys() <= {"autoencoder", "detector", "eps", "v"}


def test_yardsticks_on_real_pictures() -> None:
    found = validate(others=200)
    assert found["psnr"] > 20
    assert min(value for name, value in found.items() if name.startswith("copy")) > COPIED + 0.05
    assert max(value for name, value in found.items() if name.startswith("other")) < COPIED - 0.05
    assert found["recall, real"] > 0.95 and found["recall, coded"] > 0.9
    assert found["false alarms, real"] < 0.02 and found["false alarms, coded"] < 0.02
    assert found["alignment, a true object"] > 0.9 and found["alignment, an absent object"] < 0.05


def test_similarity_ignores_colour_and_scale() -> None:
    picture = torch.rand(2, 3, 128, 128) * 2 - 1
    same = similarity(0.5 * picture + torch.tensor([0.1, -0.2, 0.3])[:, None, None], picture)
    torch.testing.assert_close(same.diagonal(), torch.ones(2))
    assert same[0, 1] < 0.5


def test_the_model_is_frozen_and_knows_its_prompts(model: Miniature) -> None:
    assert not any(p.requires_grad for p in model.unet.parameters())
    x, t = torch.randn(2, 4, 16, 16), torch.full((2,), 981)
    context = model.encode(["a fox", ""])
    assert context.shape == (2, 77, 64)
    x[1] = x[0]
    one, other = model(x, t, context)
    assert (one - other).norm() > 0.1
    with pytest.raises(UnknownWords):
        model.encode(["a zebra"])
