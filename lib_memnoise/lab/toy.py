"""An analytic toy of a diffusion model that has memorised some of its training pictures.

It is not a trained network and no evidence about SD checkpoints: it is the exact posterior-mean denoiser of a
distribution that is written down here. Nothing about copying or mitigation is put in by hand; both follow from
the distribution and from the same sampler and mitigation that run on real checkpoints.

The distribution: pictures are smooth random latents. Every prompt has a theme, which all of its pictures share
in part, several varied pictures (broad Gaussians: many pictures resemble them), and one memorised picture (a
narrow Gaussian) that its training captions nearly always came with. The unconditional distribution is the
average over all prompts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lib_memnoise.lab.sampling import alpha_bar


@dataclass(frozen=True)
class Mixture:
    """p(x0) of K isotropic Gaussians over d = C·H·W latent values, and weights of them for P conditions."""

    means: Tensor
    """`(K, C, H, W)`."""
    widths: Tensor
    """`(K,)`: standard deviation per element, in units of x."""
    log_weights: Tensor
    """`(P, K)`: log p(k | condition); −inf where a condition never shows a picture."""

    def log_density_terms(self, x: Tensor, t: int, condition: Tensor) -> Tensor:
        """log p(x_t, k | condition), `(B, K)`, for x `(B, C, H, W)` and one condition index an image `(B,)`.

        A component becomes N(√ᾱ μ_k, ᾱ s_k² + 1 − ᾱ) at timestep t.
        """
        a, flat, means = alpha_bar(t), x.flatten(1), self.means.flatten(1)
        variance = a * self.widths**2 + 1 - a
        # Expanded, so that memory is B·K rather than B·K·d.
        distance = flat.square().sum(1, keepdim=True) - 2 * a**0.5 * flat @ means.T + a * means.square().sum(1)
        log_normal = -0.5 * (distance / variance + flat.shape[1] * torch.log(2 * math.pi * variance))
        return self.log_weights[condition] + log_normal

    def denoised(self, x: Tensor, t: int, condition: Tensor) -> Tensor:
        """E[x0 | x_t = x, condition], in the shape of x. Differentiable in x."""
        a, flat, means = alpha_bar(t), x.flatten(1), self.means.flatten(1)
        share = torch.softmax(self.log_density_terms(x, t, condition), dim=1)
        # Within a component: μ_k + gain_k (x − √ᾱ μ_k).
        gain = a**0.5 * self.widths**2 / (a * self.widths**2 + 1 - a)
        mean = (share * (1 - a**0.5 * gain)) @ means + (share @ gain)[:, None] * flat
        return mean.reshape(x.shape)

    def eps(self, x: Tensor, t: int, condition: Tensor) -> Tensor:
        """ε(x, t, condition) = (x − √ᾱ E[x0 | x]) / √(1 − ᾱ) = −√(1 − ᾱ) ∇ log p(x_t), in the shape of x."""
        a = alpha_bar(t)
        return (x - a**0.5 * self.denoised(x, t, condition)) / (1 - a) ** 0.5


@dataclass(frozen=True)
class Toy:
    """The mixture with its P prompts; condition P is the empty prompt."""

    mixture: Mixture
    memorised: Tensor
    """`(P, C, H, W)`: the memorised picture of each prompt."""
    themes: Tensor
    """`(P, C, H, W)`: what all pictures of a prompt share."""

    @property
    def prompts(self) -> int:
        return self.memorised.shape[0]


def pictures(count: int, size: int, smooth: int, generator: torch.Generator) -> Tensor:
    """Smooth random latents `(count, 4, size, size)`, each with mean 0 and variance 1.

    `smooth` is the side of the coarse grid they are interpolated from.
    """
    coarse = torch.randn(count, 4, smooth, smooth, generator=generator)
    fine = F.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=True).flatten(1)
    fine = fine - fine.mean(1, keepdim=True)
    fine = fine / fine.square().mean(1, keepdim=True).sqrt()
    return fine.reshape(count, 4, size, size)


def make_toy(
    *,
    seed: int = 0,
    prompts: int = 8,
    varied: int = 16,
    size: int = 16,
    smooth: int = 8,
    memorised_share: float = 0.99,
    theme_share: float = 0.3,
    memorised_width: float = 0.1,
    varied_width: float = 0.5,
) -> Toy:
    """The toy's "training set", the same for the same arguments.

    Args:
        seed: of the pictures.
        prompts: P.
        varied: varied pictures a prompt has beside the memorised one.
        size: side of the latents, `(4, size, size)`.
        smooth: see `pictures`.
        memorised_share: p(memorised picture | prompt); the rest is spread evenly over the varied ones.
        theme_share: how much of a picture's variance its prompt's theme makes up.
        memorised_width, varied_width: standard deviation of the Gaussians per element.
    """
    generator = torch.Generator().manual_seed(seed)
    each = 1 + varied
    themes = pictures(prompts, size, smooth, generator)
    own = pictures(prompts * each, size, smooth, generator)
    means = theme_share**0.5 * themes.repeat_interleave(each, 0) + (1 - theme_share) ** 0.5 * own
    widths = torch.tensor([memorised_width] + [varied_width] * varied).repeat(prompts)
    # With its width, every component has unit variance per element, as the latents of SD do.
    means = means * (1 - widths**2).sqrt().reshape(-1, 1, 1, 1)

    of_prompt = torch.tensor([memorised_share] + [(1 - memorised_share) / varied] * varied)
    weights = torch.block_diag(*[of_prompt[None]] * prompts)
    weights = torch.cat([weights, weights.mean(0, keepdim=True)])
    return Toy(Mixture(means, widths, weights.log()), means[::each], themes)


def correlation(x: Tensor, picture: Tensor) -> Tensor:
    """Pearson's correlation of each latent in x with its picture, both `(B, C, H, W)`; gives `(B,)`."""
    a, b = x.flatten(1), picture.flatten(1)
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
