"""Per-sample adjustment by other step rules than Figure 7's AdamW, on the miniature and with the same stopping rule.

    python benchmarks/step_rules.py [--held-out] [--images 4] [--fraction 0.5]

Prints, for each rule, evaluations until the target, similarity, alignment and ‖x̃_T‖/√d. A rule is better only if it
needs fewer evaluations and is no worse in the other three. Rules were tried on the prompts that settings may be chosen
on; `--held-out` shows the others.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor
from tqdm import tqdm

from lib_memnoise.lab.bench import FirstDelta, make_network, noises
from lib_memnoise.lab.claims import interval
from lib_memnoise.lab.study import Subject, seed_of, study, subjects
from lib_memnoise.miniature.model import Miniature, load_miniature
from lib_memnoise.mitigations.per_sample import adjust
from lib_memnoise.prediction import Delta, magnitude, norm_ratio, per_image, select
from lib_memnoise.settings import Settings

MOST = 100

Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""`rule(x, gradient, value, target)`: the next x of the images still running."""


def polyak(length: float) -> Rule:
    """The step that reaches the target if ‖Δ‖ is linear: (‖Δ‖ − target) / ‖gradient‖² along the gradient."""

    def step(x: Tensor, gradient: Tensor, value: Tensor, target: Tensor) -> Tensor:
        return x - per_image(length * (value - target) / magnitude(gradient).square()) * gradient

    return step


def normalised(length: float) -> Rule:
    """A step of the same length every time."""

    def step(x: Tensor, gradient: Tensor, value: Tensor, target: Tensor) -> Tensor:
        return x - per_image(length / magnitude(gradient)) * gradient

    return step


def on_sphere(rule: Rule) -> Rule:
    """The rule, and ‖x‖ put back to what it was."""

    def step(x: Tensor, gradient: Tensor, value: Tensor, target: Tensor) -> Tensor:
        moved = rule(x, gradient, value, target)
        return moved * per_image(magnitude(x) / magnitude(moved))

    return step


RULES: dict[str, Rule] = {
    "Polyak 1": polyak(1.0),
    "Polyak 1.5": polyak(1.5),
    "Polyak 1, on the sphere": on_sphere(polyak(1.0)),
    "length 1": normalised(1.0),
    "length 2": normalised(2.0),
    "length 2, on the sphere": on_sphere(normalised(2.0)),
}
RATES = (0.01, 0.02, 0.05, 0.1)
"""AdamW's, the first is the paper's."""


def descend(x: Tensor, delta: Delta, rule: Rule, fraction: float) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, evaluations and whether the target was reached, an image: stops as `per_sample.adjust` does."""
    x = x.clone()
    taken = torch.zeros(len(x), dtype=torch.long)
    reached = torch.zeros(len(x), dtype=torch.bool)
    running, targets = list(range(len(x))), torch.zeros(len(x))
    for step in range(MOST + 1):
        latent = x[running].requires_grad_()
        value = magnitude(select(delta, running)(latent))
        if step == 0:
            targets = fraction * value.detach()
        below = value.detach() < targets[running]
        taken[running] += 1
        reached[running] = below
        going = [k for k in range(len(running)) if not below[k]]
        if not going or step == MOST:
            break
        (gradient,) = torch.autograd.grad(value[going].sum(), latent)
        running = [running[k] for k in going]
        x[running] = rule(latent.detach()[going], gradient[going], value.detach()[going], targets[running])
    return x, taken, reached


def report(model: Miniature, chosen: list[Subject], images: int, seed: int, fraction: float) -> None:
    every = [(s, i) for s in range(len(chosen)) for i in range(images)]
    x = noises([seed_of(s, i, seed) for s, i in every])
    delta = FirstDelta(make_network(model, [chosen[s].caption for s, _ in every]), "DDIM")

    def adamw(lr: float) -> tuple[Tensor, Tensor, Tensor]:
        found = adjust(x, delta, lr=lr, target=lambda before: fraction * before, max_steps=MOST)
        return found.x, found.steps + 1, found.reached

    ways = {f"AdamW {lr:g}": lambda lr=lr: adamw(lr) for lr in RATES}
    ways |= {name: lambda rule=rule: descend(x, delta, rule, fraction) for name, rule in RULES.items()}
    print(f"{'rule':26} evaluations  reached  similarity  copied  alignment  norm")
    for name, way in tqdm(ways.items(), leave=False):
        moved, evaluations, reached = way()
        result = study(model, chosen, Settings(enabled=False), images=images, seed=seed, replaced=moved)
        tqdm.write(
            f"{name:26} {evaluations.float().mean():11.2f} {reached.float().mean():8.2f} "
            f"{result.similarity.mean():11.3f} {result.copied.mean():7.2f} {result.alignment.mean():10.3f} "
            f"{norm_ratio(moved).mean():5.3f}"
        )


def paired(model: Miniature, chosen: list[Subject], images: int, seed: int, fraction: float) -> None:
    """The shipped rule against the paper's, as the extension runs them."""
    common = {"enabled": True, "method": "per_sample", "target": fraction, "target_kind": "fraction"}
    ways = ({"lr": 0.01}, {"lr": 0.06, "rule": "sphere"})
    adamw, sphere = (study(model, chosen, Settings(**common, **way), images=images, seed=seed) for way in ways)  # type: ignore[arg-type]
    print(f"{'':12} {'AdamW':>8} {'sphere':>8} difference")
    for name in ("similarity", "alignment", "norm", "forward", "backward"):
        before, after = getattr(adamw, name), getattr(sphere, name)
        difference = (after - before).mean(1)
        low, high = interval(len(chosen), statistic=lambda drawn, d=difference: d[drawn].mean())
        print(f"{name:12} {before.mean():8.3f} {after.mean():8.3f} {difference.mean():8.3f} [{low:.3f}, {high:.3f}]")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("rules", "paired"), default="rules")
    parser.add_argument("--held-out", action="store_true")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fraction", type=float, default=0.5)
    arguments = parser.parse_args()
    held_out = arguments.held_out or arguments.what == "paired"
    run = paired if arguments.what == "paired" else report
    chosen = subjects(memorised=True, held_out=held_out)
    run(load_miniature(), chosen, arguments.images, arguments.seed, arguments.fraction)


if __name__ == "__main__":
    main()
