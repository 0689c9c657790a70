"""How alike two pictures are, without training: the correlation of blurred pictures."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

THUMBNAIL = 16


def thumbnails(pictures: Tensor) -> Tensor:
    """Blurred, colour-centred and normalised `(B, 768)` of pictures `(B, 3, H, W)`.

    The mean of each colour is taken away, so that a background's colour alone makes no two pictures alike.
    """
    small = F.interpolate(pictures.float(), (THUMBNAIL, THUMBNAIL), mode="area")
    centred = small - small.mean((2, 3), keepdim=True)
    return F.normalize(centred.flatten(1), dim=1)


def similarity(pictures: Tensor, references: Tensor) -> Tensor:
    """Correlation `(B, R)` of each picture with each reference, −1…1."""
    return thumbnails(pictures) @ thumbnails(references).T
