"""When classifier-free guidance is on."""

from __future__ import annotations

from dataclasses import dataclass, field

from lib_memnoise.settings import ResolvedSettings

TIMESTEP_ROUNDING = 0.01
"""Tolerance in timesteps. A timestep recovered from a float32 sigma is off by up to about 1e-3, and published values of
τ are rounded to four decimals, while the steps of any sampler are whole timesteps apart."""
ALWAYS = 999.0
"""The τ with which guidance is on from the first step."""


def guidance_off(timestep: float, tau: float) -> bool:
    """Whether guidance is off at this timestep: t > τ (Algorithm 1). It is on where t equals τ up to rounding.

    Both are timesteps of the training schedule, 0…999, whatever unit the sampler counts in. While guidance is off, the
    unconditional prediction is followed: ε_CFG(x_t, t, y) = ε_θ(x_t, t, y_null).
    """
    return timestep > tau + TIMESTEP_ROUNDING


def transition_point(curve: list[tuple[float, float]]) -> float | None:
    """The timestep of the first local minimum of ‖Δ‖ along a trajectory; None where there is none yet.

    A minimum is known one step later, where d[k−2] > d[k−1] < d[k] (Jain et al. 2025).

    Args:
        curve: descending timesteps, each with its ‖Δ‖.
    """
    for (_, before), (t, value), (_, after) in zip(curve, curve[1:], curve[2:]):
        if before > value < after:
            return t
    return None


@dataclass
class Start:
    """When guidance starts for one image: at τ, or at its own transition point."""

    tau: float = ALWAYS
    """The timestep at which guidance starts; with `at_transition`, the latest at which it does."""
    at_transition: bool = False
    """Whether guidance starts at the image's own transition point."""
    opposite: float = 0.0
    """The strength s of opposite guidance until then; 0 means that the unconditional prediction is followed."""
    curve: list[tuple[float, float]] = field(default_factory=list)
    """The timestep and ‖Δ‖ of each step so far."""

    @property
    def evaluates_prompt(self) -> bool:
        """Whether the prompt is evaluated while guidance is off as well."""
        return self.at_transition or self.opposite > 0

    def observe(self, timestep: float, magnitude: float) -> None:
        """Add ‖Δ(x_t, t)‖ of this step to the curve, before `is_off` is called for it."""
        if not self.curve or timestep < self.curve[-1][0]:  # some samplers evaluate twice at one timestep
            self.curve.append((timestep, magnitude))

    def is_off(self, timestep: float) -> bool:
        """Whether guidance is off at this timestep, 0…999."""
        if self.at_transition and transition_point(self.curve) is not None:
            return False
        return guidance_off(timestep, self.tau)


def start_timestep(settings: ResolvedSettings, first: float) -> tuple[float, float | None]:
    """τ, or the latest timestep of a transition, in a pass that begins at the timestep `first`.

    A pass that does not begin above a preset's τ (few steps of DDIM, img2img) would never hold guidance back, and would
    lose half of the method. There, guidance starts at the same share of `first` as τ is of the timestep that it was
    published for.

    Args:
        settings: resolved, with guidance that starts later than at the first step.

    Returns:
        The timestep, and the share of `first` that it is; the share is None where τ was taken as it is.
    """
    tau = settings.latest if settings.start == "transition" else settings.tau
    assert tau is not None and settings.tau_of is not None
    if settings.tau_of == 0 or guidance_off(first, tau):
        return tau, None
    share = tau / settings.tau_of
    return share * first, share


def make_start(settings: ResolvedSettings, first: float) -> Start:
    """The start of guidance that resolved settings ask for, in a pass that begins at the timestep `first`."""
    if settings.start == "first":
        return Start()
    assert settings.opposite is not None
    tau, _ = start_timestep(settings, first)
    return Start(tau, at_transition=settings.start == "transition", opposite=settings.opposite)
