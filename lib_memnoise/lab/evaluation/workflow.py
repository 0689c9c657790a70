"""An evaluation from its plan to its report: makes what is missing, measures, draws."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lib_memnoise.lab.evaluation import cluster, dispatch, metrics
from lib_memnoise.lab.evaluation.claims import Claim
from lib_memnoise.lab.evaluation.generators import MiniatureGenerator, WebUIGenerator
from lib_memnoise.lab.evaluation.plan import BadPlan, Plan, curve_of, document, make
from lib_memnoise.lab.evaluation.prompts import MINIATURE
from lib_memnoise.lab.evaluation.report import report
from lib_memnoise.lab.evaluation.results import Results
from lib_memnoise.lab.evaluation.run import PLAN, BadRun, Run
from lib_memnoise.lab.miniature import OneSentence


@dataclass(frozen=True, kw_only=True)
class GeneratorOptions:
    """Who makes the images: WebUIs, the workers of a Dask scheduler, or the miniature."""

    urls: Sequence[str] = ()
    """Of WebUIs; without any the miniature makes them."""
    auth: str | None = None
    dask: str | None = None
    """Address of a scheduler."""
    attempts: int
    """Of a WebUI that does not answer."""
    timeout: float
    """Seconds of a request."""
    variant: str
    """Of the miniature."""
    threads: int
    """That the miniature makes images in."""


@dataclass(frozen=True)
class Evaluated:
    """What came of a run."""

    results: Results
    claims: Sequence[Claim]
    page: Path
    told: dispatch.DispatchResult


def plan_of(folder: Path, name: str | None, changes: Mapping[str, Any]) -> Plan | None:
    """The plan of a preset or file, or the one that a run has, with changes; None: the one that the run has.

    Curves among the changes are texts such as `static:tau=780,740`.
    """
    given = dict(changes)
    if "ground_truth" in given:
        given["ground_truth"] = str(Path(given["ground_truth"]).resolve())
    if given.get("prompts") not in (None, MINIATURE):
        given["prompts"] = str(Path(given["prompts"]).resolve())
    if name is None and (folder / PLAN).is_file() and not given:
        return None
    found, called = document(name)
    prompts = references = None
    if name is None and (folder / PLAN).is_file():
        with Run(folder) as run:
            found, called = dict(run.plan.document), str(folder / PLAN)
            if not {"prompts", "ground_truth", "first"} & given.keys():
                prompts, references = run.plan.prompts, run.plan.references
    if "curves" in given:
        given["curves"] = [curve_of(text) for text in given["curves"]]
    merged = {**found, **given}
    if "prompts" not in merged or "curves" not in merged:
        raise BadPlan("what to generate is not said: --plan, or --prompts and --method.")
    return make(merged, called, prompts, references)


def evaluate(folder: Path, plan: Plan | None, wanted: GeneratorOptions, options: metrics.Options) -> Evaluated:
    """Make, measure and report; goes on where a run was stopped. Without a plan it is the run's own."""
    with writing(folder):
        run = Run(folder, writing=True) if plan is None else Run.begin(folder, plan)
    with run, writing(folder):
        _, lost = run.settle()
        if lost:
            say(f"{lost} pictures of the run are gone; they are made again.")
        try:
            told = generate(run, wanted)
        except (KeyboardInterrupt, OneSentence, OSError):
            say(f"{run.done} of {run.plan.total} images are there; the same command goes on.")
            raise
        with tqdm(desc="measuring", unit=" images", leave=False) as bar:
            absent = metrics.measure(run, options, progress=bar.update, say=say)
        found, judged, page = report(run, absent)
    return Evaluated(found, judged, page, told)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """An error of the file system that names no file names the folder: a full disk's does not."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.strerror is None:
            raise
        raise BadRun(f"{folder} cannot be written: {error.strerror}.") from None


def say(line: str) -> None:
    """A line beside the progress."""
    tqdm.write(line, file=sys.stderr)


def generate(run: Run, wanted: GeneratorOptions) -> dispatch.DispatchResult:
    """Make what is missing of a run."""
    if run.done == run.plan.total:
        return dispatch.DispatchResult()
    units = run.missing(run.plan.batch)
    urls = wanted.urls
    with tqdm(total=run.plan.total, initial=run.done, unit=" images", smoothing=0.05) as bar:

        def keep(unit: Any, made: Any) -> None:
            run.keep(unit, made)
            bar.update(len(made))

        if wanted.dask is not None:
            url = urls[0] if urls else ("" if run.plan.document["prompts"] == MINIATURE else "http://127.0.0.1:7860")
            return cluster.dispatch(
                wanted.dask, units, run.plan.request, keep, run.made_by,
                kind=wanted.variant, url=url, auth=wanted.auth, say=say,
            )  # fmt: skip
        each: list[dispatch.Generator] = []
        if urls:
            each += [WebUIGenerator(url, wanted.auth, wanted.timeout) for url in dict.fromkeys(urls)]
        else:
            import torch

            # Its layers are too small to be divided among threads.
            torch.set_num_threads(1)
            each += [MiniatureGenerator(wanted.variant) for _ in range(wanted.threads)]
        return dispatch.dispatch(each, units, run.plan.request, keep, run.made_by, patience=wanted.attempts, say=say)
