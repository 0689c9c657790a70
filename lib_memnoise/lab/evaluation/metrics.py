"""What is measured of the images, by the libraries that the field uses, as the paper computes it.

Every metric gives a value an image. One that compares the images of a prompt (LPIPS, diversity) gives each image the
mean of its comparisons, so that the mean over images is that over pairs.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from lib_memnoise.lab.evaluation.prompts import MINIATURE, Prompt
from lib_memnoise.lab.evaluation.run import NEAREST, Run, columns_of

Pictures = Sequence[Image.Image]
Values = Sequence[float | None]
"""None: the metric has nothing to say of the image."""


class Unavailable(Exception):
    """A metric that cannot be had, and why: a clause."""


class Measure(Protocol):
    @property
    def source(self) -> str:
        """The weights it measures with."""

    def __call__(self, pictures: Pictures, prompt: Prompt) -> Values: ...


@dataclass(frozen=True)
class Options:
    """Where weights are, by the metrics' names, and where they run."""

    sscd: Path | None = None
    """TorchScript (.pt) or ONNX file of `sscd_disc_mixup`."""
    clip: str = "laion2b_s34b_b79k"
    """A file of weights, or the name of those that open_clip downloads."""
    lpips: Path | None = None
    """AlexNet's weights; None: torchvision downloads them."""
    imagereward: str = "ImageReward-v1.0"
    """A file, or the name of what the library downloads."""
    device: str = "cpu"
    references: tuple[str, ...] = ()
    """All training pictures, as `Prompt.references` names them."""


@dataclass(frozen=True)
class Metric:
    """What a metric stands for in the figures."""

    label: str
    role: str
    """"copy": likeness to the training picture; "alignment", "diversity", "quality"."""
    lower_is_better: bool
    make: Callable[[Options], Measure]
    of_the_paper: bool = False
    """Of copying: the paper measures it, of the prompt's own training pictures, and its figures are drawn of these."""


def squashed(pictures: Pictures, size: int) -> Tensor:
    """`(B, 3, size, size)`, resized without regard to shape and normalised as for ImageNet."""
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    arrays = [
        (np.asarray(picture.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)) / 255.0 - mean) / deviation
        for picture in pictures
    ]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float()


def training_picture(name: str) -> Image.Image:
    """A training picture, by its name in `Prompt.references`.

    Raises:
        OSError: it cannot be read.
    """
    if name.startswith(f"{MINIATURE}:"):
        from lib_memnoise.lab.experiment import references as memorised

        return Image.fromarray(memorised()[int(name.partition(":")[2])])
    with Image.open(name) as picture:
        return picture.convert("RGB")


