"""What the extension adds to a WebUI's start and page: the same WebUI with and without it, in turns.

    SD_WEBUI_DIR=/path/to/stable-diffusion-webui python benchmarks/startup.py [--turns 3]

Seconds are the host's own profile, the median of the turns. Bytes are those of the page with its configuration, as the
browser gets it, plain and compressed; scripts and style sheets that it loads are the extension's files.
"""

from __future__ import annotations

import argparse
import gzip
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.hosts import webui
from tests.hosts.checkpoints import make_checkpoints

ROOT = Path(__file__).parents[1]
PARTS = ("load scripts", "load scripts/memnoise.py", "create ui", "scripts before_ui_callback", "total")


def start(checkpoints: Path, repository: Path | None) -> dict[str, float]:
    with webui.WebUI(checkpoints, "sd1", repository=repository) as host:
        profile: dict[str, Any] = host.get("/internal/profile-startup").json()
        page = host.get("/").content
    seconds = {name: float(profile["records"].get(name, 0.0)) for name in PARTS if name != "total"}
    return {**seconds, "total": float(profile["total"]), "bytes": len(page), "compressed": len(gzip.compress(page))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    turns = parser.parse_args().turns
    root, python = webui.locate() or sys.exit("SD_WEBUI_DIR must name a WebUI's folder")
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoints(Path(folder), root, python)
        start(Path(folder), ROOT)  # compiles, and fills the disk's cache
        found: dict[str, list[dict[str, float]]] = {"without": [], "with": []}
        for _ in range(turns):
            for name, repository in (("without", None), ("with", ROOT)):
                found[name].append(start(Path(folder), repository))
    print(f"{'':28} {'without':>10} {'with':>10} {'more':>10}")
    for part in found["with"][0]:
        without, beside = (statistics.median(run[part] for run in found[name]) for name in ("without", "with"))
        form = ".0f" if part in ("bytes", "compressed") else ".3f"
        print(f"{part:28} {without:10{form}} {beside:10{form}} {beside - without:10{form}}")
    for path in (*sorted((ROOT / "javascript").glob("*.js")), ROOT / "style.css"):
        print(f"{path.relative_to(ROOT)!s:28} {path.stat().st_size:21} bytes")


if __name__ == "__main__":
    main()
