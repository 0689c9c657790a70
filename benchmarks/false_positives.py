"""Which share of other ordinary prompts a calibration flags, with built-in prompts and with prompts of their kind.

    python -m lib_memnoise miniature install SD_WEBUI_DIR       # and a WebUI that has it loaded, run with --api
    python benchmarks/false_positives.py http://127.0.0.1:7860 [--count 500] [--steps 50]

Scores the miniature's held-out ordinary captions and memorised prompts in the WebUI, then calibrates with the built-in
prompts, and with other captions of the miniature. Prints the share above each threshold, with exact 95 % intervals.
It replaces the WebUI's calibration of the miniature at this size.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from scipy import stats
from tqdm import tqdm

from lib_memnoise.core.calibration import distinct
from lib_memnoise.lab.claims import ordinary_subjects
from lib_memnoise.lab.client import WebUI
from lib_memnoise.lab.experiment import seed_of, subjects

OWN = 22
"""The draw of the captions to calibrate with, none of which is counted."""
NOISES = 4
"""Of each memorised prompt."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--steps", type=int, default=50)
    arguments = parser.parse_args()
    webui = WebUI(arguments.url)
    given = {"width": 128, "height": 128, "sampler_name": "DDIM", "steps": arguments.steps}

    def scores(captions: list[str], noises: int, first: int) -> list[float]:
        found = []
        for k, caption in enumerate(tqdm(captions, leave=False)):
            seeds = [seed_of(k, i, first) for i in range(noises)]
            answer = webui.post("score", {**given, "prompt": caption, "seeds": seeds})
            found += [image["score"] for image in answer["images"]]
        return found

    ordinary = scores([subject.caption for subject in ordinary_subjects(arguments.count)], 1, 1)
    memorised = scores([subject.caption for subject in subjects(memorised=True, held_out=True)], NOISES, 7_000_001)
    own = distinct((subject.caption for subject in ordinary_subjects(1000, OWN)), 360)
    sources: dict[str, dict[str, Any]] = {
        "built-in": {},
        "120 of their kind": {"prompts": own[:120]},
        "240 of their kind": {"prompts": own[120:]},
    }
    for name, more in sources.items():
        made = webui.post("calibrate", {**given, **more})
        above, n = sum(score > made["threshold"] for score in ordinary), len(ordinary)
        interval = stats.binomtest(above, n).proportion_ci()
        caught = sum(score > made["threshold"] for score in memorised)
        print(
            f"{name}: threshold {made['threshold']:.4g}; of {n} ordinary prompts {above} are above it, "
            f"{above / n:.1%} [{interval.low:.1%}, {interval.high:.1%}]; of "
            f"{len(memorised)} memorised images {caught}. {made['promise']}."
        )


if __name__ == "__main__":
    main()
