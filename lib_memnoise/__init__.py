"""memnoise: adjusts the initial noise of text-to-image models so that they do not reproduce training images.

The package proper is maths on tensors and one schema of settings. What talks to a WebUI is in
`lib_memnoise.webui`; what runs without one is in `lib_memnoise.lab`.

The method is from "Adjusting Initial Noise to Mitigate Memorization in Text-to-Image Diffusion Models".
"""

__version__ = "0.1.0"
