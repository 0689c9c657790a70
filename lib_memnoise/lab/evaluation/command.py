"""The commands `evaluate`, `figures` and `compare`."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lib_memnoise.lab.evaluation import cluster, dispatch, metrics
from lib_memnoise.lab.evaluation.generators import MiniatureMaker, WebUIMaker
from lib_memnoise.lab.evaluation.plan import BadPlan, Plan, curve_of, document, make
from lib_memnoise.lab.evaluation.prompts import MINIATURE
from lib_memnoise.lab.evaluation.report import comparison, comparison_text, plain, report, text
from lib_memnoise.lab.evaluation.run import PLAN, BadRun, Run
from lib_memnoise.lab.miniature import OneSentence

_GIVEN = (
    "prompts", "ground_truth", "first", "images", "batch", "seed", "sampler", "scheduler", "steps", "cfg", "width",
    "height", "negative_prompt",
)  # fmt: skip


def plan_of(arguments: Namespace) -> Plan | None:
    """The plan that the command line asks for; None: the one that the run has."""
    given = {name: getattr(arguments, name) for name in _GIVEN if getattr(arguments, name) is not None}
    if given.get("ground_truth") is not None:
        given["ground_truth"] = str(Path(given["ground_truth"]).resolve())
    if given.get("prompts") not in (None, MINIATURE):
        given["prompts"] = str(Path(given["prompts"]).resolve())
    if arguments.metrics is not None:
        given["metrics"] = [metric for metric in arguments.metrics.split(",") if metric]
    if arguments.plan is None and not arguments.method and (arguments.run / PLAN).is_file() and not given:
        return None
    found, name = document(arguments.plan)
    prompts = references = None
    if arguments.plan is None and (arguments.run / PLAN).is_file():
        with Run(arguments.run) as run:
            found, name = dict(run.plan.document), str(arguments.run / PLAN)
            if not {"prompts", "ground_truth", "first"} & given.keys():
                prompts, references = run.plan.prompts, run.plan.references
    if arguments.method:
        given["curves"] = [curve_of(text) for text in arguments.method]
    merged = {**found, **given}
    if "prompts" not in merged or "curves" not in merged:
        raise BadPlan("what to generate is not said: --plan, or --prompts and --method.")
    return make(merged, name, prompts, references)


def evaluate(arguments: Namespace) -> None:
    """Make, measure and report; goes on where a run was stopped."""
    plan = plan_of(arguments)
    if arguments.dry_run:
        print(summary(plan or Run(arguments.run).plan))
        return
    if arguments.dask is not None and len(arguments.url or []) > 1:
        raise OneSentence(
            "with --dask one --url is enough: each worker's own (MEMNOISE_URL on a worker where it differs)."
        )
    with _writing(arguments.run):
        run = Run(arguments.run, writing=True) if plan is None else Run.begin(arguments.run, plan)
    with run, _writing(arguments.run):
        _, lost = run.settle()
        if lost:
            _say(f"{lost} pictures of the run are gone; they are made again.")
        try:
            told = generate(run, arguments)
        except (KeyboardInterrupt, OneSentence, OSError):
            _say(f"{run.done} of {run.plan.total} images are there; the same command goes on.")
            raise
        absent = measured(run, arguments)
        found, judged, page = report(run, absent)
    if arguments.json:
        print(
            json.dumps(
                {"points": records(found), "claims": [plain(claim) for claim in judged]}, indent=1, ensure_ascii=False
            )
        )
    else:
        print(text(found, judged))
        print(f"\nThe report is {page}.")
    for line in told.gone:
        _say(f"Given up on the way: {line}")
    if told.aside:
        reasons = sorted(set(told.aside.values()))
        count = sum(unit.count for unit in told.aside)
        raise OneSentence(f"{count} images could not be made; the same command tries again. {reasons[0]}")


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """An error of the file system that names no file names the folder: a full disk's does not."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.strerror is None:
            raise
        raise BadRun(f"{folder} cannot be written: {error.strerror}.") from None


