"""Prompts of the miniature, methods on the same noises, and what came of each image."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lib_memnoise.core.delta import norm_ratio
from lib_memnoise.core.similarity import thumbnails
from lib_memnoise.lab.miniature.model import Miniature, to_pictures
from lib_memnoise.lab.miniature.scenes import Prompt, draw, prompts
from lib_memnoise.lab.miniature.yardsticks import COPIED
from lib_memnoise.lab.processes import Workers
from lib_memnoise.lab.samplers import SAMPLERS
from lib_memnoise.lab.simulator import PRESETS, STEPS, generate, make_network, noises
from lib_memnoise.settings import Settings, used_settings

BATCH = 32


@dataclass(frozen=True)
class Subject:
    """A caption with what its pictures should show, and the row of its memorised picture in `references` if any."""

    caption: str
    labels: tuple[str, ...]
    memorised: int | None


def memorised_prompts() -> list[Prompt]:
    return [prompt for prompt in prompts() if prompt.memorised]


@functools.cache
def references() -> NDArray[np.uint8]:
    """The memorised pictures, `(R, 128, 128, 3)`. Drawn once: not to be written to."""
    return np.stack([draw(prompt.scene) for prompt in memorised_prompts()])


@functools.cache
def _reference_thumbnails() -> Tensor:
    return thumbnails(to_pictures(references()))


def likeness(pictures: Tensor) -> Tensor:
    """Similarity `(B, R)` of pictures `(B, 3, H, W)` to each memorised picture."""
    return thumbnails(pictures) @ _reference_thumbnails().T


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
    """To the nearest of all memorised pictures: a copy of another prompt's picture is one."""
    similarity_own: NDArray[np.float64]
    """To the subject's own memorised picture, never above `similarity`; NaN of a subject without one."""
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

    @property
    def copied_own(self) -> NDArray[np.bool_]:
        """Copies of the subject's own picture; of a subject without one none is."""
        return self.similarity_own > COPIED


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


@dataclass(frozen=True)
class Batch:
    """Images to generate at once: all that another process must know of them."""

    subjects: tuple[Subject, ...]
    """Of each image."""
    seeds: tuple[int, ...]
    settings: Settings
    sampler: str
    steps: int
    looking: bool
    replaced: NDArray[np.float32] | None
    """Initial latents, `(B, 4, 16, 16)`; None: the seeds'."""


@dataclass(frozen=True)
class Part:
    """What came of a batch. Arrays, which go from process to process as they are; `(B,)` unless it says otherwise."""

    pictures: NDArray[np.float32]
    """`(B, 3, 128, 128)`."""
    noise: NDArray[np.float32]
    """x̃_T, `(B, 4, 16, 16)`."""
    likeness: NDArray[np.float32]
    """To each of `references`, `(B, R)`."""
    alignment: NDArray[np.float32]
    before: NDArray[np.float32]
    after: NDArray[np.float32]
    forward: NDArray[np.int64]
    backward: NDArray[np.int64]
    trace: NDArray[np.float32]
    """`(steps, B)`."""
    timesteps: list[float]


def part(model: Miniature, batch: Batch) -> Part:
    """Generate and measure a batch."""
    x = noises(batch.seeds) if batch.replaced is None else torch.tensor(batch.replaced)
    made = generate(
        model,
        [subject.caption for subject in batch.subjects],
        x.to(model.device),
        batch.settings,
        seeds=batch.seeds,
        sampler=batch.sampler,
        steps=batch.steps,
        looking=batch.looking,
    )
    pictures = model.decode(made.latents).cpu()
    aligned = model.alignment(pictures.to(model.device), [subject.labels for subject in batch.subjects])
    return Part(
        pictures=pictures.numpy(),
        noise=made.noise.cpu().numpy(),
        likeness=likeness(pictures).numpy(),
        alignment=aligned.cpu().numpy(),
        before=made.before.cpu().numpy(),
        after=made.after.cpu().numpy(),
        forward=made.forward.numpy(),
        backward=made.backward.numpy(),
        trace=np.stack([size.cpu().numpy() for _, size in made.trace])
        if made.trace
        else np.empty((0, len(x)), np.float32),
        timesteps=[t for t, _ in made.trace],
    )


