"""The tokens of a prompt, and their places in its condition."""

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
"""For each part of a prompt (AND), pairs `[last step, text]` in order."""


def schedules(prompt: str, *steps: Any) -> Schedules:
    """A prompt's parts with their prompt editing.

    Args:
        steps: the arguments about steps that the host passes when it encodes prompts.
    """
    _, flat, _ = prompt_parser.get_multicond_prompt_list([prompt])
    editing: Schedules = prompt_parser.get_learned_conditioning_prompt_schedules(list(flat), *steps)
    return editing


def step_texts(parts: Schedules, step: int = 0) -> list[str]:
    """The texts of the parts at a step, one for each row of the prompt's condition."""
    return [next((text for end, text in part if step <= end), part[0][1]) for part in parts]


def text_encoder() -> Any:
    """The first text encoder, which defines the prompts' tokens.

    Raises:
        Unsupported: there is no text encoder that memnoise knows.
    """
    encoder = next((encoder for encoder in text_encoders() if hasattr(encoder, "tokenize_line")), None)
    if encoder is None:
        raise Unsupported("the text encoder cannot be reached")
    return encoder


def text_encoders() -> list[Any]:
    """All text encoders of the loaded checkpoint."""
    model = shared.sd_model
    if quirks.has("encodes by engines"):
        return [getattr(model, name) for name in quirks.ENGINES if hasattr(model, name)]
    conditioner = getattr(model, "conditioner", None)
    return [model.cond_stage_model] if conditioner is None else list(conditioner.embedders)


@dataclass(frozen=True)
class Places:
    """The places of a prompt's tokens in its condition."""

    starts: tuple[int, ...]
    """The start token of each chunk."""
    ends: tuple[int, ...]
    """The first end token of each chunk."""
    unpadded: tuple[int, ...]
    """All tokens but the padding: starts, words and ends."""


def places(text: str) -> Places:
    """The places of a text's tokens in its condition."""
    embedder = text_encoder()
    chunks, _ = embedder.tokenize_line(text)
    ends = [chunk.tokens.index(embedder.id_end) for chunk in chunks]
    return Places(
        starts=tuple(CHUNK * k for k in range(len(chunks))),
        ends=tuple(CHUNK * k + end for k, end in enumerate(ends)),
        unpadded=tuple(CHUNK * k + place for k, end in enumerate(ends) for place in range(end + 1)),
    )


class Vocabulary(Sequence[str]):
    """The text encoders' ordinary tokens as text, each decoded when it is read.

    A token is "" if a prompt cannot contain it by itself: no prompt can spell it, its text means something else in a
    prompt, or its text becomes another token or several, as do pieces from inside words. In CLIP this holds for 15,385
    of 49,406 tokens. Drawing again while the token is "" is uniform over the other 34,021, and needs no tokenising in
    advance.
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
        # SDXL has two encoders.
        return text if all(list(other.tokenize([text])[0]) == [int(token)] for other in self._encoders) else ""


SYNTAX = "()[]{}<>:|\\#,0123456789"
"""Characters that have or may have a meaning in a WebUI's prompt: comments, divisions of chunks, weights."""


def token_count(prompt: str, steps: int) -> int:
    """The number of tokens of a prompt as it is encoded at the first step, over all its parts (AND)."""
    # Those between a chunk's start token and its first end token.
    return sum(end % CHUNK - 1 for text in step_texts(schedules(prompt, steps)) for end in places(text).ends)


def tokenizer_of(embedder: Any) -> Any:
    return getattr(getattr(embedder, "wrapped", embedder), "tokenizer", None)


def decoded(embedder: Any, token: int) -> str:
    """The text of a token."""
    tokenizer = tokenizer_of(embedder)
    if hasattr(tokenizer, "decode"):
        return str(tokenizer.decode([token]))
    import open_clip.tokenizer

    return str(open_clip.tokenizer._tokenizer.decode([token]))


def token_texts(text: str) -> list[str]:
    """The text of the token at each place of the condition: "" for start, end and padding.

    The last token of a word ends in a blank.
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
    """The text of a token, with a blank where it ends a word."""
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
    """For each image, its words with their significance, scaled so that the largest is 1.

    A word's significance is the largest of its tokens'.

    Args:
        texts: the text of each row.
        sizes: ‖∂‖Δ‖/∂e_i‖, `(rows, tokens)`.
        owners: the image that each row belongs to.
        images: the number of images.
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
