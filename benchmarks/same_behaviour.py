"""Whether two revisions behave alike: every contract scenario's answer, the JSON Schema and the commands' help.

    python benchmarks/same_behaviour.py BEFORE [AFTER] [-- arguments for pytest]

Each revision runs its own contract suite on its own double of a WebUI, in a work tree of its own, by this interpreter.
Of every request to the double the status, the sentence of a refusal, the infotexts and the SHA-256 of every picture are
written down. What differs between two runs of one revision (names of traces, times) is left out. Exits with 1, and says
what differs, if anything does.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RECORD = "MEMNOISE_RECORD"
"""Environment variable: the folder that answers are written into."""
CHANGING = re.compile(r"Memnoise trace id: \w+|Time taken: [^,]*")
VERBS = (
    "", "demo", "claims", "score", "calibrate", "schema", "miniature", "evaluate", "figures", "compare",
)  # fmt: skip


class Recorder:
    """A pytest plugin that writes down what the contract scenarios are answered."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.test = ""

    def pytest_runtest_setup(self, item: Any) -> None:
        self.test = item.nodeid

    def pytest_collection_finish(self) -> None:
        from tests.contract.conftest import Studio

        asked = Studio.answer

        def answer(studio: Any, args: Any = None, **payload: Any) -> Any:
            found = asked(studio, args, **payload)
            self.write(found)
            return found

        Studio.answer = answer  # type: ignore[method-assign]

    def write(self, found: Any) -> None:
        pictures = [hashlib.sha256(image.tobytes()).hexdigest() for image in getattr(found, "images", None) or []]
        texts = [CHANGING.sub("", text) for text in getattr(found, "infotexts", None) or []]
        record = [self.test, found.status, str(getattr(found, "detail", "")), texts, pictures]
        with (self.folder / f"{os.getpid()}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


if RECORD in os.environ:  # loaded by pytest, as a plugin
    _RECORDER = Recorder(Path(os.environ[RECORD]))
    pytest_runtest_setup = _RECORDER.pytest_runtest_setup

    def pytest_collection_finish(session: Any) -> None:
        _RECORDER.pytest_collection_finish()


@contextlib.contextmanager
def work_tree(revision: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", tree, revision], cwd=ROOT, check=True)
        try:
            yield tree
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", tree], cwd=ROOT, check=True)


def behaviour(revision: str, arguments: list[str]) -> dict[str, Any]:
    """By what was asked, what a revision answers."""
    with work_tree(revision) as tree, tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ, RECORD: folder, "PYTHONPATH": f"{tree}{os.pathsep}{Path(__file__).parent}", "COLUMNS": "120",
        }  # fmt: skip
        chosen = arguments or ["tests/contract", "-k", "double", "-n", "auto", "--dist", "loadscope"]
        command = [sys.executable, "-m", "pytest", "-q", "-p", "same_behaviour", "-p", "no:cacheprovider", *chosen]
        subprocess.run(command, cwd=tree, env=environment, check=False)
        found: dict[str, Any] = {}
        for path in Path(folder).glob("*.jsonl"):
            for line in path.read_text(encoding="utf-8").splitlines():
                test, *answer = json.loads(line)
                found.setdefault(test, []).append(answer)
        del environment[RECORD]
        for verb in VERBS:
            given = [verb, "--help"] if verb else ["--help"]
            run = [sys.executable, "-m", "lib_memnoise", *given]
            ended = subprocess.run(run, cwd=tree, env=environment, capture_output=True, text=True)
            found[" ".join(given)] = ended.returncode
        run = [sys.executable, "-m", "lib_memnoise", "schema"]
        found["schema"] = subprocess.run(run, cwd=tree, env=environment, capture_output=True, text=True).stdout
        return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before")
    parser.add_argument("after", nargs="?", default="HEAD")
    own, _, more = " ".join(sys.argv[1:]).partition(" -- ")
    options = parser.parse_args(own.split())
    before, after = (behaviour(revision, more.split()) for revision in (options.before, options.after))
    differing = [key for key in before if key in after and before[key] != after[key]]
    alone = sorted(before.keys() ^ after.keys())
    answers = sum(len(value) for value in after.values() if isinstance(value, list))
    print(f"{len(before)} before, {len(after)} after, {answers} answers")
    print(f"{len(differing)} differ, {len(alone)} are in one alone")
    for key in differing:
        print(f"differs: {key}")
        if isinstance(before[key], list):
            pairs = [pair for pair in zip(before[key], after[key]) if pair[0] != pair[1]]
            print("  {}\n  {}".format(*pairs[0]) if pairs else "  the number of answers")
    for key in alone:
        print(f"{'before' if key in before else 'after'} alone: {key}")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
