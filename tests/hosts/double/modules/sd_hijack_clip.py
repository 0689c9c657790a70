"""A small text encoder with the host's interface: 77-token chunks, emphasis, BREAK, CLIP's special tokens."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from typing import Any

import torch
from modules import prompt_parser
from modules.shared import opts
from torch import nn

VOCABULARY = 49408
_FIRST, _LAST = 320, 49405  # ordinary words
_PUNCTUATION = {"!": 0, '"': 1, ",": 267, "-": 268, ".": 269, ":": 281, ";": 282, "?": 286}
_SYLLABLES = [c + v for c in "bcdfghjklmnprstvwxyz" for v in "aeiou"]


class Tokenizer:
    """Words to numbers by hashing; every number is the name of an invented word, which is encoded as itself.

    But for every eighth, which stands inside words, as CLIP's pieces without "</w>" do: written as a word it is two.
    """

    bos_token_id = 49406
    eos_token_id = 49407

    def _word(self, token: int) -> str:
        for mark, number in _PUNCTUATION.items():
            if number == token:
                return mark
        return "".join(_SYLLABLES[(token // 100**n) % 100] for n in range(3)) + "q" * self._is_inside(token)

    @staticmethod
    def _is_inside(token: int) -> bool:
        return token % 8 == 7 and _FIRST <= token <= _LAST

    def _tokens(self, word: str) -> list[int]:
        if re.fullmatch("(?:[bcdfghjklmnprstvwxyz][aeiou]){3}q", word):
            return [self._token(word[:4]), self._token(word[4:])]
        return [self._token(word)]

    def _token(self, word: str) -> int:
        if word in _PUNCTUATION:
            return _PUNCTUATION[word]
        parts = re.findall("[bcdfghjklmnprstvwxyz][aeiou]", word)
        if len(parts) == 3 and "".join(parts) == word:
            number = sum(_SYLLABLES.index(part) * 100**n for n, part in enumerate(parts))
            if _FIRST <= number <= _LAST and not self._is_inside(number):
                return number
        return _FIRST + zlib.crc32(word.encode()) % (_LAST - _FIRST + 1)

    def encode(self, text: str) -> list[int]:
        return [token for word in re.findall(r"\w+|[^\w\s]", text.lower()) for token in self._tokens(word)]

    def decode(self, tokens: Sequence[int], **_: Any) -> str:
        special = (self.bos_token_id, self.eos_token_id)
        return " ".join(self._word(int(token)) for token in tokens if int(token) not in special)

    def get_vocab(self) -> dict[str, int]:
        vocab = {self._word(i) + ("" if self._is_inside(i) else "</w>"): i for i in range(_FIRST, _LAST + 1)}
        vocab.update({f"{mark}</w>": i for mark, i in _PUNCTUATION.items()})
        return {**vocab, "<|startoftext|>": self.bos_token_id, "<|endoftext|>": self.eos_token_id}

    def __call__(self, texts: Any, **_: Any) -> dict[str, Any]:
        single = isinstance(texts, str)
        ids = [self.encode(text) for text in ([texts] if single else texts)]
        return {"input_ids": ids[0] if single else ids}


class TextTransformer(nn.Module):
    """Embeddings, positions and one causal attention layer, in which all tokens look at the words: the padding
    tokens carry the prompt, as in CLIP."""

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.token_embedding = nn.Embedding(VOCABULARY, width)
        self.position_embedding = nn.Embedding(77, width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.norm = nn.LayerNorm(width)
        for parameter, scale in (
            (self.token_embedding.weight, 1.0),
            (self.position_embedding.weight, 0.3),
            (self.qkv.weight, 2.0 / width**0.5),
        ):
            parameter.data = torch.randn(parameter.shape, generator=generator) * scale

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.token_embedding(tokens) + self.position_embedding.weight[: tokens.shape[1]]
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        words = (tokens != Tokenizer.eos_token_id) & (tokens != 0)
        seen = words[:, None, :] & torch.ones_like(words[:1, :, None] & words[:1, None, :]).tril()
        return self.norm(x + 2.0 * nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen))


class _Wrapped(nn.Module):
    """What the host wraps: the encoder of the model's own code."""

    def __init__(self, width: int, seed: int, openclip: bool) -> None:
        super().__init__()
        self.tokenizer = Tokenizer()
        self.transformer = TextTransformer(width, seed)
        if openclip:
            self.model = self.transformer


class PromptChunk:
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.multipliers: list[float] = []
        self.fixes: list = []


