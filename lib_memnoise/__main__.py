"""The command line: `python -m lib_memnoise`."""

from __future__ import annotations

import argparse
import errno
import io
import json
import math
import os
import sys
import webbrowser
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NoReturn

from lib_memnoise import __version__
from lib_memnoise.errors import echo, is_encodable
from lib_memnoise.lab.miniature import OneSentence
from lib_memnoise.settings import json_schema
from lib_memnoise.torch_utils.oom import is_out_of_memory

PAGE = "memnoise-demo.html"


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, without the usage in front."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """An argument type: a whole number from low to high."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(
                f"{echo(text, 40)} is not valid; it must be a whole number from {low} to {high}."
            )
        return value

    return parse


def number(text: str) -> float:
    """An argument type: a finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{echo(text, 40)} is not valid; it must be a number.")
    return value


def words(text: str) -> str:
    """An argument type: text, as a prompt is. Bytes that are none reach a program as unpaired surrogates."""
    if not is_encodable(text):
        raise argparse.ArgumentTypeError(f"{echo(text, 40)} is not valid; it must be text in the terminal's encoding.")
    return text


def schema(_: argparse.Namespace) -> None:
    print(json.dumps(json_schema(), indent=2, ensure_ascii=False))


def checked_page(path: Path) -> Path:
    """Where a page can be written, found out before anything is generated."""
    path = path.absolute()
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise PermissionError(errno.EACCES, "cannot be written", str(path))
    return path


def demo(arguments: argparse.Namespace) -> None:
    # Imported here: the other commands need no torch.
    import torch
    from tqdm import tqdm

    from lib_memnoise.lab.comparison import COMPARED, EVERY, compare, markdown_table, own_subjects, table, total
    from lib_memnoise.lab.experiment import subjects
    from lib_memnoise.lab.miniature.model import load_miniature

    path = arguments.page or (None if arguments.json else Path(PAGE))
    if path is not None:
        path = checked_page(path)
        from lib_memnoise.lab.demo_report import page
    torch.set_num_threads(arguments.threads)
    model = load_miniature(arguments.variant)
    if arguments.prompt:
        chosen = own_subjects(arguments.prompt)
    else:
        chosen = subjects(memorised=True, held_out=True)[: arguments.prompts]
    methods = EVERY if arguments.every_method else COMPARED
    with tqdm(total=total(len(chosen), arguments.images, methods), unit="image", leave=False) as bar:
        comparison = compare(
            model,
            chosen,
            methods=methods,
            images=arguments.images,
            seed=arguments.seed,
            sampler=arguments.sampler,
            steps=arguments.steps,
            looking=path is not None,
            processes=arguments.processes,
            progress=bar.update,
        )
    if arguments.json:
        print(json.dumps(comparison.records, indent=2))
    else:
        print((markdown_table if arguments.markdown else table)(comparison.records))
    if path is not None:
        from lib_memnoise.core.files import replacing

        with replacing(path) as partial:
            partial.write_text(page(comparison), encoding="utf-8")
        print(f"\nThe pictures are in {path}.", file=sys.stderr if arguments.json else sys.stdout)
        if arguments.open:
            webbrowser.open(path.as_uri())


def claims(arguments: argparse.Namespace) -> None:
    import torch
    from tqdm import tqdm

    from lib_memnoise.lab.claims import SHORT, Plan, judge, markdown_report, measure, report
    from lib_memnoise.lab.miniature.model import load_miniature

    torch.set_num_threads(arguments.threads)
    model = load_miniature()
    plan = SHORT if arguments.short else Plan()
    if arguments.images is not None:
        plan = replace(plan, images=arguments.images)
    with tqdm(total=plan.total, unit="image", leave=False) as bar:
        found = measure(model, plan, seed=arguments.seed, processes=arguments.processes, progress=bar.update)
    judged = judge(found)
    if arguments.json:
        print(json.dumps({"points": found.points, "claims": [asdict(claim) for claim in judged]}, indent=2))
    else:
        print((markdown_report if arguments.markdown else report)(found, judged))
    if not all(claim.holds for claim in judged if claim.required):
        raise SystemExit(1)


def request_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """What a WebUI is asked for: only what was given, so that its own defaults hold."""
    names = ("width", "height", "sampler_name", "scheduler", "steps", "cfg_scale", "negative_prompt", "seeds", "words")
    given = {name: getattr(arguments, name, None) for name in names}
    return {name: value for name, value in given.items() if value is not None and value is not False}


def score(arguments: argparse.Namespace) -> None:
    if arguments.url is None:
        return score_miniature(arguments)
    if not arguments.prompts:
        raise OneSentence("a prompt is needed to ask a WebUI for its score.")
    from lib_memnoise.lab.client import WebUI

    request = {"prompts": arguments.prompts, **request_of(arguments)}
    answer = WebUI(arguments.url, arguments.auth).post("score", request)
    if arguments.json:
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


def score_miniature(arguments: argparse.Namespace) -> None:
    """Without a WebUI: the miniature's scores of prompts, or how well its scores tell what it memorised."""
    foreign = [name for name in request_of(arguments) if name != "seeds"]
    if foreign:
        raise OneSentence(f"{foreign[0]} was given, which only a WebUI takes; --url names one.")
    if len(arguments.seeds or []) > 1:
        raise OneSentence("the miniature takes one --seed; --noises is how many are drawn from there on.")
    import torch
    from tqdm import tqdm

    from lib_memnoise.lab.detection import Plan, detect, documents, left_alone, left_alone_text, report
    from lib_memnoise.lab.miniature.model import load_miniature

    torch.set_num_threads(arguments.threads)
    model = load_miniature(arguments.variant)
    seed = (arguments.seeds or [1])[0]
    if arguments.prompts:
        from lib_memnoise.lab.claims import scores
        from lib_memnoise.lab.comparison import own_subjects

        found = scores(model, own_subjects(arguments.prompts), arguments.noises, seed)
        records = [{"prompt": text, "scores": row.tolist()} for text, row in zip(arguments.prompts, found)]
        if arguments.json:
            print(json.dumps(records, indent=2, ensure_ascii=False))
        else:
            for record in records:
                print(f"{sum(record['scores']) / len(record['scores']):9.4f}  {record['prompt']}")
        return
    if arguments.timesteps:
        from lib_memnoise.lab import timestep_transfer

        with tqdm(total=arguments.ordinary, unit="prompt", leave=False) as bar:
            along = timestep_transfer.scores(model, arguments.ordinary, seed=seed, progress=bar.update)
        if arguments.json:
            print(json.dumps(timestep_transfer.documents(along, arguments.variant), indent=2))
        else:
            print(timestep_transfer.report(along, arguments.variant))
        return
    plan = Plan(images=arguments.images, ordinary=arguments.ordinary)
    with tqdm(total=plan.total, unit="score", leave=False) as bar:
        lines = detect(model, plan, seed=seed, progress=bar.update)
    if arguments.json:
        print(json.dumps(documents(lines), indent=2))
    else:
        print(report(lines, plan))
        print(left_alone_text(left_alone(model, seed=seed)))


