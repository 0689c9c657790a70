"""The metrics' own libraries, with random weights made here: what they are given is what the paper gives them.

They are optional, and skipped where they are missing or do not load beside the torch that is installed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from lib_memnoise.core.similarity import thumbnails
from lib_memnoise.lab.evaluation import metrics
from lib_memnoise.lab.evaluation.metrics import Options
from lib_memnoise.lab.evaluation.prompts import Prompt


def library(name: str) -> Any:
    """A library, or a skip: torchvision, which two of them need, does not load beside every torch."""
    try:
        return pytest.importorskip(name, exc_type=ImportError)
    except (RuntimeError, OSError, AttributeError) as error:
        pytest.skip(f"{name} does not load: {error}")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def picture(seed: int, size: tuple[int, int] = (96, 64)) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
    return Image.fromarray(values).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def prompt(tmp_path: Path) -> Prompt:
    """Its training pictures are of seeds 1 and 2, and of shapes of their own."""
    names = []
    for seed, size in ((1, (96, 64)), (2, (40, 200))):
        path = tmp_path / f"{seed}.png"
        picture(seed, size).save(path)
        names.append(str(path))
    return Prompt("a fox in the snow", "1", "VM", tuple(names))


class Descriptor(nn.Module):
    """As SSCD: a picture to 512 numbers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 7, 5), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(),
                                    nn.Linear(128, 512))  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def torchscript(folder: Path) -> Path:
    path = folder / "sscd.pt"
    torch.jit.trace(Descriptor().eval(), torch.zeros(1, 3, 320, 320)).save(str(path))
    return path


def onnx(folder: Path) -> Path:
    """The same network, as nodes, so that no exporter is needed."""
    onnx = library("onnx")
    library("onnxruntime")
    make, numpy_helper = onnx.helper, onnx.numpy_helper
    network = Descriptor().layers
    weights = {name: value.detach().numpy() for name, value in network.named_parameters()}
    pool = np.zeros((128, 8 * 63 * 63), dtype=np.float32)  # its adaptive pooling, written as a matrix
    with torch.no_grad():
        basis = torch.eye(63 * 63).reshape(-1, 1, 63, 63)
        per_channel = network[2](basis).reshape(63 * 63, 16).T.numpy()
    for channel in range(8):
        pool[16 * channel : 16 * (channel + 1), 63 * 63 * channel : 63 * 63 * (channel + 1)] = per_channel
    tensors = {"w": weights["0.weight"], "b": weights["0.bias"], "p": pool.T, "v": weights["4.weight"].T,
               "c": weights["4.bias"]}  # fmt: skip
    nodes = [
        make.make_node("Conv", ["x", "w", "b"], ["h"], strides=[5, 5]),
        make.make_node("Relu", ["h"], ["r"]),
        make.make_node("Flatten", ["r"], ["f"]),
        make.make_node("MatMul", ["f", "p"], ["m"]),
        make.make_node("MatMul", ["m", "v"], ["d"]),
        make.make_node("Add", ["d", "c"], ["y"]),
    ]
    value = make.make_tensor_value_info
    graph = make.make_graph(
        nodes, "sscd",
        [value("x", onnx.TensorProto.FLOAT, ["n", 3, 320, 320])], [value("y", onnx.TensorProto.FLOAT, ["n", 512])],
        [numpy_helper.from_array(np.ascontiguousarray(array), name) for name, array in tensors.items()],
    )  # fmt: skip
    path = folder / "sscd.onnx"
    model = make.make_model(graph, opset_imports=[make.make_opsetid("", 13)])
    model.ir_version = 8
    onnx.save(model, str(path))
    return path


def of_the_paper(image: Image.Image) -> Tensor:
    """Squashed to 320×320 and normalised as for ImageNet, written out."""
    small = np.asarray(image.convert("RGB").resize((320, 320), Image.Resampling.BILINEAR), dtype=np.float32) / 255
    normal = (small - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    return torch.from_numpy(normal.transpose(2, 0, 1)).float()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", [torchscript, onnx])
def test_sscd(tmp_path: Path, prompt: Prompt, kind: Any) -> None:
    measure = metrics.sscd(Options(sscd=kind(tmp_path)))
    found = measure([picture(1), picture(5)], prompt)
    network = Descriptor().eval()

    def descriptor(image: Image.Image) -> Tensor:
        with torch.no_grad():
            return network(of_the_paper(image)[None])[0]

    training = [Image.open(name) for name in prompt.references]
    expected = [
        max(float(torch.cosine_similarity(descriptor(image), descriptor(each), dim=0)) for each in training)
        for image in (picture(1), picture(5))
    ]
    assert found == pytest.approx(expected, abs=1e-5)
    assert found[0] == pytest.approx(1, abs=1e-5) and found[1] < 0.9999  # the greatest over the training pictures
    assert kind(tmp_path).name in measure.source
    assert isinstance(measure, metrics.Nearest)
    assert measure.both([picture(1)], Prompt("no training picture"))[1] == [None]


def test_the_nearest_of_all_training_pictures(prompt: Prompt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks or none, each is looked at once, and the prompt's own is never nearer than the nearest."""
    monkeypatch.setattr(metrics, "BLOCK", 2)
    monkeypatch.setattr(metrics, "LOOKED_AT", 3)
    names = [*prompt.references]
    for seed in range(3, 8):
        picture(seed).save(tmp_path / f"{seed}.png")
        names.append(str(tmp_path / f"{seed}.png"))
    opened = []
    monkeypatch.setattr(metrics, "training_picture", lambda name: opened.append(name) or Image.open(name))
    measure = metrics.similarity(Options(references=tuple(reversed(names))))
    assert isinstance(measure, metrics.Nearest)
    made = [picture(seed) for seed in (1, 5, 20, 2)]
    every, own = measure.both(made, prompt)
    assert measure.both(made, prompt) == (every, own) and sorted(opened) == sorted(names)
    thumbs = [thumbnails(metrics.tensor([each])) for each in made]
    known = torch.cat([thumbnails(metrics.tensor([Image.open(name)])) for name in names])
    expected = torch.cat([each @ known.T for each in thumbs])
    assert every == pytest.approx(expected.max(1).values.tolist(), abs=1e-6)
    assert own == pytest.approx(expected[:, :2].max(1).values.tolist(), abs=1e-6)
    assert every is not None and all(a >= b for a, b in zip(every, own))  # type: ignore[operator]
    assert own[1] < 0.9 < every[1] and own[0] == every[0]  # type: ignore[operator]
    assert measure.both(made, Prompt("none of its own"))[1] == [None] * 4


def test_bad_onnx_files(tmp_path: Path) -> None:
    library("onnxruntime")
    (tmp_path / "x.onnx").write_bytes(b"nothing")
    with pytest.raises(metrics.Unavailable, match=r"x\.onnx is no ONNX file"):
        metrics.sscd(Options(sscd=tmp_path / "x.onnx"))


def test_preprocessing_is_torchvisions() -> None:
    """What SSCD's authors and the paper use."""
    transforms = library("torchvision.transforms")
    theirs = transforms.Compose([
        transforms.Resize((320, 320)), transforms.ToTensor(),
        transforms.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]),
    ])  # fmt: skip
    images = [picture(1), picture(2, (500, 340))]
    torch.testing.assert_close(metrics.squashed(images, 320), torch.stack([theirs(x) for x in images]))


