"""Compares methods on the same seeds: a labelled grid, and numbers for every picture."""

from __future__ import annotations

import base64
import copy
import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from modules import errors, images, processing, scripts, shared
from PIL import Image, ImageOps
from torch import Tensor

from lib_memnoise.core.report import Generation, ImageReport
from lib_memnoise.core.similarity import similarity
from lib_memnoise.errors import echo
from lib_memnoise.registry import METHODS, USUAL
from lib_memnoise.settings import SettingError, from_mapping
from lib_memnoise.webui import session
from lib_memnoise.webui.failures import is_stopping
from lib_memnoise.webui.request import SLOTS, TITLE
from lib_memnoise.webui.services import scoring, sheet
from lib_memnoise.webui.services.json_request import BadRequest, Request
from lib_memnoise.webui.services.json_request import parse as request_of
from lib_memnoise.webui.services.reference_picture import opened
from lib_memnoise.webui.services.scoring import Stopped, no_prompt_history

MOST_IMAGES = 64


@dataclass(frozen=True)
class Cell:
    """One picture of the grid."""

    picture: Image.Image | None
    """None where it could not be generated."""
    method: str
    settings: dict[str, Any]
    seed: int
    score: float | None
    """‖Δ‖ in the sampler's first step, of the noise that was sampled and the prompt as it was evaluated."""
    similarity: float | None
    """The similarity to the reference picture: the correlation of blurred pictures, −1…1."""
    rows: int
    """The network rows that the method costs, without those evaluated for the score alone."""
    backward_rows: int
    failed: str | None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Compared:
    """The result of a comparison."""

    grid: Image.Image
    cells: list[Cell]
    stopped: bool
    """Whether the user interrupted, so that unfinished methods are missing."""


def parse(body: Any) -> tuple[Request, list[dict[str, Any]], Image.Image | None]:
    """Validate a request for a comparison from JSON.

    `methods` is a list of names, or of settings as a generation takes them; `reference` is a picture (see
    `reference_picture.opened`). All other names are as in `json_request.parse`, with one prompt.

    Returns:
        What is to be generated, the settings of each method, and the reference picture if there is one.

    Raises:
        BadRequest: see `json_request.parse`; or settings cannot be used, or the reference is not a picture.
    """
    request = request_of(body, kind="comparison", without=("words",))
    if len(request.prompts) != 1:
        name = "prompt" if "prompt" in body else "prompts"
        raise BadRequest(f"memnoise: {name} = {echo(body[name])} is not valid; a comparison takes one prompt.")
    given = body.get("methods", USUAL)
    if not isinstance(given, (list, tuple)) or not given:
        raise BadRequest(
            f"memnoise: methods = {echo(given)} is not valid; it must be a list of names or of dicts of settings, at "
            "least one."
        )
    count = len(given) * len(request.seeds)
    if count > MOST_IMAGES:
        raise BadRequest(f"memnoise: {count} images are too many for one comparison; it may have {MOST_IMAGES}.")
    chosen = [settings_of(number, entry) for number, entry in enumerate(given)]
    return request, chosen, opened(body.get("reference"))


def settings_of(number: int, entry: Any) -> dict[str, Any]:
    """The validated settings of one method to compare.

    Raises:
        BadRequest: the settings cannot be used.
    """
    settings = {"method": entry} if isinstance(entry, str) else entry
    if not isinstance(settings, Mapping):
        raise BadRequest(
            f"memnoise: methods[{number}] = {echo(entry)} is not valid; it must be a name or a dict of settings."
        )
    try:
        from_mapping(settings)
    except SettingError as error:
        raise BadRequest(str(error)) from None
    if settings.get("enabled") is False:
        raise BadRequest(
            f"memnoise: enabled = false in methods[{number}] is not valid; a comparison mitigates every picture, and "
            'the method "none" is a picture without.'
        )
    return {**settings, "enabled": True}


def label(settings: Mapping[str, Any]) -> str:
    """A row's label: the method and its explicit settings."""
    explicit = [f"{name} {value}" for name, value in settings.items() if name not in ("enabled", "method")]
    return ", ".join([METHODS[settings.get("method", "batch_wise")].label, *explicit])


def compare(request: Request, chosen: list[dict[str, Any]], reference: Image.Image | None) -> Compared:
    """Generate every seed with each of these settings; the caller holds the host's queue.

    A method that fails costs its own row alone. The progress is the host's.

    Raises:
        BadRequest, Unsupported: see `scoring.score`. Stopped: interrupted before the first picture was there.
    """
    scoring.backend_to_score_with()
    seeds = [processing.get_fixed_seed(seed) for seed in request.seeds]
    shared.state.job_count = len(chosen)
    rows, cells, stopped = [], [], False
    for settings in chosen:
        if stopped := is_stopping():
            break
        pictures, generation, failed = generated(request, settings, seeds)
        if stopped := was_cut_short(len(pictures) == len(seeds), failed):
            break
        likeness = alike(pictures, reference)
        done = len(pictures) == len(seeds)
        for k, seed in enumerate(seeds):
            report = generation.images.get((0, k), ImageReport()) if generation is not None else ImageReport()
            cells.append(
                Cell(
                    pictures[k] if done else None,
                    method=settings.get("method", "batch_wise"),
                    settings={name: value for name, value in settings.items() if name != "enabled"},
                    seed=seed,
                    score=report.sampled,
                    similarity=likeness[k] if done and likeness else None,
                    rows=report.forward_rows - report.looked_rows,
                    backward_rows=report.backward_rows,
                    failed=failed or report.failed,
                    notes=report.notes,
                )
            )
        rows.append(pictures if done else [])
    if not any(rows):
        if stopped:
            raise Stopped("memnoise: interrupted.")
        raise BadRequest(f"memnoise: no picture could be generated: {cells[0].failed}.")
    return Compared(render_grid(rows, cells, chosen, seeds), cells, stopped)


