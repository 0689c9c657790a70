"""The benchmark for GPUs runs, here on a CPU and in small networks; and what a GPU asks of the core holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lib_memnoise.lab.experiment import subjects
from lib_memnoise.lab.miniature.model import Miniature, load_miniature
from lib_memnoise.lab.simulator import PER_SAMPLE, generate, noises
from lib_memnoise.methods.batch import BatchContext, Outcome
from lib_memnoise.methods.pipeline import run
from lib_memnoise.registry import METHODS
from lib_memnoise.sampling.memory_mode import KEPT, MemoryMode, first_attempt, run_from
from lib_memnoise.settings import Settings
from tests.networks import SmallDelta, noise

ROOT = Path(__file__).parents[1]
PARTS = ["time", "syncs", "memory", "precision", "miniature"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("device")
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = [str(ROOT / "benchmarks" / "device.sh"), "--device", "cpu", "--small", "--out", str(found)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert torch.__version__ in done.stdout and "float32" in done.stdout
    return found


@pytest.fixture(scope="module")
def entries(folder: Path) -> list[dict[str, Any]]:
    (file,) = folder.glob("*.jsonl")
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def of(entries: list[dict[str, Any]], part: str) -> list[dict[str, Any]]:
    return [entry for entry in entries if entry["part"] == part]


def test_every_part_is_there_and_labelled(entries: list[dict[str, Any]], folder: Path) -> None:
    assert list(dict.fromkeys(entry["part"] for entry in entries)) == PARTS
    for entry in entries:
        assert entry["labels"]["torch"] == torch.__version__ and entry["labels"]["device"]
        assert ("figures" in entry) != ("not run" in entry)
        assert entry["precision"] or "not run" in entry
    (page,) = folder.glob("*.md")
    text = page.read_text(encoding="utf-8")
    assert all(entry["name"] in text for entry in entries)


def test_rows_are_those_documented(entries: list[dict[str, Any]]) -> None:
    whole, parts = of(entries, "time")
    rows = {"none": 98, "batch-wise": 101, "per-sample": 114, "per-sample, checkpointed": 114, "repulsion": 100,
            "forward descent": 114}  # fmt: skip
    assert {name: found["rows"] for name, found in whole["figures"]["methods"].items()} == rows
    for entry, batch in ((whole, 1), (parts, 2)):
        for name, found in entry["figures"]["methods"].items():
            assert found["rows counted"] == [found["rows documented"]] * batch, name
            assert found["backward rows counted"] == [found["backward rows documented"]] * batch, name
            assert found["finite"] and found["time"]["min"] <= found["time"]["median"] <= found["time"]["max"]
            assert (name == "none") == (found["target"]["time"] is None)
        assert entry["figures"]["methods"]["none"]["time"] == {"median": 1.0, "min": 1.0, "max": 1.0}
    for name, found in whole["figures"]["methods"].items():
        assert found["rows counted"] == [rows[name]]


def test_what_only_a_gpu_shows_was_not_run(entries: list[dict[str, Any]]) -> None:
    (memory,) = of(entries, "memory")
    assert "GPU" in memory["not run"]
    for entry in of(entries, "time"):
        assert all(found["memory"] is None for found in entry["figures"]["methods"].values())


def test_a_guided_step_does_not_wait_for_the_device(entries: list[dict[str, Any]]) -> None:
    (entry,) = of(entries, "syncs")
    steps = {row["method"]: row for row in entry["figures"]["rows"] if row["method"]}
    assert set(steps) == set(of(entries, "time")[0]["figures"]["methods"])
    assert all(row["sampler"] == 0 for row in steps.values())
    assert steps["per-sample"]["optimiser"] > 0


def test_half_precision_finds_what_float32_does(entries: list[dict[str, Any]]) -> None:
    (entry,) = of(entries, "precision")
    assert entry["precision"] == "float16"
    judged = [row for row in entry["figures"]["rows"] if "within" in row]
    assert len(judged) == 4
    for row in judged:
        # What is a hundredth on a GPU depends on the processor in half precision: some round every product.
        if isinstance(row["found"], float):
            assert row["found"] <= 5 * row["bound"], row
        else:
            assert row["within"], row


def test_the_same_device_and_precision_make_the_same_pictures(entries: list[dict[str, Any]]) -> None:
    (entry,) = of(entries, "miniature")
    for row in entry["figures"]["rows"]:
        assert row["similarity"] == row["similarity cpu"] and row["agree"] == "1 of 1"


# What a GPU, or a device without float64, asks of the core.


class Doubles(TorchDispatchMode):
    """Counts tensors in float64 that operations make, by the innermost of the product's own frames."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if any(
            isinstance(value, Tensor) and value.dtype in (torch.float64, torch.complex128) for value in tree_leaves(out)
        ):
            frame = sys._getframe(1)
            while frame.f_back is not None and "lib_memnoise" not in frame.f_code.co_filename:
                frame = frame.f_back
            self.found[f"{frame.f_code.co_filename}:{frame.f_lineno} {func}"] += 1
        return out


