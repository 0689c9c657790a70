"""The shipped miniature as a model: captions to text, latents to ε or v, latents to pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lib_memnoise.lab.miniature import WEIGHTS
from lib_memnoise.lab.miniature.architecture import make_autoencoder, make_text_encoder, make_unet
from lib_memnoise.lab.miniature.checkpoint import TABLE, manifest, read, under
from lib_memnoise.lab.miniature.detector import LABELS, Detector
from lib_memnoise.lab.miniature.networks import Autoencoder, TextEncoder, UNet
from lib_memnoise.lab.miniature.text import token_ids


@dataclass(frozen=True)
class Miniature:
    """The networks, frozen; as loaded, on the CPU in float32."""

    text: TextEncoder
    unet: UNet
    autoencoder: Autoencoder
    detector: Detector
    scale_factor: float
    parameterization: str

    def to(self, device: str | torch.device, dtype: torch.dtype) -> Miniature:
        """The same networks moved to a device; those of a checkpoint's first two parts in this precision.

        The autoencoder and the detector, by which is judged what came of it, stay in float32.
        """
        text, unet = self.text.to(device, dtype), self.unet.to(device, dtype)
        return replace(
            self, text=text, unet=unet, autoencoder=self.autoencoder.to(device), detector=self.detector.to(device)
        )

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> Tensor:
        """Captions as the U-Net takes them, `(B, 77, width)`; "" is the empty prompt.

        Raises:
            UnknownWords: a caption has words the miniature never saw. TooLong: it is too long.
        """
        return self.text(token_ids(captions).to(self.device))

    def __call__(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """ε or v, the network's native output, in the shape of the unit-variance latents x `(B, 4, 16, 16)`."""
        dtype = next(self.unet.parameters()).dtype
        return self.unet(x.to(dtype), t, context.to(dtype)).to(x.dtype)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures `(B, 3, 128, 128)` in −1…1 of latents at the last timestep."""
        parts = [self.autoencoder.decode(part / self.scale_factor) for part in latents.float().split(16)]
        return torch.cat(parts).clamp(-1, 1)

    @torch.no_grad()
    def detect(self, pictures: Tensor) -> Tensor:
        """The probability of each of `LABELS` in pictures `(B, 3, 128, 128)`, `(B, 52)`."""
        return torch.cat([self.detector(part) for part in pictures.split(64)]).sigmoid()

    def alignment(self, pictures: Tensor, wanted: Sequence[Sequence[str]]) -> Tensor:
        """Mean probability `(B,)` of the labels that each picture should show."""
        found = self.detect(pictures)
        rows = [[LABELS.index(label) for label in labels] for labels in wanted]
        return torch.stack([found[i, labels].mean() for i, labels in enumerate(rows)])


def load_miniature(variant: str = "eps", folder: Path = WEIGHTS) -> Miniature:
    """The shipped networks of a variant, "eps" or "v".

    Raises:
        Damaged: a file is missing or was changed. MemoryError: too little memory.
    """
    weights = read(variant, folder)
    text, unet = under("text.", weights), under("unet.", weights)
    networks = (
        (make_text_encoder(len(text[TABLE])), text),
        (make_unet(), unet),
        (make_autoencoder(), read("autoencoder", folder)),
        (Detector(), read("detector", folder)),
    )
    for network, state in networks:
        network.load_state_dict(state)
        network.eval().requires_grad_(False)
    text_encoder, u, autoencoder, detector = (network for network, _ in networks)
    assert isinstance(text_encoder, TextEncoder) and isinstance(u, UNet)
    assert isinstance(autoencoder, Autoencoder) and isinstance(detector, Detector)
    return Miniature(text_encoder, u, autoencoder, detector, float(manifest(folder)["scale_factor"]), variant)


def to_images(pictures: Tensor) -> NDArray[np.uint8]:
    """`(B, 3, H, W)` in −1…1 to `(B, H, W, 3)` in 0…255."""
    return ((pictures + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def to_pictures(images: NDArray[np.uint8]) -> Tensor:
    """`(B, H, W, 3)` in 0…255 to `(B, 3, H, W)` in −1…1."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
