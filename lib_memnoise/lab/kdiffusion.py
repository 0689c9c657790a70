"""k-diffusion's samplers without the training stack that its package imports.

`import k_diffusion` needs torchvision, wandb, clip and more, none of which sampling uses. The submodules are imported
under an empty parent package instead, and torchvision (which `k_diffusion.utils` needs for PIL helpers only) is
replaced during that import if it is missing or broken.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from pathlib import Path

SUBMODULES = ("utils", "sampling", "external")


def load() -> types.ModuleType:
    """The package `k_diffusion` with its `utils`, `sampling` and `external`; as it is, if already imported.

    Raises:
        ModuleNotFoundError: k-diffusion is not installed.
    """
    if "k_diffusion" in sys.modules:
        return sys.modules["k_diffusion"]
    spec = importlib.util.find_spec("k_diffusion")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("this sampler is k-diffusion's: python -m pip install k-diffusion")
    package = types.ModuleType("k_diffusion")
    package.__path__ = [str(Path(spec.origin).parent)]
    package.__spec__ = spec
    sys.modules["k_diffusion"] = package
    stubs = _missing_torchvision()
    sys.modules.update(stubs)
    try:
        for name in SUBMODULES:
            setattr(package, name, importlib.import_module(f"k_diffusion.{name}"))
    except BaseException:
        # A package without its modules must not be found by a later import.
        for name in [name for name in sys.modules if name.split(".")[0] == "k_diffusion"]:
            del sys.modules[name]
        raise
    finally:
        for name in stubs:
            sys.modules.pop(name, None)
    return package


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
    vars(stubs[names[0]])["transforms"] = stubs[names[1]]
    vars(stubs[names[1]])["functional"] = stubs[names[2]]
    return stubs