@pytest.fixture(scope="module")
def model() -> Miniature:
    return load_miniature()


def asked(method: str) -> Settings:
    settings = Settings(enabled=True, method=method)
    if method in ("per_sample", "prompt_embedding", "sail"):
        settings = replace(settings, target=0.9, target_kind="fraction", max_steps=2)
    return replace(settings, candidates=2) if method == "noise_selection" else settings


@pytest.mark.parametrize("method", METHODS)
def test_no_method_needs_float64(model: Miniature, method: str) -> None:
    captions = [subject.caption for subject in subjects(memorised=True, held_out=True)[:2]]
    with Doubles() as doubles:
        made = generate(model, captions, noises([1, 2]), asked(method), seeds=[1, 2], steps=4, looking=True)
    assert torch.isfinite(made.latents).all()
    assert not doubles.found


def test_float64_is_noticed() -> None:
    with Doubles() as doubles:
        torch.ones(2) + torch.ones(2, dtype=torch.float64)
    assert sum(doubles.found.values()) == 2


@pytest.mark.parametrize("method", [name for name in METHODS if name != "prompt_embedding"])
def test_latents_and_networks_in_half_precision_are_worked_on_in_float32(method: str) -> None:
    x, delta = noise(2).half(), SmallDelta(dtype=torch.float16)
    context = BatchContext("eps", alpha_bar=0.01, seeds=[1, 2], texts=["a fox", "an owl"], vocabulary=lambda: ["red"])
    outcome = run(x, delta, asked(method).resolved("sd1"), context)
    assert outcome.x.dtype == torch.float32 and torch.isfinite(outcome.x).all() and not outcome.failed


def test_flagged_images_are_mitigated_by_gradient(model: Miniature) -> None:
    """The score's evaluation is at the very noise that the descent begins with, and has no gradient."""
    caption = subjects(memorised=True, held_out=True)[0].caption
    settings = replace(PER_SAMPLE, when="flagged", threshold=0.1, max_steps=2)
    made = generate(model, [caption], noises([1]), settings, steps=4)
    assert made.outcome is not None and made.outcome.steps is not None and made.outcome.steps.tolist() == [2]
    # The score's, and two steps', with the evaluation that ends them handed over; three calls of the sampler.
    assert (made.forward.tolist(), made.backward.tolist()) == ([2 + 4 + 6], [4])


# The ways to a gradient


class Scarce:
    """A Δ for which there is too little memory unless its batch is small enough."""

    def __init__(self, most: int) -> None:
        self.inner, self.most = SmallDelta(), most

    def __call__(self, x: Tensor) -> Tensor:
        if len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return self.inner(x)  # type: ignore[no-any-return]


def walked(most: int, batch: int = 3, **given: Any) -> tuple[Outcome, list[str], int]:
    notes: list[str] = []
    emptied: list[None] = []
    settings = Settings(enabled=True, method="per_sample", preset="custom", lr=0.02, target=0.0, max_steps=2)
    outcome = run_from(
        MemoryMode.PLAIN, noise(batch), Scarce(most), settings.resolved("sd1"), BatchContext("eps"), unet=SmallDelta(),
        empty=lambda: emptied.append(None), note=notes.append, **given,
    )  # fmt: skip
    return outcome, notes, len(emptied)


def test_out_of_memory_every_leaner_way_is_tried() -> None:
    plain, notes, emptied = walked(3)
    assert not notes and emptied == 0 and "gradient" not in plain.used
    mode, notes, emptied = walked(1)
    assert [note.split(", ", 1)[1] for note in notes] == ["checkpointed", "checkpointed, one image at a time"]
    assert emptied == 2 and mode.used["gradient"] == "checkpointed,_one_image_at_a_time"
    torch.testing.assert_close(mode.x, plain.x)
    with pytest.raises(torch.OutOfMemoryError):
        walked(0)
    with pytest.raises(torch.OutOfMemoryError):
        walked(0, batch=1)


def test_a_check_is_made_until_it_has_come_to_an_end() -> None:
    calls = []

    def check() -> None:
        calls.append(None)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    walked(3, check=check)
    assert len(calls) == 2
    calls.clear()

    def wrong() -> None:
        raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        walked(3, check=wrong)


def test_the_first_way_is_the_fastest_that_fits() -> None:
    unet, x = torch.nn.Linear(1, 1).half(), noise(2)
    pixels = 4 * x.shape[-1] * x.shape[-2] * 2
    assert first_attempt(unet, x, 4, float("inf")) is MemoryMode.PLAIN
    assert first_attempt(unet, x, 4, KEPT[MemoryMode.PLAIN] * pixels) is MemoryMode.CHECKPOINTED
    assert first_attempt(unet, x, 4, 0) is MemoryMode.ONE_BY_ONE
