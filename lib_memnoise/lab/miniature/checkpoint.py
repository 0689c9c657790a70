"""The miniature's files: what the project ships, and what a WebUI loads.

Shipped, in `weights/`: the networks' matrices as 8-bit integers with a scale for every output channel, the text
encoder's table trimmed to the words it knows, and a manifest with checksums. `expand` makes of it an ordinary SD1
checkpoint: ldm's names, CLIP's whole table, half precision.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save_file
from torch import Tensor

from lib_memnoise.core.files import replacing
from lib_memnoise.lab.miniature import MANIFEST, WEIGHTS, OneSentence
from lib_memnoise.lab.miniature.architecture import AUTOENCODER, LINEAR_END, LINEAR_START, TEXT, UNET
from lib_memnoise.lab.miniature.clip import CLIP_TOKENS, clip_files, find_merges
from lib_memnoise.lab.miniature.text import UNKNOWN, clip_ids

VARIANTS = ("eps", "v")
NAMES = {"eps": "memnoise-miniature", "v": "memnoise-miniature-v"}
"""Of the checkpoints in a WebUI."""
SCALE_SUFFIX = "#scale"
TABLE = "embeddings.token_embedding.weight"

Weights = dict[str, Tensor]


class NotAWebUI(OneSentence, FileNotFoundError):
    """The folder named has no WebUI in it."""


class Damaged(OneSentence):
    """A file of the miniature is missing, cut short or not the one the project ships."""


def quantise(weights: Weights) -> Weights:
    """Every matrix in 8 bits with a scale for each output channel, everything else in half precision."""
    packed = {}
    for name, value in weights.items():
        if value.ndim < 2 or value.numel() < 1024:
            packed[name] = value.half()
            continue
        peak = value.float().abs().amax(tuple(range(1, value.ndim)), keepdim=True).clamp(min=1e-8)
        scale = (peak / 127).half().clamp(min=6e-8)
        packed[name] = (value.float() / scale.float()).round().clamp(-127, 127).to(torch.int8)
        packed[name + SCALE_SUFFIX] = scale
    return packed


def restore(packed: Weights) -> Weights:
    """The weights `quantise` packed, in half precision: what every user of the miniature computes with.

    Rounded to half precision here, so that a WebUI's checkpoint holds these very values.
    """
    weights = {}
    for name, value in packed.items():
        if name.endswith(SCALE_SUFFIX):
            continue
        scale = packed.get(name + SCALE_SUFFIX)
        weights[name] = value if scale is None else (value.float() * scale.float()).half()
    return weights


def pack(parts: dict[str, Weights], facts: dict[str, Any], folder: Path = WEIGHTS) -> None:
    """Write the files the project ships.

    Args:
        parts: the weights of "autoencoder", "detector" and of each variant ("text." and "unet." in front).
        facts: what else the manifest says; `scale_factor` is needed.
    """
    sums = {}
    for part, weights in parts.items():
        # The autoencoder's and the detector's small networks are kept exact.
        content = quantise(weights) if part in VARIANTS else {name: value.half() for name, value in weights.items()}
        content = {name: value.contiguous() for name, value in content.items()}
        with replacing(folder / f"{part}.safetensors") as partial:
            save_file(content, partial)
        sums[part] = hashlib.sha256((folder / f"{part}.safetensors").read_bytes()).hexdigest()
    with replacing(folder / MANIFEST) as partial:
        partial.write_text(json.dumps({**facts, "sha256": sums}, indent=2) + "\n", encoding="utf-8")


def manifest(folder: Path = WEIGHTS) -> dict[str, Any]:
    """What is shipped: checksums, the latents' scale factor, how it was trained.

    Raises:
        Damaged: there is none, or it is no manifest.
    """
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        sums = content["sha256"]
        assert float(content["scale_factor"]) > 0 and all(isinstance(value, str) for value in sums.values())
    except OSError as error:
        raise Damaged(f"the miniature's {path.name} cannot be read: {error.strerror or error}.") from None
    except (ValueError, TypeError, KeyError, AssertionError):
        raise Damaged(f"the miniature's {path} is damaged; install memnoise again.") from None
    return dict(content)


def shipped(folder: Path = WEIGHTS) -> tuple[str, ...]:
    """The variants that are there. Raises Damaged as `manifest` does."""
    return tuple(variant for variant in VARIANTS if variant in manifest(folder)["sha256"])


def read(part: str, folder: Path = WEIGHTS) -> Weights:
    """The weights of one shipped part, in half precision, checked against the manifest.

    Raises:
        Damaged: the file is missing or has another checksum.
    """
    path = folder / f"{part}.safetensors"
    expected = manifest(folder)["sha256"].get(part)
    if expected is None:
        raise Damaged(f"the miniature has no part {part!r}.")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise Damaged(f"the miniature's {path} cannot be read: {error.strerror or error}.") from None
    if hashlib.sha256(content).hexdigest() != expected:
        raise Damaged(f"the miniature's {path} is damaged ({len(content)} bytes); install memnoise again.")
    return restore(load(content))


def under(prefix: str, weights: Weights) -> Weights:
    """Those weights whose names begin so, without it."""
    return {name[len(prefix) :]: value for name, value in weights.items() if name.startswith(prefix)}


def expand(variant: str, folder: Path = WEIGHTS) -> Weights:
    """An ordinary SD1 checkpoint's weights under ldm's names, in half precision.

    Words that the miniature never saw all have the row that it was trained to hear nothing in.
    """
    weights = read(variant, folder)
    text = under("text.", weights)
    small = text.pop(TABLE)
    table = small[UNKNOWN].repeat(CLIP_TOKENS, 1)
    for row, token in enumerate(clip_ids()):
        if token >= 0:
            table[token] = small[row]
    text[TABLE] = table
    text["embeddings.position_ids"] = torch.arange(TEXT["max_position_embeddings"])[None]
    result = {f"cond_stage_model.transformer.text_model.{name}": value for name, value in text.items()}
    result |= {f"first_stage_model.{name}": value for name, value in read("autoencoder", folder).items()}
    result |= {f"model.diffusion_model.{name}": value for name, value in under("unet.", weights).items()}
    return {name: value.contiguous() for name, value in result.items()}


def config(variant: str, clip: Path, scale_factor: float) -> dict[str, Any]:
    """The YAML beside the checkpoint: ldm's classes with the miniature's sizes."""
    params: dict[str, Any] = {
        "linear_start": LINEAR_START,
        "linear_end": LINEAR_END,
        "num_timesteps_cond": 1,
        "log_every_t": 200,
        "timesteps": 1000,
        "first_stage_key": "jpg",
        "cond_stage_key": "txt",
        "image_size": 16,
        "channels": 4,
        "cond_stage_trainable": False,
        "conditioning_key": "crossattn",
        "monitor": "val/loss_simple_ema",
        "scale_factor": scale_factor,
        "use_ema": False,
        "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": UNET},
        "first_stage_config": {
            "target": "ldm.models.autoencoder.AutoencoderKL",
            "params": {
                **AUTOENCODER,
                "monitor": "val/rec_loss",
                "lossconfig": {"target": "torch.nn.Identity"},
            },
        },
        "cond_stage_config": {
            "target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder",
            "params": {"version": str(clip)},
        },
    }
    if variant == "v":
        params["parameterization"] = "v"
    return {"model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": params}}


def install(
    webui: Path,
    *,
    variants: tuple[str, ...] | None = None,
    checkpoints: Path | None = None,
    vocabulary: Path | None = None,
    folder: Path = WEIGHTS,
) -> list[Path]:
    """Put the miniature into a WebUI: weights, a YAML beside each, and a folder with its tokenizer.

    Args:
        webui: the WebUI's folder, the one with `launch.py`.
        variants: all that are shipped unless given.
        checkpoints: where it looks for checkpoints, if not in `models/Stable-diffusion`.
        vocabulary: CLIP's list of merges; looked for if not given.

    Returns:
        The checkpoints' files. What was there by these names is replaced; each file is whole or not there at all,
        and the weights come last, so that a WebUI never sees a checkpoint without its YAML.

    Raises:
        NotAWebUI, NoVocabulary: what is named is not there. OSError: no permission, no space. Damaged: see `read`.
    """
    webui = webui.absolute()
    if not (webui / "launch.py").is_file():
        raise NotAWebUI(f"{webui} is not a WebUI: it has no launch.py.")
    target = (checkpoints or webui / "models" / "Stable-diffusion").absolute()
    expanded = {variant: expand(variant, folder) for variant in variants or shipped(folder)}
    scale_factor = manifest(folder)["scale_factor"]
    needed = sum(value.nbytes for weights in expanded.values() for value in weights.values()) + 8_000_000
    target.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target).free
    if free < needed:
        raise OSError(f"{target} has {free / 1e6:.0f} MB free; the miniature needs {needed / 1e6:.0f} MB.")

    clip = target / f"{NAMES['eps']}-clip"
    for name, content in clip_files(vocabulary or find_merges(webui), TEXT).items():
        with replacing(clip / name) as partial:
            partial.write_text(content, encoding="utf-8")
    files = []
    for variant, weights in expanded.items():
        file = target / f"{NAMES[variant]}.safetensors"
        with replacing(file.with_suffix(".yaml")) as partial:
            # JSON is YAML.
            partial.write_text(json.dumps(config(variant, clip, scale_factor), indent=1) + "\n", encoding="utf-8")
        with replacing(file) as partial:
            save_file(weights, partial, metadata={"format": "pt"})
        files.append(file)
    return files
