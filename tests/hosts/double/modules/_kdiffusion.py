"""k-diffusion's samplers without its training stack; the double's modules call `install` before they import them."""

from lib_memnoise.lab.kdiffusion import load as install

__all__ = ["install"]
