"""CLIP's vocabulary, as transformers reads it from a folder. Needs the standard library only."""

from __future__ import annotations

import gzip
import importlib.util
import json
import zlib
from collections.abc import Mapping
from pathlib import Path

from lib_memnoise.lab.miniature import OneSentence

CLIP_TOKENS = 49408
CLIP_START, CLIP_END = 49406, 49407


class NoVocabulary(OneSentence, FileNotFoundError):
    """CLIP's vocabulary is not to be found, or is something else."""


def find_merges(webui: Path) -> Path:
    """CLIP's list of byte-pair merges, which every WebUI has installed with open_clip or clip.

    Raises:
        NoVocabulary: neither in the WebUI's environment nor in this one.
    """
    name = "bpe_simple_vocab_16e6.txt.gz"
    places = [
        site / package
        for venv in (webui / "venv", webui.parent / "venv")
        for site in (*venv.glob("lib/python3*/site-packages"), venv / "Lib" / "site-packages")
        for package in ("open_clip", "clip")
    ]
    for package in ("open_clip", "clip"):
        found = importlib.util.find_spec(package)
        if found is not None:
            places += [Path(place) for place in found.submodule_search_locations or ()]
    for place in places:
        if (place / name).is_file():
            return place / name
    raise NoVocabulary(
        f"CLIP's vocabulary ({name}) is neither in the WebUI's virtual environment nor in this one; "
        "name it with --vocabulary (the Python packages open_clip_torch and clip have it)."
    )


def clip_files(merges: Path, sizes: Mapping[str, int]) -> dict[str, str]:
    """What transformers' CLIPTokenizer and CLIPTextModel read from a folder: vocabulary and the encoder's sizes.

    `sizes` are named as in CLIPTextConfig. Raises NoVocabulary if `merges` is something else.
    """
    try:
        lines = gzip.decompress(merges.read_bytes()).decode("utf-8").split("\n")
    except (EOFError, UnicodeDecodeError, gzip.BadGzipFile, zlib.error):
        raise NoVocabulary(f"{merges} is not CLIP's vocabulary.") from None
    pairs = lines[1 : CLIP_TOKENS - 512 - 2 + 1]
    # Bytes that print stand for themselves, the others for characters from 256 on.
    printing = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [chr(byte) for byte in printing] + [chr(256 + k) for k in range(256 - len(printing))]
    words = symbols + [symbol + "</w>" for symbol in symbols] + ["".join(pair.split()) for pair in pairs]
    words += ["<|startoftext|>", "<|endoftext|>"]
    if len(words) != CLIP_TOKENS:
        raise NoVocabulary(f"{merges} is not CLIP's vocabulary.")
    marks = {"bos_token": words[-2], "eos_token": words[-1], "unk_token": words[-1], "pad_token": words[-1]}
    config = {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": CLIP_TOKENS,
        "projection_dim": sizes["hidden_size"],
        "hidden_act": "quick_gelu",
        "bos_token_id": CLIP_START,
        "eos_token_id": CLIP_END,
        "pad_token_id": CLIP_END,
        "torch_dtype": "float32",
        **sizes,
    }
    tokenizer = {**marks, "model_max_length": 77, "do_lower_case": True, "tokenizer_class": "CLIPTokenizer"}
    return {
        "vocab.json": json.dumps({word: row for row, word in enumerate(words)}, ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *pairs]) + "\n",
        "special_tokens_map.json": json.dumps(marks),
        "tokenizer_config.json": json.dumps(tokenizer, indent=1),
        "config.json": json.dumps(config, indent=1),
    }
