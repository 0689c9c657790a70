"""A transition point alone: the noise stays as drawn, and guidance starts later (Jain et al. 2025).

A static transition point is τ; a dynamic one is the first local minimum of ‖Δ‖ along the trajectory. Opposite guidance
leads away from the prompt until then. All of this is implemented in `lib_memnoise.core.guidance`.
"""

from __future__ import annotations

from lib_memnoise.methods.none import mitigate as mitigate