class FrozenCLIPEmbedderWithCustomWords(nn.Module):
    """Prompts of any length to (B, 77·chunks, width)."""

    chunk_length = 75
    input_key = "txt"
    return_pooled = False

    def __init__(self, hijack: Any, width: int = 32, seed: int = 0, openclip: bool = False) -> None:
        super().__init__()
        self.hijack = hijack
        self.wrapped = _Wrapped(width, seed, openclip)
        self.tokenizer = self.wrapped.tokenizer
        self.comma_token = _PUNCTUATION[","]
        self.id_start, self.id_end = Tokenizer.bos_token_id, Tokenizer.eos_token_id
        self.id_pad = 0 if openclip else self.id_end
        if openclip:
            self.model = self.wrapped.model

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.tokenizer.encode(text) for text in texts]

    def _finish(self, chunk: PromptChunk) -> PromptChunk:
        missing = self.chunk_length - len(chunk.tokens)
        chunk.tokens = [self.id_start, *chunk.tokens, *[self.id_end] * (missing + 1)]
        chunk.multipliers = [1.0, *chunk.multipliers, *[1.0] * (missing + 1)]
        return chunk

    def empty_chunk(self) -> PromptChunk:
        return self._finish(PromptChunk())

    def get_target_prompt_token_count(self, token_count: int) -> int:
        return max(1, -(-token_count // self.chunk_length)) * self.chunk_length

    def tokenize_line(self, line: str) -> tuple[list[PromptChunk], int]:
        """Chunks of 75 tokens, and the number of tokens."""
        chunk, done = PromptChunk(), []
        pieces = [[line, 1.0]] if opts.emphasis == "None" else prompt_parser.parse_prompt_attention(line)
        for text, weight in pieces:
            if text == "BREAK" and weight == -1:
                done.append(self._finish(chunk))
                chunk = PromptChunk()
                continue
            for token in self.tokenize([text])[0]:
                if len(chunk.tokens) == self.chunk_length:
                    rest = self._split_at_comma(chunk, token)
                    done.append(self._finish(chunk))
                    chunk = rest
                chunk.tokens.append(token)
                chunk.multipliers.append(weight)
        count = len(done) * self.chunk_length + len(chunk.tokens)
        if chunk.tokens or not done:
            done.append(self._finish(chunk))
        return done, count

    def _split_at_comma(self, chunk: PromptChunk, token: int) -> PromptChunk:
        """Move the words after a late comma to the next chunk."""
        rest = PromptChunk()
        if token == self.comma_token or not opts.comma_padding_backtrack or self.comma_token not in chunk.tokens:
            return rest
        cut = len(chunk.tokens) - chunk.tokens[::-1].index(self.comma_token)
        if len(chunk.tokens) - cut < opts.comma_padding_backtrack:
            rest.tokens, rest.multipliers = chunk.tokens[cut:], chunk.multipliers[cut:]
            del chunk.tokens[cut:], chunk.multipliers[cut:]
        return rest

    def process_texts(self, texts: Sequence[str]) -> tuple[list[list[PromptChunk]], int]:
        lines = [self.tokenize_line(text) for text in texts]
        return [chunks for chunks, _ in lines], max(count for _, count in lines)

    def forward(self, texts: Sequence[str]) -> torch.Tensor:
        lines, _ = self.process_texts(texts)
        parts = []
        for n in range(max(len(chunks) for chunks in lines)):
            chunks = [line[n] if n < len(line) else self.empty_chunk() for line in lines]
            parts.append(self.process_tokens([x.tokens for x in chunks], [x.multipliers for x in chunks]))
        if any("(" in text or "[" in text for text in texts) and opts.emphasis != "Original":
            self.hijack.extra_generation_params["Emphasis"] = opts.emphasis
        return torch.hstack(parts)

    def process_tokens(
        self, remade_batch_tokens: list[list[int]], batch_multipliers: list[list[float]]
    ) -> torch.Tensor:
        tokens = torch.asarray(remade_batch_tokens)
        if self.id_pad != self.id_end:
            for row, original in zip(tokens, remade_batch_tokens):
                row[original.index(self.id_end) + 1 :] = self.id_pad
        z = self.encode_with_transformers(tokens)
        if opts.emphasis in ("None", "Ignore"):
            return z
        weighted = z * torch.asarray(batch_multipliers)[..., None]
        if opts.emphasis == "Original" and any(m != 1.0 for row in batch_multipliers for m in row):
            weighted = weighted * (z.mean() / weighted.mean())
        return weighted

    def encode_with_transformers(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.wrapped.transformer(tokens)


class Conditioner(nn.Module):
    """SDXL's two encoders and its size embedding, as one."""

    def __init__(self, hijack: Any, seed: int = 0) -> None:
        super().__init__()
        self.embedders = nn.ModuleList(
            [
                FrozenCLIPEmbedderWithCustomWords(hijack, 32, seed),
                FrozenCLIPEmbedderWithCustomWords(hijack, 16, seed + 1, openclip=True),
            ]
        )

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        return self.embedders[0].tokenize(texts)

    def process_texts(self, texts: Sequence[str]) -> tuple[list[list[PromptChunk]], int]:
        return self.embedders[0].process_texts(texts)

    def get_target_prompt_token_count(self, token_count: int) -> int:
        return self.embedders[0].get_target_prompt_token_count(token_count)

    def forward(self, batch: Any, force_zero_text: bool = False) -> dict[str, torch.Tensor]:
        parts = [embedder(batch) for embedder in self.embedders]
        pooled = parts[1][:, 76]
        width, height = getattr(batch, "width", None) or 1024, getattr(batch, "height", None) or 1024
        corner = [opts.sdxl_crop_top, opts.sdxl_crop_left]
        sizes = torch.tensor([height, width, *corner, height, width], dtype=torch.float32) / 1024
        crossattn = torch.cat(parts, dim=-1)
        if force_zero_text:
            crossattn, pooled = torch.zeros_like(crossattn), torch.zeros_like(pooled)
        return {"crossattn": crossattn, "vector": torch.cat([pooled, sizes.repeat(len(batch), 1)], dim=-1)}