def test_clip(tmp_path: Path, prompt: Prompt) -> None:
    open_clip = library("open_clip")
    torch.manual_seed(0)
    network, _, preprocess = open_clip.create_model_and_transforms("ViT-B-32", pretrained=None)
    network.eval()
    weights = tmp_path / "clip.pt"
    torch.save(network.state_dict(), weights)
    measure = metrics.METRICS["clip"].make(Options(clip=str(weights)))
    images = [picture(1), picture(5, (64, 96))]
    found = measure(images, prompt)
    with torch.no_grad():
        text = network.encode_text(open_clip.get_tokenizer("ViT-B-32")([prompt.caption]))
        each = [network.encode_image(preprocess(image)[None]) for image in images]
    assert found == pytest.approx([float(torch.cosine_similarity(image, text)) for image in each], abs=1e-5)
    assert found[0] != found[1] and "clip.pt" in measure.source


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_lpips(tmp_path: Path, prompt: Prompt) -> None:
    lpips = library("lpips")
    torchvision = library("torchvision")
    torch.manual_seed(0)
    weights = tmp_path / "alexnet.pth"
    alexnet = torchvision.models.alexnet(weights=None)
    torch.save(alexnet.state_dict(), weights)
    images = [picture(k) for k in range(4)]
    measure = metrics.METRICS["lpips"].make(Options(lpips=weights))
    found = measure(images, prompt)
    # lpips' own network, with the same AlexNet in it
    network = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).eval()
    state = alexnet.state_dict()
    for name, parameter in network.net.named_parameters():
        parameter.data.copy_(state["features." + name.split(".", 1)[1]])
    same = [lpips.im2tensor(np.asarray(image)) for image in images]
    with torch.no_grad():
        pairs = {(i, j): float(network(same[i], same[j])) for i in range(4) for j in range(4) if i != j}
    expected = [np.mean([pairs[i, j] for j in range(4) if j != i]) for i in range(4)]
    assert found == pytest.approx(expected, abs=1e-4)
    # so that the mean over images is the paper's, over all pairs
    assert np.mean(found) == pytest.approx(np.mean([pairs[i, j] for i in range(4) for j in range(i)]), abs=1e-4)
    assert measure(images[:1], prompt) == [None] and "alexnet.pth" in measure.source


def test_lpips_of_a_file_that_is_none(tmp_path: Path) -> None:
    library("lpips")
    with pytest.raises(metrics.Unavailable, match="is no file"):
        metrics.lpips(Options(lpips=tmp_path / "x.pth"))


def test_similarity_needs_no_weights(prompt: Prompt) -> None:
    found = metrics.similarity(Options())([picture(1), picture(5)], prompt)
    assert found[0] == pytest.approx(1) and found[1] < 0.9


def test_diversity_is_of_pairs() -> None:
    measure = metrics.diversity(Options())
    same, other = picture(1), picture(5)
    a, b, c = measure([same, same, other], Prompt("a"))
    assert a == b < c and measure([same, same], Prompt("a")) == pytest.approx([0, 0], abs=1e-6)


def test_alignment_is_the_detectors() -> None:
    from lib_memnoise.lab.miniature.scenes import draw, prompts

    scene = next(prompt for prompt in prompts() if prompt.memorised)
    other = next(
        prompt for prompt in prompts() if prompt.memorised and not set(prompt.scene.names) & set(scene.scene.names)
    )
    measure = metrics.METRICS["alignment"].make(Options())
    good, bad = measure([Image.fromarray(draw(each.scene)) for each in (scene, other)], Prompt(scene.caption))
    assert good > 0.9 > 0.5 > bad
    assert measure([picture(1)], Prompt(scene.caption)) == [None]  # of its own size alone
