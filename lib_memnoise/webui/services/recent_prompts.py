"""Reads prompts from the pictures that the host has saved."""

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
"""The most pictures that are read, starting with the newest."""


@dataclass
class Recent:
    """Prompts of recent pictures, the newest first."""

    folder: str
    prompts: list[str] = field(default_factory=list)
    pictures: int = 0
    """The number of pictures that were read and had an infotext."""
    flagged: int = 0
    """The number of these that memnoise flagged as memorised, which are left out."""

    def notes(self) -> list[str]:
        """Sentences about the pictures and prompts, for the user."""
        counts = f"{self.pictures} pictures of {self.folder} have {len(self.prompts)} different prompts"
        left_out = f"{self.flagged} pictures are left out that were flagged as memorised"
        return [counts, *([left_out] if self.flagged else [])]


def prompts(most: int) -> Recent:
    """At most `most` distinct prompts of the newest pictures in the host's txt2img folder, without extra networks.

    Pictures that were flagged as memorised are left out. Where memnoise mitigated every picture, whatever its score,
    nothing is known of the prompt, and the picture counts.
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
        # The host may have removed the styles' text from the prompt, and lists them separately.
        prompt = shared.prompt_styles.apply_styles_to_prompt(params.get("Prompt", ""), params.get("Styles array") or [])
        recent.prompts = distinct([*recent.prompts, extra_networks.parse_prompt(prompt)[0]], most)
        if len(recent.prompts) == most:
            break
    return recent


def newest(folder: Path) -> Iterator[Path]:
    """The newest pictures in a folder and its subfolders, in descending order of time."""
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
    """A picture's infotext; None where it has none or is damaged."""
    try:
        with Image.open(path) as image:
            infotext, _ = images.read_info_from_image(image)
    except Exception:  # Pillow raises all kinds of errors for damaged files
        return None
    return infotext if isinstance(infotext, str) else None
