"""Pictures: grids, resizing, reading metadata. Saving to disk is left out."""

from __future__ import annotations

import math
from typing import Any

from PIL import Image, ImageFont


class GridAnnotation:
    def __init__(self, text: str = "", is_active: bool = True) -> None:
        self.text = text
        self.is_active = is_active
        self.size: Any = None


def get_font(fontsize: int) -> Any:
    return ImageFont.load_default(fontsize)


def image_grid(imgs: list[Image.Image], batch_size: int = 1, rows: int | None = None) -> Image.Image:
    rows = max(1, min(rows or round(math.sqrt(len(imgs))), len(imgs)))
    cols = math.ceil(len(imgs) / rows)
    w, h = (max(size) for size in zip(*(image.size for image in imgs)))
    grid = Image.new("RGB", (cols * w, rows * h), "black")
    for i, image in enumerate(imgs):
        grid.paste(image, (i % cols * w, i // cols * h))
    return grid


def draw_grid_annotations(im: Image.Image, *args: Any, **kwargs: Any) -> Image.Image:
    """No legend."""
    return im


def resize_image(
    resize_mode: int, im: Image.Image, width: int, height: int, upscaler_name: str | None = None
) -> Image.Image:
    return im.resize((width, height), Image.LANCZOS)


def read_info_from_image(image: Image.Image) -> tuple[str | None, dict[str, Any]]:
    items = dict(image.info or {})
    return items.pop("parameters", None), items


def save_image(*args: Any, **kwargs: Any) -> tuple[None, None]:
    return None, None
