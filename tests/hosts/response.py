"""The answer of a generation, the same for every host the tests run against."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image


@dataclass
class Response:
    """What a generation endpoint answered, whether it succeeded or not."""

    status: int
    images: list[np.ndarray] = field(default_factory=list, repr=False)
    """(height, width, 3) uint8 each."""
    infotexts: list[str] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict, repr=False)
    detail: str = ""
    """What went wrong, in the host's words; empty on success."""
    seconds: float = 0.0
    raw: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def image(self) -> np.ndarray:
        """The only image of a successful answer."""
        assert self.status == 200, f"{self.status}: {self.detail}"
        assert len(self.images) == 1, f"{len(self.images)} images"
        return self.images[0]


def encode_image(image: np.ndarray) -> str:
    """A uint8 array as the base64 text that img2img's `init_images` takes."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def decode_image(text: str) -> np.ndarray:
    data = base64.b64decode(text.split(",", 1)[-1])
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def read(status: int, raw: Any, text: str, seconds: float) -> Response:
    """Make a `Response` of the host's JSON; `text` is used where an error has no other words."""
    if not isinstance(raw, dict):
        raw = {"answer": raw}
    if status != 200:
        detail = raw.get("detail") or raw.get("errors") or text
        if not isinstance(detail, str):
            detail = json.dumps(detail)
        return Response(status, detail=detail, seconds=seconds, raw=raw)
    info = json.loads(raw.get("info") or "{}")
    images = [decode_image(image) for image in raw.get("images") or ()]
    return Response(status, images, list(info.get("infotexts", ())), info, "", seconds, raw)
