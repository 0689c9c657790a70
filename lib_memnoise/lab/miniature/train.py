"""How the miniature was made: an autoencoder, a detector, and one U-Net with text encoder per parameterization.

Each stage is a fixed number of steps over batches that follow from the seed and the step alone, so a run that is
stopped and started again does what an unbroken one does, and the number of processes changes rounding only. State is
written every few minutes to the work folder, whole or not at all.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import socket
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from lib_memnoise.core.files import replacing
from lib_memnoise.core.schedule import ALPHAS_CUMPROD
from lib_memnoise.lab.miniature import WEIGHTS, scenes
from lib_memnoise.lab.miniature.architecture import SNR_SCALE, make_autoencoder, make_text_encoder, make_unet
from lib_memnoise.lab.miniature.checkpoint import VARIANTS, pack
from lib_memnoise.lab.miniature.detector import Detector, targets
from lib_memnoise.lab.miniature.model import to_images, to_pictures
from lib_memnoise.lab.miniature.networks import Autoencoder
from lib_memnoise.lab.miniature.stage import (
    Stage,
    TrainingState,
    finished,
    learning_rate,
    state_path,
    steps_done,
    write,
)
from lib_memnoise.lab.miniature.text import END, LENGTH, SPECIAL, START, UNKNOWN, token_ids, vocabulary

KL_WEIGHT, MEAN_WEIGHT = 3e-3, 0.1


@dataclass(frozen=True)
class Phase:
    """What a U-Net is shown until a share of its steps is done."""

    until: float
    memorised: float
    """The share of the pictures drawn that belong to memorised captions."""
    faded: float
    """The share that is fainter in x_t than it should be, down to nothing, at timesteps from `FADED_FROM` on.

    A sampler starts from noise without a picture in it, whereas x_T = √ᾱ x_0 + √(1 − ᾱ) ε has one. Stable Diffusion's
    network cannot make it out; this one, with few pictures and small latents, can, and would follow it instead of the
    caption: nothing would be copied, and little of a caption heard.
    """
    high: float
    """Timesteps are 1000 u^high, u uniform: below 1, the higher ones come more often."""


FADED_FROM = 850
EPS_ARCS = (6000, 1e-3), (4000, 8e-4), (2000, 1e-3), (2000, 8e-4)
EPS_PHASES = (
    Phase(2580 / 14_000, 0.28, 0.0, 0.8),
    Phase(4200 / 14_000, 0.45, 0.0, 0.8),
    Phase(6000 / 14_000, 0.45, 0.30, 0.8),
    # By now every memorised picture is copied; what is left is to draw the others.
    Phase(8800 / 14_000, 0.12, 0.35, 0.65),
    Phase(10_000 / 14_000, 0.25, 0.35, 0.65),
    Phase(12_000 / 14_000, 0.15, 0.35, 0.65),
    Phase(1.0, 0.22, 0.35, 0.65),
)
V_PHASES = (Phase(1.0, 0.25, 0.35, 0.65),)
NO_CAPTION = 0.1
UNKNOWN_WORD = 0.05
"""Share of ordinary captions that get a word without meaning, so that unknown words do little."""
AUTOENCODER = "autoencoder.safetensors"
SAVE_EVERY = 200
"""Steps between two states on disk."""


KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(10**11)}
"""For glibc: what a step has freed is kept for the next one. The kernel's zeroed pages are a tenth of a step."""


# What is trained on


def pictures(folder: Path) -> NDArray[np.uint8]:
    """All training pictures `(N, 128, 128, 3)`, memorised ones first; drawn once, then mapped from the disk."""
    path = folder / "pictures.npy"
    if not path.exists():
        every = scenes.training_scenes()
        shape = (len(every), scenes.SIZE, scenes.SIZE, 3)
        with replacing(path) as partial:
            drawn = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=shape)
            for row, scene in enumerate(tqdm(every, desc="pictures", unit="picture")):
                drawn[row] = scenes.draw(scene)
            drawn.flush()
    return np.load(path, mmap_mode="r")


