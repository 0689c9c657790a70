"""Random token addition: tokens drawn at random between the prompt's words (Somepalli et al. 2023)."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from lib_memnoise.core.delta import Delta, working_precision
from lib_memnoise.methods.batch import BatchContext, Outcome, Prompt
from lib_memnoise.settings import ResolvedSettings

CONNECTED = re.compile(r"AND|BREAK|:\s*[+-]?[\d.]*\)*")
"""Pieces of a WebUI's prompt that belong to the word before them: nothing is inserted before these."""
WEIGHT = re.compile(r"[+-]?[\d.]+")
"""A weight that follows a colon and a blank."""
TRIES = 32
"""How often insertion is tried again until the prompt has the wanted number of tokens."""


def insert(text: str, vocabulary: Sequence[str], count: int, generator: torch.Generator) -> tuple[str, list[str]]:
    """Insert `count` tokens into a text, one after another, each at a random place between words.

    Args:
        vocabulary: the tokens to draw from, uniformly; "" is drawn again.

    Returns:
        The new text, and the inserted tokens.

    The words of a part (AND, BREAK) stay in that part, and its weight stays at its end. Nothing is inserted into
    square brackets: the WebUI uses one piece of their contents in some steps and another in others.
    """
    words, added = text.split(" "), []
    for _ in range(count):
        token = ""
        while not token:  # "" stands for a token that no prompt can spell
            token = vocabulary[_below(len(vocabulary), generator)]
        places = _places(words)
        words.insert(places[_below(len(places), generator)], token)
        added.append(token)
    return " ".join(words), added


def _places(words: Sequence[str]) -> list[int]:
    """The indices of the words before which a token may be inserted; `len(words)` is the end."""
    last, colon = words[-1], len(words) > 1 and words[-2].endswith(":")
    ends_with_weight = CONNECTED.fullmatch(last) or (colon and WEIGHT.fullmatch(last))
    places, depth = [], 0
    for place, word in enumerate(words):
        announced = place > 0 and words[place - 1].endswith(":") and WEIGHT.match(word)
        if depth == 0 and not announced and not CONNECTED.fullmatch(word):
            places.append(place)
        plain = re.sub(r"\\.", "", word)
        depth = max(0, depth + plain.count("[") - plain.count("]"))
    if depth == 0 and (not ends_with_weight or last.endswith(")")):
        places.append(len(words))
    return places or [0]


def _below(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (1,), generator=generator))


def mitigate(x: Tensor, delta: Delta, settings: ResolvedSettings, context: BatchContext) -> Outcome:
    """The noise unchanged, and every image's prompt with random tokens from the image's seed."""
    count, vocabulary = settings.tokens, context.vocabulary()
    if not vocabulary:
        raise RuntimeError("random tokens need a text encoder whose vocabulary can be read, and none was found")
    outcome = Outcome(working_precision(x), used={"tokens": count})
    if count == 0:
        return outcome
    for image, text in enumerate(context.texts):
        outcome.prompts[image] = Prompt(text=_with_tokens(text, vocabulary, count, context, image))
    return outcome


def _with_tokens(text: str, vocabulary: Sequence[str], count: int, context: BatchContext, image: int) -> str:
    """The text with exactly `count` more tokens, where the host can count them.

    Raises:
        RuntimeError: no try gave the prompt exactly so many more.
    """
    generator, before = context.generator(image), context.tokens(text)
    for _ in range(TRIES):
        longer, _ = insert(text, vocabulary, count, generator)
        if before is None or context.tokens(longer) == before + count:
            return longer
    raise RuntimeError(f"no random tokens were found with which the prompt has exactly {count} more")
