"""Prompts of the pictures that the host has saved."""

from __future__ import annotations

import heapq
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from modules import extra_networks, images, infotext_utils, shared
from PIL import Image

from lib_memnoise.core.calibration import distinct
from lib_memnoise.settings import INFOTEXT

ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
MOST_PICTURES = 5000
"""Pictures that are looked at, the newest first."""


@dataclass
class Recent:
    """Prompts of recent pictures, the newest first."""

    folder: str
    prompts: list[str] = field(default_factory=list)
    pictures: int = 0
    """That were looked at and had a prompt."""
    flagged: int = 0
    """Of them, those that memnoise took for memorised: they are left out."""

    def notes(self) -> list[str]:
        counts = f"{self.pictures} pictures of {self.folder} have {len(self.prompts)} different prompts"
        left_out = f"{self.flagged} pictures are left out that were flagged as memorised"
        return [counts, *([left_out] if self.flagged else [])]


def prompts(most: int) -> Recent:
    """So many different prompts of the newest pictures in the host's folder for txt2img, without extra networks.

    A picture that was flagged as memorised is no ordinary one. One that memnoise mitigated as it does every picture
    says nothing of its prompt, and counts.
    """
    folder = Path(shared.opts.outdir_samples or shared.opts.outdir_txt2img_samples)
    recent = Recent(str(folder))
    for path in newest(folder):
        infotext = read(path)
        if not infotext:
            continue
        params = infotext_utils.parse_generation_parameters(infotext)
        recent.pictures += 1
        if params.get(f"{INFOTEXT} mitigated") == "True":
            recent.flagged += 1
            continue
        # The host may have taken styles for themselves.
        prompt = shared.prompt_styles.apply_styles_to_prompt(params.get("Prompt", ""), params.get("Styles array") or [])
        recent.prompts = distinct([*recent.prompts, extra_networks.parse_prompt(prompt)[0]], most)
        if len(recent.prompts) == most:
            break
    return recent


def newest(folder: Path) -> Iterator[Path]:
    """Pictures in a folder and those within it, the newest first."""
    paths = (os.path.join(top, name) for top, _, names in os.walk(folder) for name in names)
    dated = []
    for path in paths:
        if path.lower().endswith(ENDINGS):
            try:
                dated.append((os.stat(path).st_mtime_ns, path))
            except OSError:
                continue
    return (Path(path) for _, path in heapq.nlargest(MOST_PICTURES, dated))


def read(path: Path) -> str | None:
    """A picture's infotext."""
    try:
        with Image.open(path) as image:
            infotext, _ = images.read_info_from_image(image)
    except Exception:  # Pillow raises all kinds of them for damaged files
        return None
    return infotext if isinstance(infotext, str) else None
