"""What counts as a copy, by `lib_memnoise.core.similarity`.

Alignment is `Miniature.alignment`. `validate` measures both on real pictures.
"""

from __future__ import annotations

COPIED = 0.8
"""A picture more similar to a memorised one than this is a copy of it."""
