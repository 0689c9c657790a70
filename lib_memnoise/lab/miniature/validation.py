"""The yardsticks on real pictures: what similarity says of copies and of others, and what the detector finds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lib_memnoise.core.similarity import similarity
from lib_memnoise.lab.miniature.detector import LABELS, targets
from lib_memnoise.lab.miniature.model import Miniature, load_miniature, to_pictures
from lib_memnoise.lab.miniature.scenes import Scene, draw, prompts, validation_scenes
from lib_memnoise.lab.miniature.yardsticks import COPIED

OTHERS = 1000


def rendered(scenes: Sequence[Scene]) -> Tensor:
    return to_pictures(np.stack([draw(scene) for scene in scenes]))


@torch.no_grad()
def through_autoencoder(model: Miniature, pictures: Tensor) -> Tensor:
    """Pictures encoded and decoded again: the best that the miniature can generate."""
    parts = [model.autoencoder.decode(model.autoencoder.encode(part)[0]) for part in pictures.split(16)]
    return torch.cat(parts).clamp(-1, 1)


def validate(model: Miniature | None = None, others: int = OTHERS) -> dict[str, float]:
    """Shares and correlations on pictures in no training set, and on changed copies of the memorised ones.

    Keys: `psnr` of the autoencoder in dB; `copy …`, the lowest similarity of a memorised picture that was changed so to
    the nearest of all memorised pictures, and with `own` to that picture; `other …`, the highest similarity of any
    other picture to any memorised one: of a memorised picture to another (`one to another`), of one whose objects are
    elsewhere, which with `own` is that to itself; `on average` to the nearest, and with `own` to one memorised picture;
    `recall …` and `false alarms …` of the detector at a probability of 0.5; `alignment …`, as it is measured of
    generations, of real pictures with a true object and with one that is not there.
    """
    model = model or load_miniature()
    random = np.random.default_rng(5)
    scenes = validation_scenes(others)
    pictures = rendered(scenes)
    coded = through_autoencoder(model, pictures[:200])
    memorised = [prompt.scene for prompt in prompts() if prompt.memorised]
    references = rendered(memorised)

    def least(name: str, changed: Tensor) -> dict[str, float]:
        alike = similarity(changed, references)
        return {name: float(alike.max(1).values.min()), f"{name}, own": float(alike.diagonal().min())}

    def rearranged(scene: Scene) -> Scene:
        # The same objects on the same background, each somewhere else.
        moved = tuple(replace(o, left=(o.left + 64) % 80, top=(o.top + 40) % 80) for o in scene.objects)
        return replace(scene, objects=moved)

    noise = torch.from_numpy(random.standard_normal(references.shape, dtype=np.float32))
    elsewhere = similarity(rendered([rearranged(scene) for scene in memorised]), references)
    others_alike = similarity(pictures, references)
    among = similarity(references, references).fill_diagonal_(-1)
    found = {
        "psnr": float(-10 * torch.log10((coded - pictures[:200]).square().mean() / 4)),
        **least("copy, through the autoencoder", through_autoencoder(model, references)),
        **least("copy, with noise", references + 0.3 * noise),
        **least("copy, blurred", F.avg_pool2d(references, 9, 1, 4)),
        **least("copy, paler", 0.6 * references + 0.1),
        "other, memorised pictures one to another": float(among.max()),
        "other, its own objects elsewhere": float(elsewhere.max()),
        "other, its own objects elsewhere, own": float(elsewhere.diagonal().max()),
        "other, any": float(others_alike.max()),
        "other, on average": float(others_alike.max(1).values.mean()),
        "other, on average, own": float(others_alike.mean()),
    }
    for name, shown, count in (("real", pictures, others), ("coded", coded, 200)):
        true = torch.stack([targets(scene) for scene in scenes[:count]]).bool()
        probability = model.detect(shown)
        found[f"recall, {name}"] = float((probability[true] > 0.5).float().mean())
        found[f"false alarms, {name}"] = float((probability[~true] > 0.5).float().mean())
    absent = []
    for scene in scenes[:200]:
        candidates = [label for label in LABELS[:40] if label not in scene.names]
        absent.append([str(random.choice(candidates))])
    found["alignment, a true object"] = float(
        model.alignment(coded, [scene.names[:1] for scene in scenes[:200]]).mean()
    )
    found["alignment, an absent object"] = float(model.alignment(coded, absent).mean())
    return found


def report(found: dict[str, float]) -> str:
    lines = [f"{value:7.3f}  {name}" for name, value in found.items()]
    return "\n".join([*lines, "", f"A copy is a picture with a similarity above {COPIED:g}."])