def captions_of(path: Path) -> list[str]:
    """Captions of a text file, one a line, as many as a WebUI takes."""
    from lib_memnoise.core.calibration import MOST, distinct

    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise OneSentence(f"{path} is no text file in UTF-8.") from None
    every = distinct(lines, len(lines))
    found = distinct(lines, MOST)
    if len(found) < len(every):
        print(f"{len(found)} of {len(every)} captions are taken, at even distances.", file=sys.stderr)
    return found


def calibrate(arguments: argparse.Namespace) -> None:
    from lib_memnoise.lab.client import WebUI

    request = request_of(arguments)
    if arguments.prompts is not None:
        request["prompts"] = captions_of(arguments.prompts)
    elif arguments.recent:
        request["source"] = "recent"
    made = WebUI(arguments.url, arguments.auth).post("calibrate", request)
    if arguments.json:
        print(json.dumps(made, indent=2, ensure_ascii=False))
        return
    print(
        f"{made['text']}, {made['width']}x{made['height']}: {made['lowest']:.4g} to {made['highest']:.4g}, median "
        f"{made['median']:.4g}; threshold {made['threshold']:.4g} ({made['promise']})"
    )
    for note in made["notes"]:
        print(f"note: {note}")


def miniature_train(arguments: argparse.Namespace) -> None:
    from lib_memnoise.lab.miniature.train import export, train

    train(arguments.folder, processes=arguments.processes, shipped=arguments.shipped_autoencoder)
    if arguments.export is not None:
        export(arguments.folder, arguments.export)


