"""Prompts of the miniature, methods on the same noises, and what came of each image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lib_memnoise.lab.bench import PRESETS, STEPS, Generated, generate, make_network, noises
from lib_memnoise.lab.samplers import SAMPLERS
from lib_memnoise.miniature.model import Miniature, to_pictures
from lib_memnoise.miniature.scenes import Prompt, draw, prompts
from lib_memnoise.miniature.yardsticks import COPIED
from lib_memnoise.settings import Settings
from lib_memnoise.similarity import similarity

BATCH = 32


@dataclass(frozen=True)
class Subject:
    """A caption with what its pictures should show, and the row of its memorised picture in `references` if any."""

    caption: str
    labels: tuple[str, ...]
    memorised: int | None


def memorised_prompts() -> list[Prompt]:
    return [prompt for prompt in prompts() if prompt.memorised]


def references() -> NDArray[np.uint8]:
    """The memorised pictures, `(R, 128, 128, 3)`."""
    return np.stack([draw(prompt.scene) for prompt in memorised_prompts()])


def subjects(*, memorised: bool, held_out: bool) -> list[Subject]:
    """The prompts that the miniature memorised, or the controls; those settings were chosen on, or the others."""
    rows = {prompt.caption: row for row, prompt in enumerate(memorised_prompts())}
    return [
        Subject(prompt.caption, prompt.labels, rows.get(prompt.caption))
        for prompt in prompts()
        if prompt.memorised == memorised and prompt.held_out == held_out
    ]


def seed_of(subject: int, image: int, seed: int) -> int:
    """A seed for every image: more images or subjects add to the same noises."""
    return seed + 100_000 * subject + image


@dataclass(frozen=True)
class Images:
    """What came of every image, subject by subject. Arrays are `(S, I)` of S subjects and I images each."""

    pictures: Tensor
    """`(S, I, 3, 128, 128)`."""
    noise: Tensor
    """x̃_T, `(S·I, 4, 16, 16)`."""
    similarity: NDArray[np.float64]
    """To the subject's memorised picture; of a subject without one, to the nearest of all."""
    alignment: NDArray[np.float64]
    before: NDArray[np.float64]
    after: NDArray[np.float64]
    forward: NDArray[np.float64]
    backward: NDArray[np.float64]
    norm: NDArray[np.float64]
    """‖x̃_T‖/√d."""
    trace: NDArray[np.float64]
    """`(steps, S, I)`: ‖Δ‖ along the trajectory; no steps unless it was looked at."""
    timesteps: list[float]

    @property
    def copied(self) -> NDArray[np.bool_]:
        return self.similarity > COPIED


@torch.no_grad()
def first_predictions(
    model: Miniature,
    chosen: Sequence[Subject],
    images: int,
    seed: int,
    *,
    sampler: str = "DDIM",
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[Tensor, Tensor]:
    """Δ(x_T, T) and ε_uncond of `images` noises of every subject, `(S·I, 4, 16, 16)` each, subject by subject."""
    every = [(s, i) for s in range(len(chosen)) for i in range(images)]
    deltas, unconditionals = [], []
    for start in range(0, len(every), BATCH):
        part = every[start : start + BATCH]
        network = make_network(model, [chosen[s].caption for s, _ in part])
        x, t = SAMPLERS[sampler].first(noises([seed_of(s, i, seed) for s, i in part]), STEPS)
        delta, unconditional = network.delta(x, t, counted=False)
        deltas.append(delta)
        unconditionals.append(unconditional)
        progress(len(part))
    return torch.cat(deltas), torch.cat(unconditionals)


def study(
    model: Miniature,
    chosen: Sequence[Subject],
    settings: Settings,
    *,
    images: int,
    seed: int = 0,
    sampler: str = "DDIM",
    steps: int = STEPS,
    looking: bool = False,
    replaced: Tensor | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Images:
    """Generate `images` images of every subject.

    Args:
        seed: the same seed gives the same noises for every method.
        looking: trace ‖Δ‖ at every step (costs rows, which are not counted).
        replaced: initial latents to use instead of the seeds', `(S·I, 4, 16, 16)`.
        progress: called with the number of images just finished.
    """
    every = [(s, i) for s in range(len(chosen)) for i in range(images)]
    seeds = [seed_of(s, i, seed) for s, i in every]
    x = noises(seeds) if replaced is None else replaced
    parts: list[Generated] = []
    pictures = []
    for start in range(0, len(every), BATCH):
        captions = [chosen[s].caption for s, _ in every[start : start + BATCH]]
        part = generate(
            model,
            captions,
            x[start : start + BATCH],
            settings,
            seeds=seeds[start : start + BATCH],
            sampler=sampler,
            steps=steps,
            looking=looking,
        )
        pictures.append(model.decode(part.latents))
        parts.append(part)
        progress(len(captions))
    picture = torch.cat(pictures)
    likeness = similarity(picture, to_pictures(references()))
    alike = [
        float(row.max() if chosen[s].memorised is None else row[chosen[s].memorised])
        for row, (s, _) in zip(likeness, every)
    ]
    aligned = model.alignment(picture, [chosen[s].labels for s, _ in every])

    def shaped(values: Any) -> NDArray[np.float64]:
        array = np.asarray(values, dtype=np.float64)
        return array.reshape(*array.shape[:-1], len(chosen), images)

    def joined(name: str) -> NDArray[np.float64]:
        return shaped(torch.cat([getattr(part, name) for part in parts]))

    noise = torch.cat([part.noise for part in parts])
    timesteps = [t for t, _ in parts[0].trace]
    trace = [np.concatenate([part.trace[k][1].numpy() for part in parts]) for k in range(len(timesteps))]
    return Images(
        pictures=picture.unflatten(0, (len(chosen), images)),
        noise=noise,
        similarity=shaped(alike),
        alignment=shaped(aligned),
        before=joined("before"),
        after=joined("after"),
        forward=joined("forward"),
        backward=joined("backward"),
        norm=shaped(noise.flatten(1).norm(dim=1) / noise[0].numel() ** 0.5),
        trace=shaped(np.stack(trace)) if trace else np.empty((0, len(chosen), images)),
        timesteps=timesteps,
    )


def record(name: str, settings: Settings, parameterization: str, result: Images) -> dict[str, Any]:
    """One method's results for machines: means over all images, `copied` as a share, rows an image."""
    used = settings.resolved(PRESETS[parameterization]).of_method() if settings.enabled else {"enabled": False}
    subjects_count, images = result.similarity.shape
    return {
        "method": name,
        "settings": used,
        "prompts": subjects_count,
        "images": images,
        "similarity": float(result.similarity.mean()),
        "copied": float(result.copied.mean()),
        "alignment": float(result.alignment.mean()),
        "rows": float(result.forward.mean()),
        "backward_rows": float(result.backward.mean()),
        "magnitude_before": float(result.before.mean()),
        "magnitude_after": float(result.after.mean()),
        "norm": float(result.norm.mean()),
    }
