"""memnoise: adjusts the initial noise of text-to-image models so that they do not reproduce training images.

The core of the package is maths on tensors and one schema of settings. `lib_memnoise.webui` connects it to a WebUI;
`lib_memnoise.lab` runs without one.

The method is from "Adjusting Initial Noise to Mitigate Memorization in Text-to-Image Diffusion Models".
"""

__version__ = "0.1.0"
