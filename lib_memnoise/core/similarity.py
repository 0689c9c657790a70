"""The similarity of two pictures, without a trained model: the correlation of blurred pictures."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

THUMBNAIL = 16
"""Width and height of the blurred pictures, in pixels."""


def thumbnails(pictures: Tensor) -> Tensor:
    """Blurred, colour-centred and normalised vectors `(B, 768)` of pictures `(B, 3, H, W)`.

    The mean of each colour channel is subtracted, so that two pictures are not alike just because their backgrounds
    have the same colour.
    """
    small = F.interpolate(pictures.float(), (THUMBNAIL, THUMBNAIL), mode="area")
    centred = small - small.mean((2, 3), keepdim=True)
    return F.normalize(centred.flatten(1), dim=1)


def similarity(pictures: Tensor, references: Tensor) -> Tensor:
    """The correlation `(B, R)` of each picture `(B, 3, H, W)` with each reference `(R, 3, H, W)`, −1…1."""
    return thumbnails(pictures) @ thumbnails(references).T
