"""A miniature Stable Diffusion that has memorised some of its training pictures, and how it was made."""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
"""What the project ships of it."""
MANIFEST = "manifest.json"


class OneSentence(Exception):
    """What is wrong and what to do, in one sentence for the person at the terminal."""
