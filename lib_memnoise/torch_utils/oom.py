"""Recognises errors that mean that memory ran out."""

from __future__ import annotations


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python or torch (on any device) ran out of memory. Needs no torch."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    message = str(error)
    return isinstance(error, RuntimeError) and any(
        words in message for words in ("out of memory", "not enough memory", "can't allocate memory")
    )