def collected(chosen: Sequence[Subject], images: int, parts: Sequence[Part]) -> Images:
    """The batches of `images` images of every subject put together."""

    def shaped(values: NDArray[Any]) -> NDArray[np.float64]:
        return values.astype(np.float64).reshape(*values.shape[:-1], len(chosen), images)

    def joined(name: str, axis: int = 0) -> NDArray[Any]:
        return np.concatenate([getattr(part, name) for part in parts], axis)

    noise = torch.from_numpy(joined("noise"))
    alike = joined("likeness").astype(np.float64)
    own = np.full(len(alike), np.nan)
    for k, row in enumerate(np.repeat([-1 if s.memorised is None else s.memorised for s in chosen], images)):
        if row >= 0:
            own[k] = alike[k, row]
    return Images(
        pictures=torch.from_numpy(joined("pictures")).unflatten(0, (len(chosen), images)),
        noise=noise,
        similarity=shaped(alike.max(1)),
        similarity_own=shaped(own),
        alignment=shaped(joined("alignment")),
        before=shaped(joined("before")),
        after=shaped(joined("after")),
        forward=shaped(joined("forward")),
        backward=shaped(joined("backward")),
        norm=shaped(norm_ratio(noise).numpy()),
        trace=shaped(joined("trace", 1)),
        timesteps=parts[0].timesteps,
    )


def begin(
    workers: Workers,
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
) -> Callable[[], Images]:
    """Have `images` images of every subject generated; the function returned waits for them.

    Args:
        seed: the same seed gives the same noises for every method.
        looking: trace ‖Δ‖ at every step (costs rows, which are not counted).
        replaced: initial latents to use instead of the seeds', `(S·I, 4, 16, 16)`.
        progress: called with the number of images just finished, from any thread.
    """
    every = [(s, i) for s in range(len(chosen)) for i in range(images)]
    parts: list[Future[Part]] = []

    def done(future: Future[Part]) -> None:
        if not future.cancelled() and future.exception() is None:
            progress(len(future.result().noise))

    for start in range(0, len(every), BATCH):
        some = every[start : start + BATCH]
        batch = Batch(
            tuple(chosen[s] for s, _ in some),
            tuple(seed_of(s, i, seed) for s, i in some),
            settings,
            sampler,
            steps,
            looking,
            None if replaced is None else replaced[start : start + BATCH].numpy(),
        )
        future = workers.submit(part, batch)
        future.add_done_callback(done)
        parts.append(future)
    return lambda: collected(chosen, images, [future.result() for future in parts])


def study(model: Miniature, chosen: Sequence[Subject], settings: Settings, *, images: int, **how: Any) -> Images:
    """Generate `images` images of every subject in this process; see `begin`."""
    return begin(Workers(model), chosen, settings, images=images, **how)()


def record(name: str, settings: Settings, parameterization: str, result: Images) -> dict[str, Any]:
    """One method's results for machines: means over all images, copies as shares, rows an image.

    `similarity` and `copied` are of the nearest of all memorised pictures; with `_own` of the prompt's own, None where
    no prompt has one.
    """
    used = used_settings(settings.resolved(PRESETS[parameterization])) if settings.enabled else {"enabled": False}
    subjects_count, images = result.similarity.shape
    known = ~np.isnan(result.similarity_own)
    return {
        "method": name,
        "settings": used,
        "prompts": subjects_count,
        "images": images,
        "similarity": float(result.similarity.mean()),
        "similarity_own": float(result.similarity_own[known].mean()) if known.any() else None,
        "copied": float(result.copied.mean()),
        "copied_own": float(result.copied_own[known].mean()) if known.any() else None,
        "alignment": float(result.alignment.mean()),
        "rows": float(result.forward.mean()),
        "backward_rows": float(result.backward.mean()),
        "magnitude_before": float(result.before.mean()),
        "magnitude_after": float(result.after.mean()),
        "norm": float(result.norm.mean()),
    }