def digest(path: Path) -> str:
    """A file by its name and the beginning of its SHA-256."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return f"{path.name} {found.hexdigest()[:12]}"


class Nearest:
    """The greatest likeness to a training picture: of the prompt's own (the paper: SSCD, cosine, maximum), and of all.

    Each training picture's features are computed once; likeness is a product of matrices, a block of pictures at once.
    """

    def __init__(self, source: str, features: Callable[[Pictures], Tensor], references: Sequence[str] = ()) -> None:
        self.source = source
        self._features = features
        self._references = references
        self._rows: dict[str, int] = {}
        self._known: list[Tensor] = []
        """Blocks of features, `(≤ BLOCK, d)`, by row."""
        self.unread: OSError | None = None
        """Why not all training pictures are known."""

    def __call__(self, pictures: Pictures, prompt: Prompt) -> Values:
        """Of all training pictures."""
        return self.both(pictures, prompt)[0] or [None] * len(pictures)

    def both(self, pictures: Pictures, prompt: Prompt) -> tuple[Values | None, Values]:
        """Of all training pictures (None: one of them cannot be read), and of the prompt's own.

        Raises:
            OSError: one of the prompt's own cannot be read.
        """
        own = self._look_at(prompt.references)
        if self.unread is None:
            try:
                self._look_at(self._references)
            except OSError as error:
                self.unread = error
        nothing: Values = [None] * len(pictures)
        if not self._rows:
            return (nothing if self.unread is None else None), nothing
        features = normalised(self._features(pictures))
        nearest, nearest_own = torch.full((2, len(pictures)), -torch.inf)
        start = 0
        for block in self._known:
            # The same product for both, or rounding could make the one less than the other.
            likeness = features @ block.T
            nearest = torch.maximum(nearest, likeness.max(1).values)
            mine = [row - start for row in own if start <= row < start + len(block)]
            if mine:
                nearest_own = torch.maximum(nearest_own, likeness[:, mine].max(1).values)
            start += len(block)
        return None if self.unread is not None else nearest.tolist(), nearest_own.tolist() if own else nothing

    def _look_at(self, names: Sequence[str]) -> list[int]:
        """The rows of these training pictures; what is not known yet of them is computed.

        Raises:
            OSError: one cannot be read.
        """
        new = [name for name in dict.fromkeys(names) if name not in self._rows]
        for start in range(0, len(new), LOOKED_AT):
            some = new[start : start + LOOKED_AT]
            self._known.append(normalised(self._features([training_picture(name) for name in some])))
            self._rows |= {name: len(self._rows) + k for k, name in enumerate(some)}
        if new:
            self._known = list(torch.cat(self._known).split(BLOCK))
        return [self._rows[name] for name in names]


LOOKED_AT, BLOCK = 16, 4096
"""Training pictures whose features are computed at once, and whose likeness is."""
MANY = 500
"""Training pictures that are worth a word."""


def normalised(features: Tensor) -> Tensor:
    return torch.nn.functional.normalize(features.float(), dim=1)


def sscd(options: Options) -> Measure:
    """SSCD: pictures squashed to 320×320, normalised as for ImageNet."""
    path = options.sscd
    if path is None:
        raise Unavailable("no file was named with --sscd")
    if not path.is_file():
        raise Unavailable(f"{path} is no file")
    network = _onnx(path, options.device) if path.suffix.lower() == ".onnx" else _torchscript(path, options.device)
    return Nearest(digest(path), lambda pictures: network(squashed(pictures, 320)), options.references)


def _torchscript(path: Path, device: str) -> Callable[[Tensor], Tensor]:
    try:
        network = torch.jit.load(str(path), map_location=device).eval()
    except (RuntimeError, ValueError) as error:
        raise Unavailable(f"{path} is no TorchScript file ({str(error).splitlines()[0]})") from None

    @torch.no_grad()
    def features(pictures: Tensor) -> Tensor:
        return network(pictures.to(device)).cpu()  # type: ignore[no-any-return]

    return features


def _onnx(path: Path, device: str) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    wanted = ["CUDAExecutionProvider"] if device.startswith("cuda") else []
    try:
        session = onnxruntime.InferenceSession(str(path), providers=[*wanted, "CPUExecutionProvider"])
    except Exception as error:  # its errors have no common class
        raise Unavailable(f"{path} is no ONNX file ({str(error).splitlines()[0]})") from None
    name = session.get_inputs()[0].name
    return lambda pictures: torch.from_numpy(session.run(None, {name: pictures.numpy()})[0])


def similarity(options: Options) -> Measure:
    """Correlation of blurred pictures: needs no weights, and sees no more than whole copies."""
    from lib_memnoise.core.similarity import thumbnails

    def features(pictures: Pictures) -> Tensor:
        # Each in its own shape.
        return torch.cat([thumbnails(tensor([picture])) for picture in pictures])

    return Nearest("correlation of blurred pictures", features, options.references)


def tensor(pictures: Pictures) -> Tensor:
    """`(B, 3, H, W)` in −1…1, of the first picture's size."""
    size = pictures[0].size
    same = [np.asarray(each.convert("RGB").resize(size, Image.Resampling.BILINEAR)) for each in pictures]
    return torch.from_numpy(np.stack(same)).permute(0, 3, 1, 2).float() / 127.5 - 1