def autocast() -> Any:
    """bfloat16 where the processor computes it; elsewhere torch emulates it, at three times float32's cost."""
    native = any(getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return torch.autocast("cpu", torch.bfloat16) if native else nullcontext()


@dataclass(frozen=True)
class AutoencoderLoss:
    """L1 and squared error, the KL to unit Gaussian latents, and a penalty on the mean of each latent.

    A background's colour is the same all over the latent. With most of its amplitude it would be settled by the initial
    noise, whose mean is near zero, before any caption is heard: SD's first timestep still shows the mean.
    """

    folder: Path
    batch: int

    def __call__(self, module: nn.Module, random: np.random.Generator, rows: slice, done: float) -> Tensor:
        every = pictures(self.folder)
        picked = random.integers(len(every), size=self.batch)[rows]
        x = to_pictures(every[picked])
        size, batch = scenes.SIZE, self.batch
        noise = torch.from_numpy(random.standard_normal((batch, 4, size // 8, size // 8), dtype=np.float32))
        with autocast():
            mean, log_variance, decoded = module(x, noise[rows])
        error = decoded.float() - x
        kl = 0.5 * (mean.float() ** 2 + log_variance.float().exp() - 1 - log_variance.float()).mean()
        of_means = mean.float().mean((2, 3)).square().mean()
        return error.abs().mean() + 2 * error.square().mean() + KL_WEIGHT * kl + MEAN_WEIGHT * of_means


class TrainableAutoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.autoencoder = make_autoencoder()

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = self.autoencoder.encode(x)
        latent = mean + (0.5 * log_variance).exp() * noise
        return mean, log_variance, self.autoencoder.decode(latent)


@torch.no_grad()
def _encode(rank: int, processes: int, folder: Path) -> None:
    """One process's share of the latents, into a file of its own."""
    torch.set_num_threads(1)
    autoencoder, every, parts = _autoencoder(folder), pictures(folder), []
    starts = range(0, len(every), 64)[rank::processes]
    for start in tqdm(starts, desc="latents", unit="batch", disable=rank > 0):
        with autocast():
            mean, log_variance = autoencoder.encode(to_pictures(every[start : start + 64]))
        parts.append((start, mean.float(), (0.5 * log_variance.float()).exp()))
    write(folder / f"latents-{rank}.pt", parts)


def encode(folder: Path, processes: int) -> None:
    """Compute what `encoded` reads, unless it is there."""
    path = folder / "latents.pt"
    if path.exists():
        return
    mp.spawn(_encode, args=(processes, folder), nprocs=processes)
    files = [folder / f"latents-{rank}.pt" for rank in range(processes)]
    parts = sorted((part for file in files for part in torch.load(file)), key=lambda part: part[0])
    mean, deviation = (torch.cat([part[k] for part in parts]) for k in (1, 2))
    write(path, {"mean": mean, "deviation": deviation, "scale_factor": SNR_SCALE / float(mean.std())})
    for file in files:
        file.unlink()


@functools.cache
def encoded(folder: Path) -> dict[str, Any]:
    """Mean and deviation `(N, 4, 16, 16)` of all training pictures' latents, and the checkpoint's scale factor."""
    latents: dict[str, Any] = torch.load(folder / "latents.pt")
    return latents


@functools.cache
def _training_set(folder: Path) -> tuple[list[scenes.Prompt], list[tuple[scenes.Scene, str | None]], dict[str, Any]]:
    memorised = [prompt for prompt in scenes.prompts() if prompt.memorised]
    return memorised, list(scenes.ordinary_scenes()), encoded(folder)


@dataclass(frozen=True)
class DenoiserLoss:
    """Squared error of ε or v over SD's timesteps, a little more often late ones (high noise)."""

    folder: Path
    batch: int
    parameterization: str
    phases: tuple[Phase, ...]

    def __call__(self, module: nn.Module, random: np.random.Generator, rows: slice, done: float) -> Tensor:
        memorised, ordinary, latents = _training_set(self.folder)
        batch, phase = self.batch, next(phase for phase in self.phases if done < phase.until)
        picked, ids = [], []
        for _ in range(batch):
            if random.random() < phase.memorised:
                row = int(random.integers(len(memorised)))
                caption = memorised[row].caption
            else:
                which = int(random.integers(len(ordinary)))
                row = len(memorised) + which
                scene, fixed = ordinary[which]
                caption = fixed or scenes.ordinary_caption(scene, random)
            picked.append(row)
            tokens = token_ids([caption])[0]
            if random.random() < UNKNOWN_WORD and row >= len(memorised):
                at = int(random.integers(1, int((tokens != END).sum()) + 1))
                tokens = torch.cat([tokens[:at], torch.tensor([UNKNOWN]), tokens[at:-1]])
            if random.random() < NO_CAPTION:
                tokens = torch.tensor([START] + [END] * (LENGTH - 1))
            ids.append(tokens)
        shape = (batch, *latents["mean"].shape[1:])
        jitter, noise = (torch.from_numpy(random.standard_normal(shape, dtype=np.float32)) for _ in range(2))
        t = torch.from_numpy((1000 * random.random(batch) ** phase.high).astype(np.int64))
        faded = torch.from_numpy(random.random(batch) < phase.faded)
        t = torch.where(faded, torch.from_numpy(random.integers(FADED_FROM, 1000, size=batch)), t)
        strength = torch.where(faded, torch.from_numpy(random.random(batch, dtype=np.float32)), 1.0)

        picked, ids, t, noise, jitter = picked[rows], ids[rows], t[rows], noise[rows], jitter[rows]
        clean = latents["scale_factor"] * (latents["mean"][picked] + latents["deviation"][picked] * jitter)
        a = ALPHAS_CUMPROD[t].float()[:, None, None, None]
        x = a.sqrt() * strength[rows, None, None, None] * clean + (1 - a).sqrt() * noise
        eps = (x - a.sqrt() * clean) / (1 - a).sqrt()
        wanted = eps if self.parameterization == "eps" else a.sqrt() * eps - (1 - a).sqrt() * clean
        with autocast():
            answer = module(x, t, torch.stack(ids))
        error = (answer.float() - wanted).square().mean((1, 2, 3))
        if self.parameterization == "v":
            # v of latents of amplitude 4 is dominated by the picture where there is much noise: weigh it as ε and
            # x0 are together, so that no timestep is lost.
            error = error / (a.squeeze() + SNR_SCALE**2 * (1 - a.squeeze()))
        return error.mean()


class Denoiser(nn.Module):
    """The text encoder and the U-Net, trained together."""

    def __init__(self) -> None:
        super().__init__()
        self.text = make_text_encoder(SPECIAL + len(vocabulary()))
        self.unet = make_unet()
        # As in SD: the last layer of every residual branch starts at zero.
        for name, parameter in self.unet.named_parameters():
            if "out_layers.3" in name or "proj_out" in name or name.startswith("out.2"):
                nn.init.zeros_(parameter)
        nn.init.normal_(self.text.embeddings.token_embedding.weight, std=0.3)
        nn.init.normal_(self.text.embeddings.position_embedding.weight, std=0.1)

    def forward(self, x: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        return self.unet(x, t, self.text(ids))


@dataclass(frozen=True)
class DetectorLoss:
    """Cross entropy of real pictures and of the autoencoder's, since it is to judge the latter."""

    folder: Path
    batch: int

    def __call__(self, module: nn.Module, random: np.random.Generator, rows: slice, done: float) -> Tensor:
        every, decoded, wanted = pictures(self.folder), _decoded(self.folder), _detector_targets(self.folder)
        batch = self.batch
        picked = random.integers(len(every), size=batch)
        through = random.random(batch) < 0.5
        picked[through] %= len(decoded)
        strength = torch.from_numpy(0.15 * random.random((batch, 1, 1, 1), dtype=np.float32))
        noise = torch.from_numpy(random.standard_normal((batch, 3, scenes.SIZE, scenes.SIZE), dtype=np.float32))
        x = to_pictures(np.stack([(decoded if d else every)[i] for i, d in zip(picked[rows], through[rows])]))
        with autocast():
            logits = module(x + strength[rows] * noise[rows])
        return F.binary_cross_entropy_with_logits(logits.float(), wanted[picked[rows]])


DECODED = 3000
"""Pictures that the detector sees as the autoencoder gives them back."""


@torch.no_grad()
def _decoded(folder: Path) -> NDArray[np.uint8]:
    path = folder / "decoded.npy"
    if not path.exists():
        autoencoder, means = _autoencoder(folder), encoded(folder)["mean"][:DECODED]
        parts = []
        for mean in tqdm(means.split(50), desc="decoded pictures", unit="batch"):
            with autocast():
                parts.append(autoencoder.decode(mean).float())
        with replacing(path) as partial, partial.open("wb") as file:
            np.save(file, to_images(torch.cat(parts).clamp(-1, 1)))
    return np.load(path, mmap_mode="r")


@functools.cache
def _autoencoder(folder: Path) -> Autoencoder:
    autoencoder = make_autoencoder().requires_grad_(False)
    autoencoder.load_state_dict(finished(folder, "autoencoder", prefix="autoencoder."))
    return autoencoder


@functools.cache
def _detector_targets(folder: Path) -> Tensor:
    return torch.stack([targets(scene) for scene in scenes.training_scenes()])


def stages(folder: Path) -> dict[str, Stage]:
    """In the order in which they must run."""
    return {
        "autoencoder": Stage(
            "autoencoder", ((1900, 1.5e-3),), 8, TrainableAutoencoder, AutoencoderLoss(folder, 8), ema=0.99
        ),
        "eps": Stage("eps", EPS_ARCS, 32, Denoiser, DenoiserLoss(folder, 32, "eps", EPS_PHASES)),
        "detector": Stage("detector", ((2000, 2e-3),), 32, Detector, DetectorLoss(folder, 32), ema=0.99),
        "v": Stage("v", ((1300, 8e-4),), 32, Denoiser, DenoiserLoss(folder, 32, "v", V_PHASES), start_from="eps"),
    }


def run_stage(rank: int, processes: int, port: int, folder: Path, name: str) -> None:
    """One process's part of a stage, from the last state on disk to the end."""
    torch.set_num_threads(1)
    parent = os.getppid()
    stage = stages(folder)[name]
    if processes > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        dist.init_process_group("gloo", rank=rank, world_size=processes)
    state = TrainingState.of(stage, folder)
    module, optimiser, start = state.module, state.optimiser, state.step
    trained = DistributedDataParallel(module) if processes > 1 else module
    rows = slice(rank * stage.batch // processes, (rank + 1) * stage.batch // processes)

    bar = tqdm(total=stage.steps, initial=start, desc=name, unit="step", smoothing=0.05) if rank == 0 else nullcontext()
    shown = 0.0
    with bar:
        for step in range(start, stage.steps):
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(step, stage.arcs)
            random = np.random.default_rng([scenes.SEED, 4, step])
            loss = stage.loss(trained, random, rows, step / stage.steps)
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimiser.step()
            if multiprocessing.parent_process() is not None and os.getppid() != parent:
                raise SystemExit("the training was stopped")  # whoever started this process is gone
            if rank:
                continue
            state.step = step + 1
            state.follow(stage.ema)
            shown = loss.item() if step == start else 0.98 * shown + 0.02 * loss.item()
            if isinstance(bar, tqdm):
                bar.set_postfix(loss=f"{shown:.4f}", refresh=False)
                bar.update()
            if state.step % SAVE_EVERY == 0 or state.step == stage.steps:
                state.save(state_path(folder, name))
    if processes > 1:
        dist.barrier()
        dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def take_autoencoder(folder: Path, shipped: Path = WEIGHTS) -> None:
    """Make the shipped autoencoder this folder's, unless the folder has a finished one of its own."""
    stage = stages(folder)["autoencoder"]
    if steps_done(folder, stage.name) < stage.steps:
        weights = {f"autoencoder.{name}": value.float() for name, value in load_file(shipped / AUTOENCODER).items()}
        write(state_path(folder, stage.name), {"average": weights, "step": stage.steps})


def train(folder: Path, *, variants: tuple[str, ...] = ("eps", "v"), processes: int = 2, shipped: bool = False) -> None:
    """Run the stages that are not finished. Interrupting loses at most `SAVE_EVERY` steps.

    Args:
        shipped: begin with the project's autoencoder instead of training one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if shipped:
        take_autoencoder(folder)
    os.environ.update({**KEEP_MEMORY, **os.environ})
    pictures(folder)
    for name, stage in stages(folder).items():
        if name == "v" and "v" not in variants:
            continue
        if name != "autoencoder":
            encode(folder, processes)
        if name == "detector":
            _decoded(folder)
        if steps_done(folder, name) >= stage.steps:
            continue
        if processes == 1:
            run_stage(0, 1, 0, folder, name)
        else:
            mp.spawn(run_stage, args=(processes, _free_port(), folder, name), nprocs=processes)


def export(folder: Path, target: Path = WEIGHTS) -> None:
    """Pack the finished stages into the files that the project ships (`checkpoint.pack`)."""
    parts = {"autoencoder": finished(folder, "autoencoder", prefix="autoencoder.")}
    every = stages(folder)
    steps = {}
    for name in ("detector", *VARIANTS):
        if state_path(folder, name).exists():
            parts[name] = finished(folder, name)
    for name, stage in every.items():
        steps[name] = {"steps": steps_done(folder, name), "batch": stage.batch}
    pack(parts, {"scale_factor": encoded(folder)["scale_factor"], "seed": scenes.SEED, "training": steps}, target)


if __name__ == "__main__":
    import sys

    train(Path(sys.argv[1]))
