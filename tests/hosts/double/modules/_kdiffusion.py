"""Import k-diffusion's samplers without the training stack its package `__init__` pulls in.

`import k_diffusion` needs torchvision, wandb, clip and more, none of which sampling uses. The submodules are
imported under an empty parent package instead, and torchvision (needed by `k_diffusion.utils` for PIL helpers
only) is replaced during that import if it is not installed.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from pathlib import Path


def install() -> None:
    """Make `k_diffusion.sampling`, `.external` and `.utils` importable; does nothing the second time."""
    if "k_diffusion" in sys.modules:
        return
    spec = importlib.util.find_spec("k_diffusion")
    if spec is None or spec.origin is None:
        raise ImportError("k-diffusion is not installed; see requirements.txt beside the double")
    package = types.ModuleType("k_diffusion")
    package.__path__ = [str(Path(spec.origin).parent)]
    package.__spec__ = spec
    sys.modules["k_diffusion"] = package

    stubs = _missing_torchvision()
    sys.modules.update(stubs)
    try:
        for name in ("utils", "sampling", "external"):
            setattr(package, name, importlib.import_module(f"k_diffusion.{name}"))
    finally:
        for name in stubs:
            sys.modules.pop(name, None)


def _missing_torchvision() -> dict[str, types.ModuleType]:
    if importlib.util.find_spec("torchvision") is not None:
        try:
            importlib.import_module("torchvision.transforms.functional")
            return {}
        except Exception:  # a torchvision built for another torch
            for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
                del sys.modules[name]
    names = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional")
    stubs = {name: types.ModuleType(name) for name in names}
    stubs["torchvision"].transforms = stubs["torchvision.transforms"]  # type: ignore[attr-defined]
    stubs["torchvision.transforms"].functional = stubs[names[2]]  # type: ignore[attr-defined]
    return stubs
