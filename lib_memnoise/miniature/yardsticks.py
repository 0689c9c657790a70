"""Similarity to a memorised picture, without training: what counts as a copy.

Alignment is `Miniature.alignment`. `validate` measures both on real pictures.
"""

from __future__ import annotations

from lib_memnoise.similarity import similarity as similarity

COPIED = 0.8
"""A picture more similar to a memorised one than this is a copy of it."""