def miniature_install(arguments: argparse.Namespace) -> None:
    from lib_memnoise.lab.miniature.checkpoint import install

    variants = None if arguments.variant is None else (arguments.variant,)
    for path in install(
        arguments.webui, variants=variants, checkpoints=arguments.ckpt_dir, vocabulary=arguments.vocabulary
    ):
        print(path)


def miniature_check(_: argparse.Namespace) -> None:
    from lib_memnoise.lab.miniature.validation import report, validate

    print(report(validate()))


def evaluation(name: str) -> Callable[[argparse.Namespace], None]:
    """A command of the evaluation, whose packages are imported when it runs."""

    def run(arguments: argparse.Namespace) -> None:
        from lib_memnoise.lab.evaluation.command import COMMANDS

        COMMANDS[name](arguments)

    return run


def add_evaluation(add: Callable[..., Parser], commands: Any, threads: dict[str, Any]) -> None:
    """The commands `evaluate`, `figures` and `compare`."""
    command = add(
        commands,
        "evaluate",
        evaluation("evaluate"),
        "the paper's evaluation, on a WebUI or the miniature: generates, measures, draws; goes on where it was stopped",
    )
    command.add_argument("run", type=Path, metavar="RUN", help="the run's folder: a new one, or one to go on with")
    command.add_argument("--plan", metavar="NAME|FILE", help="paper-sd1, paper-sd2, miniature, or a YAML file")
    command.add_argument(
        "--url",
        action="append",
        type=words,
        help="of a WebUI with memnoise, run with --api; may be repeated, for each its own GPU",
    )
    command.add_argument(
        "--api-auth", "--auth", dest="auth", type=words, metavar="USER:PASSWORD", help="as the WebUI's --api-auth"
    )
    command.add_argument("--dask", metavar="ADDRESS", help="of a Dask scheduler, each of whose workers has a WebUI")
    command.add_argument("--dry-run", action="store_true", help="say what would be generated, and stop")
    command.add_argument("--json", action="store_true", help="print points and claims as JSON")
    group = command.add_argument_group("instead of what the plan says, or without one")
    group.add_argument("--prompts", metavar="FILE", help="the paper's .csv, .jsonl, or a caption a line")
    group.add_argument("--ground-truth", metavar="FOLDER", help="training pictures, a folder for every Index")
    group.add_argument("--first", type=whole_number(1, 10**6), metavar="N", help="only so many prompts")
    group.add_argument(
        "--method",
        action="append",
        metavar="METHOD:SETTING=VALUE,VALUE",
        help="none, static:tau=780,740 and so on; may be repeated",
    )
    group.add_argument("--images", type=whole_number(1, 1000), help="of each prompt at every strength")
    group.add_argument("--batch", type=whole_number(1, 64), help="images of one request")
    group.add_argument("--seed", type=whole_number(0, 2**32 - 1), help="of the first image")
    group.add_argument("--sampler", type=words, metavar="NAME", help="as the WebUI names it")
    group.add_argument("--scheduler", type=words, metavar="NAME", help="schedule type")
    group.add_argument("--steps", type=whole_number(1, 1000), help="of the sampler")
    group.add_argument("--cfg", type=number, metavar="SCALE", help="CFG scale")
    group.add_argument("--width", type=int, help="in pixels")
    group.add_argument("--height", type=int, help="in pixels")
    group.add_argument("--negative", dest="negative_prompt", type=words, metavar="PROMPT", help="negative prompt")
    group.add_argument("--metrics", metavar="NAME,NAME", help="sscd, clip, lpips, imagereward, similarity, diversity")
    group = command.add_argument_group("how")
    group.add_argument("--sscd", type=Path, metavar="FILE", help="sscd_disc_mixup, TorchScript or ONNX")
    group.add_argument("--clip-weights", metavar="FILE|NAME", help="open_clip's (default: laion2b_s34b_b79k)")
    group.add_argument("--lpips-weights", type=Path, metavar="FILE", help="AlexNet's (default: torchvision's download)")
    group.add_argument("--imagereward-weights", metavar="FILE|NAME", help="(default: ImageReward-v1.0)")
    group.add_argument("--device", default="cpu", help="where the metrics run (default: cpu)")
    group.add_argument(
        "--attempts", type=whole_number(1, 1000), default=15, help="of a WebUI that does not answer (default: 15)"
    )
    group.add_argument("--timeout", type=number, default=1800, metavar="SECONDS", help="of a request (default: 1800)")
    group.add_argument("--variant", choices=("eps", "v"), default="eps", help="of the miniature (default: eps)")
    group.add_argument("--threads", **threads)

    command = add(
        commands, "figures", evaluation("figures"), "draw an evaluation's figures and report from its records"
    )
    command.add_argument("run", type=Path, metavar="RUN")
    command = add(
        commands, "compare", evaluation("compare"), "what changed from one evaluation to another, with intervals"
    )
    command.add_argument("run_a", type=Path, metavar="RUN_A")
    command.add_argument("run_b", type=Path, metavar="RUN_B")
    command.add_argument("--csv", type=Path, metavar="FILE", help="also write the differences here")
    command.add_argument("--json", action="store_true", help="print them as JSON")


