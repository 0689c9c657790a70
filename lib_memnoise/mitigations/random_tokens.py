"""Random token addition: tokens drawn at random between the prompt's words (Somepalli et al. 2023)."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from lib_memnoise.mitigations.outcome import Initial, Outcome, Prompt
from lib_memnoise.prediction import Delta, working_precision
from lib_memnoise.settings import Settings

CONNECTED = re.compile(r"AND|BREAK|:\s*-?[\d.]+")
"""What belongs to the word before it, in a WebUI's prompt: nothing is inserted before these."""


def insert(text: str, vocabulary: Sequence[str], count: int, generator: torch.Generator) -> tuple[str, list[str]]:
    """The text with `count` tokens more, each at a random place between words, and these tokens.

    Args:
        vocabulary: what is drawn from, uniformly, but for "". Each insertion sees the text with those before it.

    The words of a part (AND, BREAK) stay in it, and its weight stays at its end.
    """
    words, added = text.split(" "), []
    for _ in range(count):
        token = ""
        while not token:  # what cannot be written in a prompt is drawn again
            token = vocabulary[_below(len(vocabulary), generator)]
        places = [p for p in range(len(words) + 1) if p == len(words) or not CONNECTED.fullmatch(words[p])]
        if CONNECTED.fullmatch(words[-1]):
            places.remove(len(words))
        words.insert(places[_below(len(places), generator)], token)
        added.append(token)
    return " ".join(words), added


def _below(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (1,), generator=generator))


def mitigate(x: Tensor, delta: Delta, settings: Settings, initial: Initial) -> Outcome:
    """The noise as it is, and every image's prompt with tokens from the image's seed."""
    count, vocabulary = settings.tokens, initial.vocabulary()
    if not vocabulary:
        raise RuntimeError("random tokens need a text encoder whose vocabulary can be read, and none was found")
    outcome = Outcome(working_precision(x), used={"tokens": count})
    if count == 0:
        return outcome
    for image, text in enumerate(initial.texts):
        outcome.prompts[image] = Prompt(text=insert(text, vocabulary, count, initial.generator(image))[0])
    return outcome
