"""A run's folder: the plan, the prompts, the pictures, and a database of what is known of them.

A picture is written whole, with its record inside, before the database hears of it: killed at any moment, a run goes on
where it was, and a picture whose record did not get into the database is taken from its file.
"""

from __future__ import annotations

import io
import json
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout
from PIL import Image, PngImagePlugin

from lib_memnoise import __version__
from lib_memnoise.core.files import replacing
from lib_memnoise.lab.evaluation.plan import Plan, Unit, chunks, make
from lib_memnoise.lab.evaluation.prompts import Prompt
from lib_memnoise.lab.miniature import OneSentence

PLAN, PROMPTS, SOURCE, DATABASE, LOCK = "plan.json", "prompts.jsonl", "source.json", "records.sqlite", "lock"
REFERENCES = "references.json"
"""Names of all training pictures; runs of version 0.1.0 have none."""
_FIRST = (LOCK, PROMPTS, REFERENCES)
"""What a run writes before its plan."""
NEAREST = ("sscd", "similarity")
"""Metrics of copying. Under their name: of the nearest of all training pictures; with `_own`: of the prompt's own."""
CHUNK = "memnoise"
"""The PNG's text chunk that holds the record."""
OLD, FORMAT = 1, 2
"""The old one, version 0.1.0's: the prompts' own training pictures alone, likeness to these under the metric's name."""
TABLES = """
create table if not exists images (
    point text, prompt integer, image integer, seed integer, record text,
    primary key (point, prompt, image)) without rowid;
create table if not exists measures (
    point text, prompt integer, image integer, metric text, value real,
    primary key (point, prompt, image, metric)) without rowid;
create table if not exists metrics (metric text primary key, source text);
"""


def columns_of(metric: str) -> tuple[str, ...]:
    """The names under which a metric's measures are kept."""
    return (metric, f"{metric}_own") if metric in NEAREST else (metric,)


class BadRun(OneSentence):
    """A run's folder that cannot be used, and why."""


@dataclass
class Record:
    """What is known of an image beside its picture. None: not measured."""

    seed: int
    rows: float | None = None
    """Network rows of the image, forward, the sampler's included where they are known."""
    backward_rows: float | None = None
    before: float | None = None
    """‖Δ(x_T, T)‖."""
    after: float | None = None
    """‖Δ(x̃_T, T)‖."""
    norm: float | None = None
    """‖x̃_T‖/√d."""
    seconds: float | None = None
    """Of its request, divided by the images in it."""
    memory: float | None = None
    """Peak of its request's GPU memory, in bytes."""
    failed: str | None = None
    """Why it was not mitigated although that was asked for."""
    notes: list[str] = field(default_factory=list)
    trace: list[list[float]] = field(default_factory=list)
    """Timestep and ‖Δ‖ along the trajectory."""


@dataclass(frozen=True)
class GeneratedImage:
    """An image that came back."""

    picture: bytes
    """PNG, its record inside (see `packed`)."""
    record: Record


def packed(picture: Image.Image, record: Record) -> bytes:
    """A picture as PNG, with the record and whatever text the picture came with."""
    info = PngImagePlugin.PngInfo()
    for key, value in picture.info.items():
        if isinstance(value, str):
            info.add_itxt(key, value)
    info.add_itxt(CHUNK, json.dumps(asdict(record)))
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def unpacked(path: Path) -> Record | None:
    """The record of a picture's file; None where it has none that can be read."""
    try:
        with Image.open(path) as picture:
            picture.load()
            return Record(**json.loads(picture.text[CHUNK]))  # type: ignore[attr-defined]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SyntaxError):
        return None


