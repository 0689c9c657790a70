"""Opens the reference picture of a comparison, which comes from outside."""

from __future__ import annotations

import base64
import binascii
import io
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from lib_memnoise.webui.services.json_request import BadRequest

FORMATS = ("PNG", "JPEG", "WEBP")
"""The formats that are accepted. Pillow passes some of the others to external programs (EPS to Ghostscript)."""
MOST_BYTES = 32 * 2**20
MOST_PIXELS = 64_000_000
"""Enough for a camera's picture. A small file may fill the memory when it is decoded."""
TOO_LARGE = f"memnoise: reference is too large; it may have {MOST_PIXELS // 10**6} million pixels."


def opened(sent: Any) -> Image.Image | None:
    """The picture, fully decoded, in RGB and upright; None where none was sent.

    Args:
        sent: base64, with or without a data URL's head; or the path of an uploaded file.

    Raises:
        BadRequest: it is not a picture, has another format, is damaged, or has too many bytes or pixels.
    """
    if sent is None:
        return None
    content = _content(sent)
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            width, height = image.size
            if width * height <= MOST_PIXELS:
                return _as_rgb(image)
    except MemoryError:
        raise
    except Image.DecompressionBombError:
        raise BadRequest(TOO_LARGE) from None
    except Exception:  # decoders raise all kinds of errors for bytes that are not a picture
        raise BadRequest(
            "memnoise: reference is not valid; it must be a PNG, JPEG or WebP picture, and this is none, or is damaged."
        ) from None
    raise BadRequest(TOO_LARGE)


def _as_rgb(image: Image.Image) -> Image.Image:
    image.load()
    upright = ImageOps.exif_transpose(image) or image
    if upright.mode.startswith("I"):  # 16 bits of grey; a plain conversion would keep only the lower 8
        upright = upright.convert("I").point(lambda value: value / 256).convert("L")
    return upright.convert("RGB")


def _content(sent: Any) -> bytes:
    if isinstance(sent, Path):
        try:
            if sent.stat().st_size <= MOST_BYTES:
                return sent.read_bytes()
        except OSError:
            raise BadRequest("memnoise: reference could not be uploaded.") from None
    elif not isinstance(sent, str):
        raise BadRequest("memnoise: reference is not valid; it must be a PNG, JPEG or WebP picture in base64.")
    elif len(sent) <= MOST_BYTES * 4 // 3 + 1000:
        try:
            return base64.b64decode(sent.rsplit(",", 1)[-1], validate=True)
        except (binascii.Error, ValueError):
            raise BadRequest(
                "memnoise: reference is not valid; it must be a PNG, JPEG or WebP picture in base64."
            ) from None
    raise BadRequest(f"memnoise: reference is too large; the file may have {MOST_BYTES >> 20} MiB.")
