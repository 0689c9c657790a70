"""Token merging: the self-attention looks at means of neighbouring tokens."""

from __future__ import annotations

from typing import Any

import torch


class TomePatcher:
    def patch(self, model: Any, ratio: float) -> Any:
        def merge(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra_options: Any) -> tuple[Any, Any, Any]:
            kept = k[:, ::2]
            merged = torch.lerp(kept, k[:, 1::2], 0.5) if k.shape[1] % 2 == 0 else kept
            return q, merged, merged

        patched = model.clone()
        patched.model_options["transformer_options"].setdefault("patches", {}).setdefault("attn1_patch", []).append(
            merge
        )
        return patched