class Run:
    """A run's folder, opened. A context manager; `writing` keeps others from writing meanwhile.

    Raises:
        BadRun: it is no run, belongs to another plan, or another process writes to it.
    """

    def __init__(self, folder: Path, *, writing: bool = False, lock: FileLock | None = None) -> None:
        if not (folder / PLAN).is_file():
            raise BadRun(f"{folder} is no run; `evaluate` makes one.")
        self.folder = folder
        self._lock = lock or (_locked(folder) if writing else None)
        try:
            self._open()
        except BaseException:
            self._release()
            raise

    def _open(self) -> None:
        try:
            stored = json.loads((self.folder / PLAN).read_text(encoding="utf-8"))
            if stored["format"] not in (OLD, FORMAT):
                raise BadRun(f"{self.folder} was written by another memnoise ({stored['version']}).")
            lines = (self.folder / PROMPTS).read_text(encoding="utf-8").splitlines()
            prompts = tuple(
                Prompt(**{**json.loads(line), "references": tuple(json.loads(line)["references"])}) for line in lines
            )
            references = None
            if (self.folder / REFERENCES).exists():
                references = tuple(json.loads((self.folder / REFERENCES).read_text(encoding="utf-8")))
        except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
            raise BadRun(f"{self.folder} is damaged: {PLAN} or {PROMPTS} cannot be read ({error}).") from None
        # With the prompts that were stored beside it, not those that its files may have now.
        self.plan = make(stored["plan"], prompts=prompts, references=references)
        self._old = stored["format"] == OLD
        path = self.folder / DATABASE
        if self._lock is None and not path.exists():
            path = Path(":memory:")
        self._database = sqlite3.connect(path, check_same_thread=False)
        self._turn = threading.RLock()
        with self._writing():
            self._database.executescript("pragma journal_mode = wal; pragma synchronous = normal;" + TABLES)
        if self._old and self._lock is not None:
            self._renew()

    def _renew(self) -> None:
        """What the old format measured of the prompts' own pictures gets the name that this has now."""
        with self._writing():
            for table in ("measures", "metrics"):
                self._database.executemany(
                    f"update or replace {table} set metric = ? where metric = ?",
                    [(f"{name}_own", name) for name in NEAREST],
                )
        self._write_plan(self.folder, self.plan)
        self._old = False

    def _known_as(self, metric: str) -> str:
        return f"{metric}_own" if self._old and metric in NEAREST else metric

    @classmethod
    def begin(cls, folder: Path, plan: Plan) -> Run:
        """A new run, or the one that is there if it is of this plan.

        Raises:
            BadRun: the folder has another plan's images, or other files.
        """
        # What a run that was stopped at its very beginning leaves behind is no other file.
        if (
            folder.is_dir()
            and not (folder / PLAN).exists()
            and any(file.name not in _FIRST and file.suffix != ".partial" for file in folder.iterdir())
        ):
            raise BadRun(f"{folder} has other files in it; a new run takes an empty folder.")
        folder.mkdir(parents=True, exist_ok=True)
        lock = _locked(folder)
        try:
            if not (folder / PLAN).exists():
                cls._write_plan(folder, plan)
            run = cls(folder, lock=lock)
        except BaseException:
            lock.release()
            raise
        try:
            run._goes_on_with(plan)
        except BaseException:
            run.__exit__(None, None, None)
            raise
        return run

    @staticmethod
    def _write_plan(folder: Path, plan: Plan) -> None:
        """Prompts first: a folder with a plan is a run."""
        lines = [json.dumps(asdict(prompt), ensure_ascii=False) for prompt in plan.prompts]
        with replacing(folder / PROMPTS) as partial:
            partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
        with replacing(folder / REFERENCES) as partial:
            partial.write_text(json.dumps(plan.references, indent=0, ensure_ascii=False), encoding="utf-8")
        text = json.dumps({"format": FORMAT, "version": __version__, "plan": dict(plan.document)}, indent=1)
        with replacing(folder / PLAN) as partial:
            partial.write_text(text, encoding="utf-8")

    def _goes_on_with(self, plan: Plan) -> None:
        mine, asked = self.plan.defining(), plan.defining()
        for name in mine:
            if mine[name] != asked.get(name):
                had, given = _differing(mine[name], asked.get(name))
                raise BadRun(f"{self.folder} holds another plan's images: {name} is {had} there and {given} here.")
        # What does not change an image may be another: metrics, names of curves, images a request, training pictures.
        pairs = enumerate(zip(self.plan.prompts, plan.prompts))
        changed = [(number,) for number, (had, given) in pairs if had.references != given.references]
        with self._writing():
            self._database.executemany("delete from measures where prompt = ?", changed)
            if set(self.plan.references) != set(plan.references):
                # The nearest may be another now, of any prompt.
                self._database.executemany("delete from measures where metric = ?", [(name,) for name in NEAREST])
        self._write_plan(self.folder, plan)
        self.plan = plan

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._database.close()
        self._release()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()

    # Where the images come from

    @property
    def source(self) -> dict[str, Any]:
        """The checkpoint and the versions that made the images; empty before the first."""
        try:
            return dict(json.loads((self.folder / SOURCE).read_text(encoding="utf-8")))
        except (FileNotFoundError, ValueError):
            return {}

    def made_by(self, source: Mapping[str, Any], generator: str) -> None:
        """Images come from this origin, of the generator of that name.

        Raises:
            BadRun: those that are there came from elsewhere.
        """
        known = self.source
        for name in known:
            if known[name] != source.get(name):
                raise BadRun(
                    f"{self.folder} holds images of another origin than {generator}'s: {name} is {known[name]} there "
                    f"and {source.get(name)} here."
                )
        if not known:
            with replacing(self.folder / SOURCE) as partial:
                partial.write_text(json.dumps(dict(source), indent=1), encoding="utf-8")

    # Images

    def picture(self, point: str, prompt: int, image: int) -> Path:
        return self.folder / "images" / point / f"{prompt:06d}-{image:03d}.png"

    def keep(self, unit: Unit, made: Sequence[GeneratedImage]) -> None:
        """Images that came back: their files, then what is known of them. Those that are there already stay."""
        known = set(self._numbers(unit.point, unit.prompt))
        new = [(image, each) for image, each in enumerate(made, unit.first) if image not in known]
        for image, each in new:
            with replacing(self.picture(unit.point, unit.prompt, image)) as partial, partial.open("wb") as file:
                file.write(each.picture)
                file.flush()
                os.fsync(file.fileno())  # the database must not outlive a power cut that the picture does not
        self._insert((unit.point, unit.prompt, image, each.record) for image, each in new)

    def _insert(self, rows: Iterable[tuple[str, int, int, Record]]) -> None:
        values = [
            (point, prompt, image, record.seed, json.dumps(asdict(record))) for point, prompt, image, record in rows
        ]
        with self._writing():
            self._database.executemany("insert or replace into images values (?, ?, ?, ?, ?)", values)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """A transaction, and its error as one sentence."""
        try:
            with self._turn, self._database:
                yield
        except sqlite3.DatabaseError as error:
            raise BadRun(f"{self.folder / DATABASE} cannot be written: {error}.") from None

    def forget(self, point: str, prompt: int, image: int) -> None:
        """Drop an image that cannot be read: it is made again when the run goes on."""
        self.picture(point, prompt, image).unlink(missing_ok=True)
        self._drop([(point, prompt, image)])

    def _drop(self, images: Sequence[tuple[str, int, int]]) -> None:
        with self._writing():
            for table in ("images", "measures"):
                self._database.executemany(f"delete from {table} where point = ? and prompt = ? and image = ?", images)

    def _numbers(self, point: str, prompt: int) -> list[int]:
        query = "select image from images where point = ? and prompt = ?"
        with self._turn:  # units are looked for by generators' threads
            return [int(image) for (image,) in self._database.execute(query, (point, prompt))]

    @property
    def done(self) -> int:
        """Images that are there."""
        return int(self._database.execute("select count(*) from images").fetchone()[0])

    def settle(self) -> tuple[int, int]:
        """Make files and database agree: pictures taken over from their files, and records dropped for want of one."""
        adopted, lost = [], []
        for folder in (self.folder, self.folder / "figures"):
            _remove_partials(folder)
        for key, point in self.plan.points.items():
            folder = self.folder / "images" / key
            files = {path.stem for path in folder.glob("*.png")} if folder.is_dir() else set()
            _remove_partials(folder)
            known = {
                f"{prompt:06d}-{image:03d}": (prompt, image)
                for prompt, image in self._database.execute("select prompt, image from images where point = ?", (key,))
            }
            lost += [(key, *known[name]) for name in known.keys() - files]
            for name in files - known.keys():
                prompt, _, image = name.partition("-")
                if not (prompt.isdigit() and image.isdigit()):
                    continue
                place = int(prompt), int(image)
                record = (
                    unpacked(folder / f"{name}.png") if place[0] < point.prompts and place[1] < point.images else None
                )
                if record is not None and record.seed == self.plan.seed_of(*place):
                    adopted.append((key, *place, record))
        self._insert(adopted)
        self._drop(lost)
        return len(adopted), len(lost)

    def missing(self, batch: int) -> Iterator[Unit]:
        """What is left to make, at most `batch` images at once. Looks as it goes along."""
        for point, prompt, images in self.plan.wanted():
            known = set(self._numbers(point, prompt))
            if len(known) < images:
                left = [image for image in range(images) if image not in known]
                yield from (Unit(point, prompt, first, count) for first, count in chunks(left, batch))

    # Measures

    def unmeasured(self, metric: str) -> Iterator[tuple[str, int, list[int]]]:
        """Point, prompt and images whose measure by a metric is missing, prompt by prompt.

        Of a prompt all images are given, also those that are measured already: some metrics compare them.
        """
        points = self.plan.measured()
        for key, prompt, _ in self.plan.wanted():
            if key not in points:
                continue
            numbers = self._numbers(key, prompt)
            found = self._database.execute(
                "select count(*) from measures where point = ? and prompt = ? and metric = ?", (key, prompt, metric)
            ).fetchone()
            if numbers and int(found[0]) < len(numbers):
                yield key, prompt, numbers

    def measure(self, metric: str, point: str, prompt: int, values: Mapping[int, float | None]) -> None:
        rows = [(point, prompt, image, metric, value) for image, value in values.items()]
        with self._writing():
            self._database.executemany("insert or replace into measures values (?, ?, ?, ?, ?)", rows)

    def measured_with(self, metric: str, source: str) -> bool:
        """The weights that a metric measures with; measures with others are dropped. True: there were some."""
        known = self.metrics.get(metric)
        with self._writing():
            if known not in (None, source):
                self._database.execute("delete from measures where metric = ?", (metric,))
            self._database.execute("insert or replace into metrics values (?, ?)", (metric, source))
        return known not in (None, source)

    @property
    def metrics(self) -> dict[str, str]:
        """The metrics that measured something, by the names of their measures, and with what."""
        found = self._database.execute("select metric, source from metrics")
        return {self._known_as(metric): source for metric, source in found}

    # For the results

    def rows(self) -> Iterator[tuple[str, int, int, int, str]]:
        """Point, prompt, image, seed and record (JSON) of every image."""
        yield from self._database.execute("select point, prompt, image, seed, record from images")

    def measures(self) -> Iterator[tuple[str, int, int, str, float | None]]:
        """Point, prompt, image, metric and value."""
        for *place, metric, value in self._database.execute("select point, prompt, image, metric, value from measures"):
            yield (*place, self._known_as(metric), value)


def _remove_partials(folder: Path) -> None:
    """What a killed process was about to write."""
    with suppress(OSError):
        for partial in folder.glob(".*.partial"):
            partial.unlink()


def _locked(folder: Path) -> FileLock:
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise BadRun(f"another process is at work on {folder}.") from None
    return lock


def _differing(mine: Any, asked: Any) -> tuple[str, str]:
    """What two values differ in, shortly."""
    if isinstance(mine, list) and isinstance(asked, list):
        only = [[str(value) for value in a if value not in b] for a, b in ((mine, asked), (asked, mine))]
        had, given = (
            ", ".join(values[:3]) + (f" and {len(values) - 3} more" if len(values) > 3 else "") or "nothing more"
            for values in only
        )
        return had, given
    return str(mine), str(asked)
