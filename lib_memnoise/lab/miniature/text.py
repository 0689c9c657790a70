"""Captions to CLIP's tokens.

Every word of the miniature's captions is one token of CLIP's vocabulary, so splitting at spaces and commas is what
CLIP's tokenizer does. Networks are trained and packed with a table of these words alone; `clip_id` says where its
rows belong in CLIP's table of 49408.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from lib_memnoise.lab.miniature import OneSentence
from lib_memnoise.lab.miniature.clip import CLIP_END, CLIP_START

LENGTH = 77
START, END, UNKNOWN = 0, 1, 2
"""Rows of the small table. Words that the miniature never saw share a row of their own."""
SPECIAL = 3


class TooLong(OneSentence, ValueError):
    """A caption has more words than the text encoder takes."""


class UnknownWords(OneSentence, ValueError):
    """A caption has words that the miniature does not know."""

    def __init__(self, words: Iterable[str]):
        self.words = sorted(set(words))
        listed = ", ".join(repr(word) for word in self.words)
        one = len(self.words) == 1
        super().__init__(
            f"the miniature does not know the {'word' if one else 'words'} {listed}; "
            f"it knows {', '.join(sorted(word for word in vocabulary() if word.isalpha()))}."
        )


@functools.cache
def vocabulary() -> dict[str, int]:
    """The words, in the order of the small table's rows from `SPECIAL` on, and their ids in CLIP's vocabulary."""
    text = (Path(__file__).parent / "data" / "vocabulary.json").read_text(encoding="utf-8")
    return dict(json.loads(text))


@functools.cache
def _rows() -> dict[str, int]:
    return {word: SPECIAL + row for row, word in enumerate(vocabulary())}


def clip_ids() -> list[int]:
    """For every row of the small table but `UNKNOWN`'s: its id in CLIP's vocabulary (`UNKNOWN` itself has none: −1)."""
    return [CLIP_START, CLIP_END, -1, *vocabulary().values()]


def words(caption: str) -> list[str]:
    """The caption as CLIP's tokenizer splits it: lower case, punctuation apart."""
    return re.findall(r"[a-z]+|[0-9]|[^\sa-z0-9]+", caption.lower())


def tokenize(caption: str, *, strict: bool = True) -> list[int]:
    """Rows of the small table for a caption, `LENGTH` of them: start, words, end, and end as padding.

    Raises:
        UnknownWords: if strict; otherwise such words take the row that unknown words share.
        TooLong: the caption is too long.
    """
    found = words(caption)
    rows = _rows()
    unknown = [word for word in found if word not in rows]
    if strict and unknown:
        raise UnknownWords(unknown)
    if len(found) > LENGTH - 2:
        raise TooLong(f"the prompt has {len(found)} words; the miniature takes at most {LENGTH - 2}.")
    ids = [START, *(rows.get(word, UNKNOWN) for word in found), END]
    return ids + [END] * (LENGTH - len(ids))


def token_ids(captions: Iterable[str], *, strict: bool = True) -> Tensor:
    """`(B, 77)` rows of the small table."""
    return torch.tensor([tokenize(caption, strict=strict) for caption in captions])