def _say(line: str) -> None:
    tqdm.write(line, file=sys.stderr)


def generate(run: Run, arguments: Namespace) -> dispatch.Told:
    """Make what is missing of a run."""
    if run.done == run.plan.total:
        return dispatch.Told()
    units = run.missing(run.plan.batch)
    urls = arguments.url or []
    with tqdm(total=run.plan.total, initial=run.done, unit=" images", smoothing=0.05) as bar:

        def keep(unit: Any, made: Any) -> None:
            run.keep(unit, made)
            bar.update(len(made))

        if arguments.dask is not None:
            url = urls[0] if urls else ("" if run.plan.document["prompts"] == MINIATURE else "http://127.0.0.1:7860")
            return cluster.make(
                arguments.dask, units, run.plan.request, keep, run.made_by,
                kind=arguments.variant, url=url, auth=arguments.auth, say=_say,
            )  # fmt: skip
        makers: list[dispatch.Maker] = []
        if urls:
            makers += [WebUIMaker(url, arguments.auth, arguments.timeout) for url in dict.fromkeys(urls)]
        else:
            import torch

            # Its layers are too small to be divided among threads.
            torch.set_num_threads(1)
            makers += [MiniatureMaker(arguments.variant) for _ in range(arguments.threads)]
        return dispatch.make(makers, units, run.plan.request, keep, run.made_by, patience=arguments.attempts, say=_say)


def measured(run: Run, arguments: Namespace) -> dict[str, str]:
    options = metrics.Options(
        sscd=arguments.sscd,
        lpips=arguments.lpips_weights,
        device=arguments.device,
        **{
            name: value
            for name, value in (("clip", arguments.clip_weights), ("imagereward", arguments.imagereward_weights))
            if value is not None
        },
    )
    with tqdm(desc="measuring", unit=" images", leave=False) as bar:
        return metrics.measure(run, options, progress=bar.update, say=_say)


def records(found: Any) -> list[dict[str, Any]]:
    """A record for every point of the methods' and the adjustment's figures; NaN is null."""
    made = []
    for figure in ("adjustment", "methods"):
        for row in found.table(figure).to_dict("records"):
            made.append({"figure": figure, **{name: None if value != value else value for name, value in row.items()}})
    return made


def summary(plan: Plan) -> str:
    """What a plan asks for."""
    lines = [f"{plan.total} images: {len(plan.prompts)} prompts, {len(plan.points)} settings."]
    for curve in plan.curves:
        values = "" if curve.sweep is None else f", {curve.sweep} {', '.join(map(str, curve.strengths))}"
        lines.append(f"  {curve.name}{values} ({', '.join(curve.figures)})")
    return "\n".join(lines)


def figures(arguments: Namespace) -> None:
    """Draw a run's figures and page again, from its records."""
    with Run(arguments.run) as run, _writing(arguments.run):
        found, judged, page = report(run)
    print(text(found, judged))
    print(f"\nThe report is {page}.")


def compare(arguments: Namespace) -> None:
    """What changed from one run to another."""
    with Run(arguments.run_a) as a, Run(arguments.run_b) as b:
        data = comparison(a, b)
    if not len(data):
        raise BadRun(
            f"{arguments.run_a} and {arguments.run_b} have no measured images of the same settings, prompts and seeds."
        )
    if arguments.csv is not None:
        from lib_memnoise.core.files import replacing

        with replacing(arguments.csv) as partial:
            data.to_csv(partial, index=False)
    if arguments.json:
        print(data.to_json(orient="records", indent=1, force_ascii=False))
    else:
        print(comparison_text(data, arguments.run_a, arguments.run_b))


COMMANDS: dict[str, Callable[[Namespace], None]] = {"evaluate": evaluate, "figures": figures, "compare": compare}