class Pairwise:
    """The mean distance of each picture to the prompt's others."""

    def __init__(self, source: str, distance: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.source = source
        self._distance = distance

    def __call__(self, pictures: Pictures, prompt: Prompt) -> Values:
        count = len(pictures)
        if count < 2:
            return [None] * count
        every, (i, j) = tensor(pictures), np.triu_indices(count, 1)
        distances: NDArray[np.float64] = np.zeros((count, count))
        distances[i, j] = self._distance(every[i], every[j]).double().numpy()
        return [float(value) for value in (distances + distances.T).sum(1) / (count - 1)]


def diversity(_: Options) -> Measure:
    """One less the correlation of blurred pictures."""
    from lib_memnoise.core.similarity import thumbnails

    return Pairwise("correlation of blurred pictures", lambda a, b: 1 - (thumbnails(a) * thumbnails(b)).sum(1))


def lpips(options: Options) -> Measure:
    """LPIPS by AlexNet over all pairs of a prompt's images."""
    with _silence():
        import lpips as library

        path = options.lpips
        if path is not None and not path.is_file():
            raise Unavailable(f"{path} is no file")
        network = library.LPIPS(net="alex", pnet_rand=path is not None, verbose=False)
    if path is not None:
        state = torch.load(path, map_location="cpu", weights_only=True)
        for name, parameter in network.net.named_parameters():
            _, layer, kind = name.split(".")
            parameter.data.copy_(state[f"features.{layer}.{kind}"])
    network = network.eval().requires_grad_(False).to(options.device)

    @torch.no_grad()
    def distance(a: Tensor, b: Tensor) -> Tensor:
        pairs = zip(a.split(15), b.split(15))
        return torch.cat([network(x.to(options.device), y.to(options.device)).flatten().cpu() for x, y in pairs])

    return Pairwise("alex" if path is None else digest(path), distance)


class Clip:
    """Cosine of picture and caption by CLIP ViT-B-32."""

    def __init__(self, options: Options) -> None:
        import open_clip

        path = Path(options.clip)
        self._device = options.device
        self.source = digest(path) if path.is_file() else options.clip
        with _silence():
            network, _, self._preprocess = open_clip.create_model_and_transforms("ViT-B-32", pretrained=options.clip)
        self._network = network.eval().requires_grad_(False).to(self._device)
        self._tokenize = open_clip.get_tokenizer("ViT-B-32")

    @torch.no_grad()
    def __call__(self, pictures: Pictures, prompt: Prompt) -> Values:
        batch = torch.stack([self._preprocess(picture.convert("RGB")) for picture in pictures]).to(self._device)
        text = normalised(self._network.encode_text(self._tokenize([prompt.caption]).to(self._device)))
        image = normalised(self._network.encode_image(batch))
        return [float(value) for value in (image @ text.T)[:, 0]]


class Alignment:
    """The miniature's detector: the probability of what the caption names. Of its own pictures only."""

    source = "the miniature's detector"

    def __init__(self, _: Options) -> None:
        from lib_memnoise.lab.miniature.model import load_miniature

        self._model = load_miniature()

    def __call__(self, pictures: Pictures, prompt: Prompt) -> Values:
        from lib_memnoise.lab.comparison import own_subjects

        labels = own_subjects([prompt.caption])[0].labels
        if pictures[0].size != (128, 128) or not labels:
            return [None] * len(pictures)
        return [float(value) for value in self._model.alignment(tensor(pictures), [labels] * len(pictures))]


class Reward:
    """ImageReward."""

    def __init__(self, options: Options) -> None:
        import ImageReward

        path = Path(options.imagereward)
        self.source = digest(path) if path.is_file() else options.imagereward
        with _silence():
            self._network = ImageReward.load(options.imagereward, device=options.device)

    @torch.no_grad()
    def __call__(self, pictures: Pictures, prompt: Prompt) -> Values:
        return [float(self._network.score(prompt.caption, picture.convert("RGB"))) for picture in pictures]


METRICS: dict[str, Metric] = {
    "sscd": Metric("SSCD", "copy", True, sscd, of_the_paper=True),
    "clip": Metric("CLIP score", "alignment", False, Clip),
    "lpips": Metric("LPIPS", "diversity", False, lpips),
    "imagereward": Metric("ImageReward", "quality", False, Reward),
    "similarity": Metric("similarity", "copy", True, similarity),
    "alignment": Metric("alignment with the caption", "alignment", False, Alignment),
    "diversity": Metric("diversity", "diversity", False, diversity),
}
"""Every metric by its name in a plan."""


def metric_of(column: str) -> Metric:
    """The metric whose measures are kept under this name."""
    return METRICS[next(name for name in METRICS if column in columns_of(name))]


def label_of(column: str) -> str:
    """A column of measures, as figures and tables call it."""
    metric = metric_of(column)
    if metric.role != "copy":
        return metric.label
    if column in NEAREST:
        return f"{metric.label} to the nearest of all"
    return f"{metric.label} to the prompt's own{', as in the paper' if metric.of_the_paper else ''}"


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """What libraries print while they load."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def measure(
    run: Run,
    options: Options,
    *,
    progress: Callable[[int], None] = lambda done: None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, str]:
    """Measure what is not measured yet of a run's images, by the metrics of its plan.

    Returns:
        The metrics that cannot be had, each with the reason.
    """
    absent: dict[str, str] = {}
    options = replace(options, references=run.plan.references)
    for name in run.plan.metrics:
        # With weights that are named again, it is looked whether they are the same.
        named = getattr(options, name, None) != getattr(Options(), name, None)
        if name in run.metrics and not named and next(run.unmeasured(name), None) is None:
            continue
        try:
            measured = METRICS[name].make(options)
        except Unavailable as error:
            absent[name] = str(error)
        except ModuleNotFoundError as error:
            absent[name] = f"the package {error.name} is missing"
        except Exception as error:
            # Libraries that cannot download their weights fail in as many ways as there are libraries.
            lines = str(error).strip().splitlines()
            absent[name] = f"its weights cannot be loaded ({type(error).__name__}: {lines[0] if lines else ''})"
        else:
            changed = [run.measured_with(column, measured.source) for column in columns_of(name)]
            if any(changed):
                say(f"{name} is measured anew, with {measured.source}.")
            if isinstance(measured, Nearest) and len(run.plan.references) > MANY:
                say(f"{name}: {len(run.plan.references)} training pictures are looked at first.")
            _measure_with(name, measured, run, progress, say)
        if name in absent:
            say(f"{name} is not measured: {absent[name]}.")
    return absent


def _measure_with(
    name: str, measured: Measure, run: Run, progress: Callable[[int], None], say: Callable[[str], None]
) -> None:
    for point, prompt, images in run.unmeasured(name):
        pictures = {}
        for image in images:
            path = run.picture(point, prompt, image)
            try:
                with Image.open(path) as picture:
                    picture.load()
                    pictures[image] = picture
            except (OSError, SyntaxError) as error:  # as Pillow calls a broken PNG
                run.forget(point, prompt, image)
                say(f"{path} cannot be read ({error}); the same command makes it again.")
        if not pictures:
            continue
        try:
            columns = _columns(name, measured, list(pictures.values()), run.plan.prompts[prompt])
        except OSError as error:
            say(f"{name} of prompt {prompt} is not measured: a training picture cannot be read ({error}).")
            continue
        for column, values in columns.items():
            run.measure(column, point, prompt, dict(zip(pictures, values)))
        progress(len(pictures))
    if isinstance(measured, Nearest) and measured.unread is not None:
        say(f"{name} to the nearest of all is not measured: a training picture cannot be read ({measured.unread}).")


def _columns(name: str, measured: Measure, pictures: Pictures, prompt: Prompt) -> dict[str, Values]:
    """What is measured, by the names under which it is kept."""
    if not isinstance(measured, Nearest):
        return {name: measured(pictures, prompt)}
    nearest, own = measured.both(pictures, prompt)
    return {f"{name}_own": own} | ({} if nearest is None else {name: nearest})
