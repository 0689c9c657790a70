"""What ends a mitigation without it being a fault."""

from __future__ import annotations

from modules import shared


class Interrupted(Exception):
    """The user asked to interrupt or skip."""


class Unsupported(RuntimeError):
    """What memnoise cannot work with, in one sentence."""


def raise_if_interrupted() -> None:
    # A direct call of the network bypasses the host's own check.
    if shared.state.interrupted or shared.state.skipped:
        raise Interrupted
