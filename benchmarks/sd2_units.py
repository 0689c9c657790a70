"""Which reading of the paper's SD 2.0 settings lowers ‖Δ‖, on the v-prediction miniature.

    python benchmarks/sd2_units.py [--images 4] [--held-out]

γ̃, ρ and the learning rate are published without the space that they act in: the latents of unit variance, or those
scaled by σ_max that an Euler sampler starts from. Prints, for each reading of γ̃ and ρ, ‖Δ‖ after divided by ‖Δ‖ before
(mean over images) and the length of the noise. Settings were chosen on the prompts that are not held out.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from lib_memnoise.core.delta import magnitude, norm_ratio
from lib_memnoise.lab.experiment import seed_of, subjects
from lib_memnoise.lab.miniature.model import load_miniature
from lib_memnoise.lab.simulator import FirstDelta, make_network, noises
from lib_memnoise.methods.batch import BatchContext
from lib_memnoise.methods.pipeline import run
from lib_memnoise.settings import SIGMA_MAX, Settings

READINGS = {
    "γ̃ divided by σ_max, ρ not (the preset)": (0.7 / SIGMA_MAX, 30.0),
    "both divided": (0.7 / SIGMA_MAX, 30.0 / SIGMA_MAX),
    "nothing divided": (0.7, 30.0),
}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--held-out", action="store_true")
    parser.add_argument("--images", type=int, default=4)
    arguments = parser.parse_args()
    chosen = subjects(memorised=True, held_out=arguments.held_out)
    every = [(s, i) for s in range(len(chosen)) for i in range(arguments.images)]
    x = noises([seed_of(s, i, 0) for s, i in every])
    delta = FirstDelta(make_network(load_miniature("v"), [chosen[s].caption for s, _ in every]), "Euler")
    before = magnitude(delta(x))
    print(f"{len(chosen)} prompts, {arguments.images} images each; ‖Δ‖ {before.mean():.2f} in v")
    print(f"{'':42} after/before  length")
    for name, (gamma, rho) in READINGS.items():
        settings = Settings(enabled=True, preset="custom", gamma=gamma, rho=rho, steps=4, tau=917.449)
        moved = run(x, delta, settings.resolved("sd2_v"), BatchContext("v")).x
        ratio = (magnitude(delta(moved)) / before).mean()
        print(f"{name:42} {ratio:12.2f} {norm_ratio(moved).mean():7.2f}")


if __name__ == "__main__":
    main()
