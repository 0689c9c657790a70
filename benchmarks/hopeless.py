"""When a per-sample descent may be given up: pace and window against every target, on the miniature.

    python benchmarks/hopeless.py [--images 2] [--controls] [--variant v]

Every descent is made with all its steps, which does not depend on the target. Then each target is asked for: whether it
is reached within the steps, whether the descent would have been given up before (which must not be), and how many steps
an unreachable one costs. Only prompts that settings may be chosen on.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor

from lib_memnoise.core.delta import magnitude
from lib_memnoise.lab.experiment import seed_of, subjects
from lib_memnoise.lab.miniature.model import load_miniature
from lib_memnoise.lab.simulator import FirstDelta, make_network, noises
from lib_memnoise.methods.descent import FAR, PATIENCE, is_far
from lib_memnoise.methods.per_sample import adjust
from lib_memnoise.settings import PRESET_VALUES

STEPS = int(PRESET_VALUES["sd1"]["max_steps"])
RULES = {
    "AdamW 0.01": {"lr": 0.01},
    "sphere 0.06": {"lr": 0.06, "rule": "sphere"},
}
TARGETS = tuple(0.9 * 0.93**k for k in range(60))
"""Fractions of the first ‖Δ‖, down to 0.012; SD 1.4's absolute one is 0.03 of the miniature's."""
PATIENCES = (5, 10, 20, 30)
FARS = (1.0, 1.5, 2.0)


class Recorded:
    """Δ, and the magnitudes of every evaluation."""

    def __init__(self, inner: FirstDelta) -> None:
        self.inner = inner
        self.values: list[Tensor] = []

    def __call__(self, x: Tensor) -> Tensor:
        delta = self.inner(x)
        self.values.append(magnitude(delta.detach()))
        return delta

    def select(self, images: list[int]) -> Recorded:
        return self  # all run to the end


def ended(lowest: Tensor, target: Tensor, patience: int, far: float) -> tuple[Tensor, Tensor]:
    """Steps until each image `(B,)` has its target, and until it is given up; more than all: never."""
    found = torch.full((2, lowest.shape[1]), STEPS + 1)
    for step in range(STEPS, -1, -1):
        found[0][lowest[step] < target] = step
        if patience <= step < STEPS:
            # with a target as many times larger it is what is shipped
            hopeless = is_far(lowest[step - patience], lowest[step], far / FAR * target, patience, STEPS - step)
            found[1][hopeless & (lowest[step] >= target)] = step
    return found[0], found[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--controls", action="store_true", help="prompts that are not memorised as well")
    parser.add_argument("--variant", choices=("eps", "v"), default="eps")
    arguments = parser.parse_args()
    model = load_miniature(arguments.variant)
    chosen = subjects(memorised=True, held_out=False)
    chosen += subjects(memorised=False, held_out=False) if arguments.controls else []
    every = [(s, i) for s in range(len(chosen)) for i in range(arguments.images)]
    x = noises([seed_of(s, i, 0) for s, i in every])
    print(f"{len(every)} images, {len(TARGETS)} targets each; shipped: {PATIENCE} steps, {FAR:g} times")
    for name, rule in RULES.items():
        delta = Recorded(FirstDelta(make_network(model, [chosen[s].caption for s, _ in every]), "DDIM", counted=False))
        adjust(x, delta, target=0.0, max_steps=STEPS, **rule)  # type: ignore[arg-type]
        lowest = torch.cummin(torch.stack(delta.values), 0).values
        print(f"{name}: {lowest[-1].div(lowest[0]).mean():.3f} of the first is left after {STEPS} steps")
        for patience, far in itertools.product(PATIENCES, FARS):
            reachable = cut = 0
            unreachable, spent = 0, 0.0
            for fraction in TARGETS:
                reached, given_up = ended(lowest, fraction * lowest[0], patience, far)
                there = reached <= STEPS
                reachable += int(there.sum())
                cut += int((given_up[there] < reached[there]).sum())
                unreachable += int((~there).sum())
                spent += float(given_up[~there].clamp_max(STEPS).sum())
            print(
                f"    {patience:2} steps, {far:g} times: of {reachable} reachable {cut} given up; "
                f"of {unreachable} unreachable, {spent / max(unreachable, 1):.0f} steps on average",
                flush=True,
            )


if __name__ == "__main__":
    main()
