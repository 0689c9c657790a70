"""A double of the host as a process of its own, over HTTP: `python -m tests.hosts.serve PORT [CHECKPOINT [FLAG …]]`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import uvicorn

from tests.hosts.double.host import Double


def main(port: str, checkpoint: str = "sd1", *flags: str) -> None:
    torch.set_num_threads(1)
    bare = "--without-memnoise" in flags
    args = [flag for flag in flags if flag != "--without-memnoise"]
    with Double(None if bare else Path(__file__).resolve().parents[2], checkpoint, args) as host:
        uvicorn.run(host.app, host="127.0.0.1", port=int(port), log_level="warning", lifespan="off")


if __name__ == "__main__":
    main(*sys.argv[1:])
