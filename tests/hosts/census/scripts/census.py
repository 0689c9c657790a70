"""An extension for tests: what is alive in the host's process, and what still hangs on its network.

`GET /census` counts; `POST /census/reload` does what the settings page's button "Reload UI" does.
"""

import contextlib
import ctypes
import gc
import os
import threading
from pathlib import Path

import torch
from modules import script_callbacks, shared

COUNTED = (
    "WrapperGuider", "PatchGuider", "CachedModel", "ConditioningOverride", "OutputCache", "CachedRow", "DeltaPredictor",
    "SamplingPass", "GuidancePlan", "Adjusted", "Mitigated", "EmptyPrompt", "Generation",
    "ImageReport", "StableDiffusionProcessingTxt2Img",
)  # fmt: skip


def count():
    gc.collect()
    alive = dict.fromkeys(COUNTED, 0)
    tensors = 0
    for thing in gc.get_objects():
        name = type(thing).__name__
        if name in alive:
            alive[name] += 1
        tensors += type(thing) is torch.Tensor
    model = shared.sd_model
    patched = getattr(model, "forge_objects", None)
    network = model.model if patched is None else patched.unet.model
    modules = list(network.modules())
    callbacks = script_callbacks.callback_map
    with contextlib.suppress(AttributeError):  # what the C library has kept of freed memory is nobody's
        ctypes.CDLL(None).malloc_trim(0)
    return {
        "alive": alive,
        "tensors": tensors,
        "rss": int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"),
        "threads": threading.active_count(),
        "hooks": {
            "functions": [type(m).__name__ for m in (model, *modules) if vars(m).keys() & {"forward", "apply_model"}],
            "hooks": sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules),
            "frozen": sum(not weight.requires_grad for weight in network.parameters()),
            "gradients": sum(weight.grad is not None for weight in network.parameters()),
            "callbacks": {name: len(found) for name, found in callbacks.items()},
            "options": [] if patched is None else sorted(map(str, patched.unet.model_options)),
            "differentiating": torch.is_grad_enabled(),
        },
    }


def register(demo, app):
    app.add_api_route("/census", count, methods=["GET"])
    if hasattr(shared.state, "request_restart"):
        app.add_api_route("/census/reload", shared.state.request_restart, methods=["POST"])


script_callbacks.on_app_started(register)
