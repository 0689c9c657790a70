"""A transition point alone: the noise as it was drawn, and guidance that starts later (Jain et al. 2025).

Static: at τ. Dynamic: at the first local minimum of ‖Δ‖ along the trajectory. Opposite guidance: away from the prompt
until then. All of it is in `lib_memnoise.core.guidance`.
"""

from __future__ import annotations

from lib_memnoise.methods.none import mitigate as mitigate