def was_cut_short(done: bool, failed: str | None) -> bool:
    """Whether the user interrupted while a row's pictures were made, so that they are unfinished or missing."""
    return shared.state.interrupted or shared.state.skipped or (not done and failed is None and is_stopping())


def generated(
    request: Request, settings: dict[str, Any], seeds: list[int]
) -> tuple[list[Image.Image], Generation | None, str | None]:
    """The pictures of one row, memnoise's generation, and the reason where there are no pictures."""
    kind = processing.StableDiffusionProcessingTxt2Img
    p = scoring.make_processing(kind, request, list(request.prompts) * len(seeds), seeds)
    try:
        p.scripts = alone()
        setattr(p, session.LOOKS, True)
        p.script_args = [True, settings, *[None] * (len(SLOTS) - 2)]
        with no_prompt_history():
            pictures = processing.process_images(p).images
        return list(pictures[-len(seeds) :]), getattr(p, session.GENERATION, None), None
    except Exception as error:
        errors.report("memnoise: a method of the comparison failed", exc_info=True)
        return [], getattr(p, session.GENERATION, None), str(error).strip().split("\n")[0] or type(error).__name__
    finally:
        p.close()


def alone() -> Any:
    """A script runner with memnoise as its only script, so that the pictures differ in nothing else."""
    script = next(script for script in scripts.scripts_txt2img.alwayson_scripts if script.title() == TITLE)
    script = copy.copy(script)
    script.args_from, script.args_to = 0, len(SLOTS)
    runner = scripts.ScriptRunner()
    runner.scripts, runner.alwayson_scripts = [script], [script]
    return runner


def alike(pictures: list[Image.Image], reference: Image.Image | None) -> list[float]:
    """The similarity of each picture to the reference, −1…1. The reference is cropped to their shape."""
    if reference is None or not pictures:
        return []
    fitted = ImageOps.fit(reference.convert("RGB"), pictures[0].size)
    return [float(value) for value in similarity(tensor(pictures), tensor([fitted]))[:, 0]]


def tensor(pictures: list[Image.Image]) -> Tensor:
    """Pictures as a tensor `(B, 3, H, W)` in 0…1."""
    return torch.from_numpy(np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])).permute(
        0, 3, 1, 2
    ).float() / 255  # fmt: skip


def render_grid(
    rows: list[list[Image.Image]], cells: list[Cell], chosen: list[dict[str, Any]], seeds: list[int]
) -> Image.Image:
    """The grid, with a row for each method, a column for each seed, and numbers under every picture."""
    columns = len(seeds)
    laid = sheet.lay_out(
        next(row for row in rows if row)[0].size,
        [[bool(row)] * columns for row in rows],
        [[caption(cell) for cell in cells[r * columns : (r + 1) * columns]] for r in range(len(rows))],
        [f"Seed {seed}" for seed in seeds],
        [label(settings) for settings in chosen[: len(rows)]],
        images.get_font,
    )
    return sheet.render(
        laid, rows, background=getattr(shared.opts, "grid_background_color", "#ffffff"),
        ink=getattr(shared.opts, "grid_text_active_color", "#000000"),
    )  # fmt: skip


def caption(cell: Cell) -> list[str]:
    """The paragraphs of text under a picture."""
    numbers = [
        "" if cell.score is None else f"score {cell.score:.4g}",
        "" if cell.similarity is None else f"similarity {cell.similarity:.2f}",
        f"{cell.rows} rows" + (f", {cell.backward_rows} backward" if cell.backward_rows else ""),
    ]
    if cell.failed:
        return [("failed: " if cell.picture is None else "not mitigated: ") + cell.failed, *filter(None, numbers[:2])]
    return [text for text in numbers if text]


def compare_as_json(request: Request, chosen: list[dict[str, Any]], reference: Image.Image | None) -> dict[str, Any]:
    """`compare`, as JSON."""
    result = compare(request, chosen, reference)
    return {
        "grid": encoded(result.grid),
        "images": [
            {**asdict(replace(cell, picture=None)), "picture": None if cell.picture is None else encoded(cell.picture)}
            for cell in result.cells
        ],
        "stopped": result.stopped,
    }


def encoded(picture: Image.Image) -> str:
    """A picture as PNG in base64."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
