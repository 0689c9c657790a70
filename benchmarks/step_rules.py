"""Per-sample adjustment by other step rules than Figure 7's AdamW, on the miniature and with the same stopping rule.

    python benchmarks/step_rules.py [--held-out] [--images 4] [--fraction 0.5] [--processes 4]

Prints, for each rule, evaluations until the target, copies and similarity (any: the nearest of all memorised pictures;
own: the prompt's own), alignment and ‖x̃_T‖/√d. A rule is better only if it needs fewer evaluations and is no worse in
similarity (any), alignment and length. Rules were tried on the prompts that settings may be chosen
on; `--held-out` shows the others.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor

from lib_memnoise.core.delta import Delta, magnitude, norm_ratio, per_image, select
from lib_memnoise.lab.experiment import Subject, begin, seed_of, study, subjects
from lib_memnoise.lab.miniature.model import Miniature, load_miniature
from lib_memnoise.lab.processes import Workers
from lib_memnoise.lab.simulator import FirstDelta, make_network, noises
from lib_memnoise.lab.stats import interval
from lib_memnoise.methods.per_sample import adjust
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


WAYS = (*(f"AdamW {lr:g}" for lr in RATES), *RULES)
HEADER = f"{'rule':26} evaluations  reached  copied any, own  similarity any, own  alignment  norm"


def line(model: Miniature, name: str, chosen: list[Subject], images: int, seed: int, fraction: float) -> str:
    """What comes of a rule."""
    every = [(s, i) for s in range(len(chosen)) for i in range(images)]
    x = noises([seed_of(s, i, seed) for s, i in every])
    delta = FirstDelta(make_network(model, [chosen[s].caption for s, _ in every]), "DDIM")
    if name in RULES:
        moved, evaluations, reached = descend(x, delta, RULES[name], fraction)
    else:
        lr = RATES[WAYS.index(name)]
        found = adjust(x, delta, lr=lr, target=lambda before: fraction * before, max_steps=MOST)
        moved, evaluations, reached = found.x, found.steps + 1, found.reached
    result = study(model, chosen, Settings(enabled=False), images=images, seed=seed, replaced=moved)
    return (
        f"{name:26} {evaluations.float().mean():11.2f} {reached.float().mean():8.2f} "
        f"{result.copied.mean():11.2f} {result.copied_own.mean():4.2f} "
        f"{result.similarity.mean():14.3f} {result.similarity_own.mean():5.3f} {result.alignment.mean():9.3f} "
        f"{norm_ratio(moved).mean():5.3f}"
    )


def report(workers: Workers, chosen: list[Subject], images: int, seed: int, fraction: float) -> None:
    lines = [workers.submit(line, name, chosen, images, seed, fraction) for name in WAYS]
    print(HEADER)
    for future in lines:
        print(future.result(), flush=True)


def paired(workers: Workers, chosen: list[Subject], images: int, seed: int, fraction: float) -> None:
    """The shipped rule against the paper's, as the extension runs them."""
    common = {"enabled": True, "method": "per_sample", "target": fraction, "target_kind": "fraction"}
    ways = ({"lr": 0.01}, {"lr": 0.06, "rule": "sphere"})
    begun = [begin(workers, chosen, Settings(**common, **way), images=images, seed=seed) for way in ways]  # type: ignore[arg-type]
    adamw, sphere = (finish() for finish in begun)
    print(f"{'':14} {'AdamW':>8} {'sphere':>8} difference")
    for name in ("copied", "copied_own", "similarity", "similarity_own", "alignment", "norm", "forward", "backward"):
        before, after = (getattr(way, name).astype(float) for way in (adamw, sphere))
        difference = (after - before).mean(1)
        low, high = interval(len(chosen), statistic=lambda drawn, d=difference: d[drawn].mean())
        print(f"{name:14} {before.mean():8.3f} {after.mean():8.3f} {difference.mean():8.3f} [{low:.3f}, {high:.3f}]")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("rules", "paired"), default="rules")
    parser.add_argument("--held-out", action="store_true")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fraction", type=float, default=0.5)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="one thread each")
    arguments = parser.parse_args()
    held_out = arguments.held_out or arguments.what == "paired"
    run = paired if arguments.what == "paired" else report
    chosen = subjects(memorised=True, held_out=held_out)
    torch.set_num_threads(1)
    with Workers(load_miniature(), arguments.processes) as workers:
        run(workers, chosen, arguments.images, arguments.seed, arguments.fraction)


if __name__ == "__main__":
    main()