def parser() -> argparse.ArgumentParser:
    top = Parser(
        prog="python -m lib_memnoise",
        description="memnoise: adjusts initial noise so that text-to-image models do not copy training images.",
    )
    top.add_argument("--version", action="version", version=f"memnoise {__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(commands: Any, name: str, run: Callable[[argparse.Namespace], None], text: str) -> Parser:
        command: Parser = commands.add_parser(name, help=text, description=text)
        command.set_defaults(command=run)
        return command

    add(
        commands,
        "schema",
        schema,
        "print the JSON Schema of the settings, the document that the WebUI serves at /memnoise/v1/schema",
    )

    seeds, counts = whole_number(0, 2**32 - 1), whole_number(1, 1000)
    threads: dict[str, Any] = {
        "type": whole_number(1, 64),
        "default": min(os.cpu_count() or 1, 64),
        "help": "(default: all processors)",
    }

    def divided(command: Parser, records: str) -> None:
        """Of what is generated in several processes, and printed as text, Markdown or JSON."""
        command.add_argument(
            "--processes", type=whole_number(1, 64), default=threads["default"],
            help="that generate, whose number changes no result (default: one for each processor)",
        )  # fmt: skip
        command.add_argument("--threads", type=whole_number(1, 64), default=1, help="of each process (default: 1)")
        form = command.add_mutually_exclusive_group()
        form.add_argument("--markdown", action="store_true", help="print tables in Markdown")
        form.add_argument("--json", action="store_true", help=f"print {records} as JSON")

    command = add(
        commands,
        "demo",
        demo,
        "compare the methods without a WebUI or GPU, on a miniature Stable Diffusion that memorised pictures",
    )
    command.add_argument(
        "--prompt", action="append", type=words, help="your own, instead of memorised ones; may be repeated"
    )
    command.add_argument("--prompts", type=whole_number(1, 12), default=4, help="memorised prompts (default: 4)")
    command.add_argument("--every-method", action="store_true", help="all methods, at several strengths")
    command.add_argument("--images", type=counts, default=4, help="images a prompt (default: 4)")
    command.add_argument("--seed", type=seeds, default=0, help="of the first image (default: 0)")
    command.add_argument("--sampler", choices=("DDIM", "Euler"), default="DDIM", help="(default: DDIM)")
    command.add_argument("--steps", type=whole_number(2, 1000), default=50, help="of the sampler (default: 50)")
    command.add_argument("--variant", choices=("eps", "v"), default="eps", help="what it predicts (default: eps)")
    divided(command, "a list of records")
    command.add_argument(
        "--page", type=Path, metavar="FILE", help=f"where to write the page (default: {PAGE}; with --json none)"
    )
    command.add_argument("--open", action="store_true", help="open the page")

    command = add(commands, "claims", claims, "measure the paper's claims on the miniature; fails if one does not hold")
    command.add_argument("--short", action="store_true", help="fewer images and points")
    command.add_argument("--images", type=counts, help="images a prompt at every point (default: 18)")
    command.add_argument("--seed", type=seeds, default=1, help="of the first image (default: 1)")
    divided(command, "points and claims")

    def webui(command: Parser, *, required: bool) -> None:
        command.add_argument("--url", type=words, required=required, help="of a WebUI with memnoise, run with --api")
        command.add_argument(
            "--auth", "--api-auth", type=words, metavar="USER:PASSWORD", help="where it runs with --api-auth"
        )
        for name in ("width", "height"):
            command.add_argument(f"--{name}", type=whole_number(64, 2048), help="in pixels")
        command.add_argument("--sampler", dest="sampler_name", type=words, metavar="NAME", help="as the WebUI names it")
        command.add_argument("--scheduler", type=words, metavar="NAME", help="schedule type")
        command.add_argument("--steps", type=whole_number(1, 150), help="of the sampler")
        command.add_argument("--cfg", dest="cfg_scale", type=number, metavar="SCALE", help="CFG scale")
        command.add_argument("--json", action="store_true", help="print the answer as JSON")

    command = add(
        commands,
        "score",
        score,
        "score prompts without generating: in a WebUI, or on the miniature; "
        "without prompts, measure how well the miniature's scores tell memorised prompts from ordinary ones",
    )
    command.add_argument("prompts", nargs="*", type=words, metavar="PROMPT")
    webui(command, required=False)
    command.add_argument("--negative", dest="negative_prompt", type=words, metavar="PROMPT", help="negative prompt")
    command.add_argument("--seed", dest="seeds", action="append", type=seeds, help="may be repeated (WebUI: random)")
    command.add_argument("--words", action="store_true", help="WebUI: also how much each word has to do with it")
    command.add_argument("--noises", type=counts, default=8, help="miniature: averaged over so many (default: 8)")
    command.add_argument("--images", type=counts, default=16, help="of each memorised prompt (default: 16)")
    command.add_argument("--ordinary", type=whole_number(20, 100_000), default=500, help="(default: 500)")
    command.add_argument("--variant", choices=("eps", "v"), default="eps", help="of the miniature (default: eps)")
    command.add_argument(
        "--timesteps",
        action="store_true",
        help="miniature: false positives of ordinary prompts by a threshold of another first timestep",
    )
    command.add_argument("--threads", **threads)

    command = add(
        commands, "calibrate", calibrate, "have a WebUI score ordinary prompts on its checkpoint and keep that"
    )
    webui(command, required=True)
    sources = command.add_mutually_exclusive_group()
    sources.add_argument("--prompts", type=Path, metavar="FILE", help="captions such as you use, one a line")
    sources.add_argument("--recent", action="store_true", help="those of the pictures that the WebUI saved last")

    add_evaluation(add, commands, threads)

    text = "the miniature model"
    miniature = commands.add_parser("miniature", help=text, description=text)
    parts = miniature.add_subparsers(title="commands", metavar="COMMAND", required=True)
    command = add(parts, "train", miniature_train, "train the miniature from its sprites; goes on where it was stopped")
    command.add_argument("folder", type=Path, help="where the work is kept (about 1 GB)")
    command.add_argument("--processes", type=whole_number(1, 64), default=2, help="one thread each (default: 2)")
    command.add_argument("--shipped-autoencoder", action="store_true", help="begin with it, not from nothing")
    command.add_argument("--export", type=Path, metavar="FOLDER", help="also pack the result into this folder")
    command = add(parts, "install", miniature_install, "put the miniature's checkpoints into a WebUI")
    command.add_argument("webui", type=Path, metavar="SD_WEBUI_DIR", help="the WebUI's folder, with its launch.py")
    command.add_argument("--variant", choices=("eps", "v"), help="only this one")
    command.add_argument("--ckpt-dir", type=Path, metavar="FOLDER", help="where the WebUI looks for checkpoints")
    command.add_argument("--vocabulary", type=Path, metavar="FILE", help="CLIP's bpe_simple_vocab_16e6.txt.gz")
    add(parts, "check", miniature_check, "measure the yardsticks and the autoencoder on real pictures")
    return top


def main(argv: Sequence[str] | None = None) -> None:
    for stream in (sys.stdout, sys.stderr):
        # γ̃ and ‖Δ‖ are in the output, and a redirected stream on Windows has no UTF-8 of its own.
        if isinstance(stream, io.TextIOWrapper):
            # What no encoding has, such as a file's name that is no text, is escaped.
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    arguments = parser().parse_args(argv)
    try:
        arguments.command(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has seen enough (`| head`). Python flushes once more on its way out: into nothing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except OneSentence as error:
        raise SystemExit(f"memnoise: {error}") from None
    except OSError as error:
        named = f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error)
        raise SystemExit(f"memnoise: {named}.") from None
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise SystemExit("memnoise: there is not enough memory.") from None
    except ModuleNotFoundError as error:
        extra = "evaluate,demo" if arguments.command.__qualname__.startswith("evaluation") else "demo"
        hint = f'python -m pip install ".[{extra}]" installs what this command needs.'
        raise SystemExit(f"memnoise: the package {error.name} is missing; {hint}") from None


if __name__ == "__main__":
    main()
