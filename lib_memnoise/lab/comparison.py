"""The methods side by side on the miniature: the same noises, real samplers, no WebUI and no GPU.

The miniature is a real but very small Stable Diffusion that memorised some of its training pictures. What is shown
here is what happens on it; it is no evidence about the checkpoints people use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lib_memnoise.lab.experiment import Images, Subject, begin, record, subjects
from lib_memnoise.lab.miniature.model import Miniature
from lib_memnoise.lab.miniature.scenes import COLOURS, OBJECTS
from lib_memnoise.lab.miniature.text import words
from lib_memnoise.lab.miniature.yardsticks import COPIED
from lib_memnoise.lab.processes import Workers
from lib_memnoise.lab.simulator import PER_SAMPLE
from lib_memnoise.lab.text_table import aligned, markdown
from lib_memnoise.settings import Settings

COMPARED: dict[str, Settings] = {
    "none": Settings(enabled=False),
    "static tau": Settings(enabled=True, gamma=0.0),
    "batch-wise": Settings(enabled=True),
    "per-sample": PER_SAMPLE,
}
"""The paper's settings where it has some for the variant."""


def _with(method: str, **values: Any) -> Settings:
    return Settings(enabled=True, method=method, **values)


def _forward(part: float) -> Settings:
    return _with("per_sample", rule="forward", target=part, target_kind="fraction")


EVERY: dict[str, Settings] = {
    "none": Settings(enabled=False),
    "batch-wise": _with("batch_wise"),
    "batch-wise, dynamic": _with("batch_wise", guidance="transition"),
    "per-sample": PER_SAMPLE,
    "per-sample, static tau 900": replace(PER_SAMPLE, guidance="tau", tau=900.0),
    **{f"per-sample, forward to {part:g}": _forward(part) for part in (0.5, 0.25)},
    **{f"repulsion {beta:g}": _with("repulsion", beta=beta) for beta in (0.31, 0.5)},
    "repulsion 0.31, static tau 900": _with("repulsion", beta=0.31, guidance="tau", tau=900.0),
    **{f"static tau {tau:g}": _with("static", tau=tau) for tau in (900.0, 820.0, 740.0)},
    "dynamic": _with("dynamic"),
    **{f"opposite guidance {s:g}": _with("opposite_guidance", opposite=s) for s in (1.0, 5.0)},
    **{f"noise selection of {n}": _with("noise_selection", candidates=n) for n in (4, 16)},
    **{f"random tokens {n}": _with("random_tokens", tokens=n) for n in (1, 4)},
    **{
        f"prompt embedding to {part:g}": _with("prompt_embedding", target=part, target_kind="fraction")
        for part in (0.5, 0.25)
    },
    **{f"cross-attention {c:g}": _with("cross_attention", bos_scale=c) for c in (1.25, 2.0)},
    "cross-attention 1.25, no mask": _with("cross_attention", mask_padding=False),
    **{f"padding fix, {which}": _with("padding_fix", padding=which) for which in ("both", "pad", "end")},
    "SAIL to 0.5": _with("sail", target=0.5, target_kind="fraction"),
    **{f"DivIn {weight:g}": _with("divin", temperature=weight) for weight in (0.6, 0.01)},
}
"""Every method at values that the literature sweeps; targets are relative, for absolute ones belong to SD."""

STATEMENT = (
    "A miniature Stable Diffusion (128 px, 7 million weights) that memorised some of its training pictures.\n"
    "It shows what the methods do and cost on it; it is no evidence about the checkpoints people use."
)


@dataclass(frozen=True)
class Comparison:
    subjects: list[Subject]
    results: dict[str, Images]
    """By the methods' names."""
    records: list[dict[str, Any]]


def own_subjects(captions: Sequence[str]) -> list[Subject]:
    """Captions of the user's own; known prompts keep their memorised picture."""
    known = {
        subject.caption: subject
        for held_out in (True, False)
        for subject in subjects(memorised=True, held_out=held_out)
    }
    found = []
    for caption in captions:
        shown = tuple(word for word in words(caption) if word in OBJECTS or word in COLOURS)
        found.append(known.get(caption) or Subject(caption, shown, None))
    return found


def compare(
    model: Miniature,
    chosen: Sequence[Subject],
    *,
    images: int = 4,
    seed: int = 0,
    sampler: str = "DDIM",
    steps: int = 50,
    looking: bool = False,
    methods: Mapping[str, Settings] = COMPARED,
    processes: int = 1,
    progress: Callable[[int], None] = lambda done: None,
) -> Comparison:
    """Every one of these methods on the same noises.

    Keys of a record: `method`; `settings`, as the API takes them; `prompts`; `images`, of each prompt; `similarity`,
    to the nearest memorised picture; `copied`, the share of images whose similarity is above `COPIED`;
    `similarity_own` and `copied_own`, the same of the prompt's own memorised picture alone, None where no prompt has
    one; `alignment`, the detector's probability of what the prompt names; `rows` and `backward_rows`, network rows an
    image; `magnitude_before` and `magnitude_after`, ‖Δ(x_T, T)‖ and ‖Δ(x̃_T, T)‖ in the network's native output;
    `norm`, ‖x̃_T‖/√d. All but the first four are means over the images.

    Args:
        processes: that generate; the results are the same to the bit.
        progress: called with the number of images just finished, from any thread.
    """
    with Workers(model, processes) as workers:
        begun = {
            name: begin(
                workers,
                chosen,
                settings,
                images=images,
                seed=seed,
                sampler=sampler,
                steps=steps,
                looking=looking,
                progress=progress,
            )
            for name, settings in methods.items()
        }
        results = {name: finish() for name, finish in begun.items()}
    kind = model.parameterization
    records = [record(name, methods[name], kind, result) for name, result in results.items()]
    return Comparison(list(chosen), results, records)


def explanation(records: Sequence[Mapping[str, Any]]) -> list[str]:
    first = records[0]
    return [
        f"{first['prompts']} prompts, {first['images']} images each, the same noises for all methods.",
        "similarity: correlation with a memorised picture, blurred; copied: share of images whose similarity is above "
        f"{COPIED:g}.",
        "any: the nearest of all memorised pictures; own: the prompt's own alone.",
        "alignment: a detector's probability of what the prompt names.",
        "rows, backward: network rows evaluated and differentiated, an image.",
    ]


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """The records as plain text, with what the columns mean."""
    return "\n".join([STATEMENT, "", *aligned(records), "", *explanation(records)])


def markdown_table(records: Sequence[Mapping[str, Any]]) -> str:
    """The records as a Markdown table."""
    return "\n".join([*markdown(records), "", *explanation(records)])


def total(prompts: int, images: int, methods: Mapping[str, Settings] = COMPARED) -> int:
    """Images that `compare` makes."""
    return len(methods) * prompts * images
