"""The command `score`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from lib_memnoise.lab.cli.command import Command
from lib_memnoise.lab.cli.options import (
    COUNT,
    PROCESSES,
    PROCESSORS,
    SEED,
    TEXT,
    VARIANT,
    WholeNumber,
    asked,
    option,
    webui,
)
from lib_memnoise.lab.miniature import OneSentence

if TYPE_CHECKING:
    from lib_memnoise.lab.miniature.model import Miniature

on_miniature = partial(option, into="miniature", heading="On the miniature")


@click.command(cls=Command)
@click.argument("prompts", nargs=-1, type=TEXT)
@webui(
    asked("--negative", "negative_prompt", type=TEXT, metavar="PROMPT", help="Negative prompt."),
    asked(
        "--seed", "seeds", multiple=True, type=SEED,
        help="May be repeated; random if there is none. The miniature takes one.",
    ),
    asked("--words", is_flag=True, help="Also how much each word has to do with it."),
    required=False,
)  # fmt: skip
@on_miniature("--noises", type=COUNT, default=8, help="Averaged over so many.")
@on_miniature("--images", type=COUNT, default=16, help="Of each memorised prompt.")
@on_miniature("--ordinary", type=WholeNumber(20, 100_000), default=500, help="Ordinary prompts.")
@on_miniature("--variant", type=VARIANT, default="eps", help="What it predicts.")
@on_miniature(
    "--timesteps",
    is_flag=True,
    help="False positives of ordinary prompts by a threshold of another first timestep.",
)
@on_miniature("--threads", type=PROCESSES, default=PROCESSORS, show_default="all processors")
def score(
    prompts: tuple[str, ...],
    url: str | None,
    auth: str | None,
    request: dict[str, Any],
    as_json: bool,
    miniature: dict[str, Any],
) -> None:
    """Score prompts without generating.

    In a WebUI, or on the miniature. Without prompts, measure how well the miniature's scores tell memorised prompts
    from ordinary ones.
    """
    if url is None:
        return score_miniature(prompts, request, as_json, **miniature)
    if not prompts:
        raise OneSentence("a prompt is needed to ask a WebUI for its score.")
    from lib_memnoise.lab.client import WebUI

    answer = WebUI(url, auth).post("score", {"prompts": prompts, **request})
    if as_json:
        print(json.dumps(answer, indent=2, ensure_ascii=False))
        return
    for image in answer["images"]:
        percentile = "" if image["percentile"] is None else f", above {image['percentile']:.0f} % of ordinary prompts"
        print(f"{image['score']:9.4f}  seed {image['seed']:<10}  {image['prompt']}")
        print(f"           {image['verdict']}{percentile}")
        for word, size in sorted(image.get("words", []), key=lambda pair: -pair[1]):
            print(f"           {size:5.2f}  {word}")
    print(f"{against(answer)}, first timestep {answer['timestep']:g}")
    for note in answer["notes"]:
        print(f"note: {note}")


def against(answer: dict[str, Any]) -> str:
    """What a WebUI compared the scores with."""
    known = answer["calibration"]
    if known is None:
        return "not calibrated"
    return f"threshold {answer['threshold']:.4g}, of {known['text']} ({known['promise']})"


def score_miniature(
    prompts: Sequence[str],
    request: dict[str, Any],
    as_json: bool,
    *,
    noises: int,
    images: int,
    ordinary: int,
    variant: str,
    threads: int,
    timesteps: bool = False,
) -> None:
    """Without a WebUI: the miniature's scores of prompts, or how well its scores tell what it memorised."""
    foreign = [name for name in request if name != "seeds"]
    if foreign:
        raise OneSentence(f"{foreign[0]} was given, which only a WebUI takes; --url names one.")
    seeds = request.get("seeds", (1,))
    if len(seeds) > 1:
        raise OneSentence("the miniature takes one --seed; --noises is how many are drawn from there on.")
    import torch

    from lib_memnoise.lab.miniature.model import load_miniature

    torch.set_num_threads(threads)
    model = load_miniature(variant)
    if prompts:
        print_scores(model, prompts, noises, seeds[0], as_json)
    elif timesteps:
        print_timesteps(model, variant, ordinary, seeds[0], as_json)
    else:
        print_detection(model, images, ordinary, seeds[0], as_json)


def print_scores(model: Miniature, prompts: Sequence[str], noises: int, seed: int, as_json: bool) -> None:
    from lib_memnoise.lab.claims import scores
    from lib_memnoise.lab.comparison import own_subjects

    found = scores(model, own_subjects(prompts), noises, seed)
    records = [{"prompt": text, "scores": row.tolist()} for text, row in zip(prompts, found)]
    if as_json:
        print(json.dumps(records, indent=2, ensure_ascii=False))
    else:
        for record in records:
            print(f"{sum(record['scores']) / len(record['scores']):9.4f}  {record['prompt']}")


def print_timesteps(model: Miniature, variant: str, ordinary: int, seed: int, as_json: bool) -> None:
    """False positives by a threshold that comes from another first timestep."""
    from tqdm import tqdm

    from lib_memnoise.lab import timestep_transfer

    with tqdm(total=ordinary, unit="prompt", leave=False) as bar:
        along = timestep_transfer.scores(model, ordinary, seed=seed, progress=bar.update)
    if as_json:
        print(json.dumps(timestep_transfer.documents(along, variant), indent=2))
    else:
        print(timestep_transfer.report(along, variant))


def print_detection(model: Miniature, images: int, ordinary: int, seed: int, as_json: bool) -> None:
    """How well scores tell memorised prompts from ordinary ones."""
    from tqdm import tqdm

    from lib_memnoise.lab.detection import Plan, detect, documents, left_alone, left_alone_text, report

    plan = Plan(images=images, ordinary=ordinary)
    with tqdm(total=plan.total, unit="score", leave=False) as bar:
        lines = detect(model, plan, seed=seed, progress=bar.update)
    if as_json:
        print(json.dumps(documents(lines), indent=2))
    else:
        print(report(lines, plan))
        print(left_alone_text(left_alone(model, seed=seed)))
