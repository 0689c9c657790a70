"""Tokens of a prompt, and where they are in its conditions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from modules import prompt_parser, shared
from torch import Tensor

from lib_memnoise.errors import Unsupported
from lib_memnoise.sampling.cond_rows import CHUNK
from lib_memnoise.webui import quirks

Schedules = list[list[Any]]
"""Of each part of a prompt (AND): `[last step, text]` pairs in order."""


def schedules(prompt: str, *steps: Any) -> Schedules:
    """A prompt's parts with prompt editing; `steps` as the host gives them to its own encoding."""
    _, flat, _ = prompt_parser.get_multicond_prompt_list([prompt])
    editing: Schedules = prompt_parser.get_learned_conditioning_prompt_schedules(list(flat), *steps)
    return editing


def step_texts(parts: Schedules, step: int = 0) -> list[str]:
    """The parts as the host has them at a step, a text for each row of the prompt's condition."""
    return [next((text for end, text in part if step <= end), part[0][1]) for part in parts]


def text_encoder() -> Any:
    """The (first) text encoder, which has the prompts' tokens.

    Raises:
        Unsupported: none that memnoise knows.
    """
    encoder = next((encoder for encoder in text_encoders() if hasattr(encoder, "tokenize_line")), None)
    if encoder is None:
        raise Unsupported("the text encoder cannot be reached")
    return encoder


def text_encoders() -> list[Any]:
    model = shared.sd_model
    if quirks.has("encodes by engines"):
        return [getattr(model, name) for name in quirks.ENGINES if hasattr(model, name)]
    conditioner = getattr(model, "conditioner", None)
    return [model.cond_stage_model] if conditioner is None else list(conditioner.embedders)


@dataclass(frozen=True)
class Places:
    """Where in a prompt's condition its tokens are."""

    starts: tuple[int, ...]
    ends: tuple[int, ...]
    """Of each chunk, the first end token."""
    unpadded: tuple[int, ...]
    """All that is no padding: starts, words and ends."""


def places(text: str) -> Places:
    """The places of a text's tokens."""
    embedder = text_encoder()
    chunks, _ = embedder.tokenize_line(text)
    ends = [chunk.tokens.index(embedder.id_end) for chunk in chunks]
    return Places(
        starts=tuple(CHUNK * k for k in range(len(chunks))),
        ends=tuple(CHUNK * k + end for k, end in enumerate(ends)),
        unpadded=tuple(CHUNK * k + place for k, end in enumerate(ends) for place in range(end + 1)),
    )


class Vocabulary(Sequence[str]):
    """The text encoders' ordinary tokens as text, decoded when asked for.

    "" for one that is no token of its own in a prompt: one that no prompt can spell, means something else there, or
    becomes another token or several, as what stands inside words does. Of CLIP's 49,406 these are 15,385; what is drawn
    until it is none of them is uniform over the other 34,021, and nothing has to be tokenised in advance.
    """

    def __init__(self) -> None:
        self._encoder = text_encoder()
        self._encoders = [other for other in text_encoders() if hasattr(other, "tokenize_line")]

    def __len__(self) -> int:
        return int(min(self._encoder.id_start, self._encoder.id_end))

    def __getitem__(self, token: Any) -> Any:
        text = decoded(self._encoder, int(token)).strip()
        if not text or "\ufffd" in text or not text.isprintable() or any(character in SYNTAX for character in text):
            return ""
        # In each encoder of SDXL.
        return text if all(list(other.tokenize([text])[0]) == [int(token)] for other in self._encoders) else ""


SYNTAX = "()[]{}<>:|\\#,0123456789"
"""Characters that mean something in a WebUI's prompt, or may: comments, where chunks are divided, weights."""


def token_count(prompt: str, steps: int) -> int:
    """Tokens of a prompt as it is encoded at the first step, those of its parts (AND) together."""
    # Behind a chunk's start, up to its first end token.
    return sum(end % CHUNK - 1 for text in step_texts(schedules(prompt, steps)) for end in places(text).ends)


def tokenizer_of(embedder: Any) -> Any:
    return getattr(getattr(embedder, "wrapped", embedder), "tokenizer", None)


def decoded(embedder: Any, token: int) -> str:
    """A token as it is written."""
    tokenizer = tokenizer_of(embedder)
    if hasattr(tokenizer, "decode"):
        return str(tokenizer.decode([token]))
    import open_clip.tokenizer

    return str(open_clip.tokenizer._tokenizer.decode([token]))


def token_texts(text: str) -> list[str]:
    """What each place of the condition stands for: "" for the start, the end and padding.

    A word's last token ends in a blank.
    """
    embedder = text_encoder()
    chunks, _ = embedder.tokenize_line(text)
    texts = []
    for chunk in chunks:
        fixes = {fix.offset: fix.embedding.name for fix in getattr(chunk, "fixes", [])}
        for place, token in enumerate(chunk.tokens):
            if place - 1 in fixes:
                texts.append(f"{fixes[place - 1]} ")
            elif token in (embedder.id_start, embedder.id_end, embedder.id_pad):
                texts.append("")
            else:
                texts.append(token_text(embedder, token))
    return texts


def token_text(embedder: Any, token: int) -> str:
    tokenizer = tokenizer_of(embedder)
    if hasattr(tokenizer, "convert_ids_to_tokens"):
        raw = str(tokenizer.convert_ids_to_tokens(token))
    elif hasattr(tokenizer, "decode"):
        raw = f"{tokenizer.decode([token])}</w>"
    else:
        import open_clip.tokenizer

        raw = open_clip.tokenizer._tokenizer.decoder[token]
    return raw.replace("</w>", " ")


def merged(texts: Sequence[str], sizes: Tensor, owners: Sequence[int], images: int) -> list[list[tuple[str, float]]]:
    """Words with the largest significance of their tokens, an image's largest being 1.

    Args:
        texts: of each row.
        sizes: ‖∂‖Δ‖/∂e_i‖, `(rows, tokens)`.
        owners: the image of each row.
    """
    words_of_image: list[list[tuple[str, float]]] = [[] for _ in range(images)]
    for row, text in enumerate(texts):
        word, size = "", 0.0
        for token, value in zip(token_texts(text), sizes[row].tolist()):
            if not token:
                continue
            word, size = word + token.rstrip(), max(size, value)
            if token.endswith(" "):
                words_of_image[owners[row]].append((word, size))
                word, size = "", 0.0
        if word:
            words_of_image[owners[row]].append((word, size))
    result = []
    for pairs in words_of_image:
        most = max((size for _, size in pairs), default=0.0) or 1.0
        result.append([(word, size / most) for word, size in pairs])
    return result
