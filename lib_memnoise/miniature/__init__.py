"""A miniature Stable Diffusion that has memorised some of its training pictures, and how it was made."""


class OneSentence(Exception):
    """What is wrong and what to do, in one sentence for the person at the terminal."""
