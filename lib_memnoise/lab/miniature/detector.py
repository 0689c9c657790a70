"""A small network that says which objects and which background a picture shows: the yardstick of alignment."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from lib_memnoise.lab.miniature.scenes import COLOURS, OBJECTS, Scene

LABELS = (*OBJECTS, *COLOURS)


class Detector(nn.Module):
    """`detector(picture)` gives a logit for each of `LABELS`, `(B, 52)`, of pictures `(B, 3, 128, 128)` in −1…1."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 16, 32, 64, 96)
        layers: list[nn.Module] = []
        for inner, outer in itertools.pairwise(widths):
            layers += [nn.Conv2d(inner, outer, 3, stride=2, padding=1), nn.GroupNorm(8, outer), nn.SiLU()]
            layers += [nn.Conv2d(outer, outer, 3, padding=1, groups=outer), nn.Conv2d(outer, outer, 1), nn.SiLU()]
        layers += [nn.Conv2d(96, 128, 3, padding=1), nn.GroupNorm(8, 128), nn.SiLU()]
        self.layers = nn.Sequential(*layers)
        self.out = nn.Linear(256, len(LABELS))

    def forward(self, picture: Tensor) -> Tensor:
        features = self.layers(picture)
        # An object is somewhere, a background nearly everywhere.
        return self.out(torch.cat([features.amax((2, 3)), features.mean((2, 3))], dim=1))


def targets(scene: Scene) -> Tensor:
    """1 for every label that is true of the scene, else 0, `(52,)`."""
    true = {scene.colour, *scene.names}
    return torch.tensor([float(label in true) for label in LABELS])
