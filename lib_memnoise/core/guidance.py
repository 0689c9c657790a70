"""When classifier-free guidance is on."""

from __future__ import annotations

from dataclasses import dataclass, field

from lib_memnoise.settings import ResolvedSettings

TIMESTEP_ROUNDING = 0.01
"""A timestep recovered from a float32 sigma is off by up to about 1e-3, and published values of τ are rounded to
four decimals, while the steps of any sampler's grid lie whole timesteps apart."""
ALWAYS = 999.0
"""τ of guidance that is on from the first step."""


def guidance_off(timestep: float, tau: float) -> bool:
    """Whether guidance is off at this timestep: `t > τ` (Algorithm 1), where t = τ up to rounding is on.

    Both are timesteps of the training schedule, 0…999, whatever the sampler counts in. Off means that the
    unconditional prediction is followed: ε_CFG(x_t, t, y) = ε_θ(x_t, t, y_null).
    """
    return timestep > tau + TIMESTEP_ROUNDING


def transition_point(curve: list[tuple[float, float]]) -> float | None:
    """The timestep of the first local minimum of ‖Δ‖ along a trajectory, if it has one.

    It is known one step after it: where d[k−2] > d[k−1] < d[k] (Jain et al. 2025). `curve`: timesteps, descending, each
    with its ‖Δ‖.
    """
    for (_, before), (t, value), (_, after) in zip(curve, curve[1:], curve[2:]):
        if before > value < after:
            return t
    return None


@dataclass
class Start:
    """When guidance starts for one image: at τ, or at its own transition point."""

    tau: float = ALWAYS
    """The latest timestep at which it starts, and where there is no transition to wait for, the only one."""
    at_transition: bool = False
    opposite: float = 0.0
    """s of opposite guidance until then."""
    curve: list[tuple[float, float]] = field(default_factory=list)
    """Timestep and ‖Δ‖ of each step so far."""

    @property
    def evaluates_prompt(self) -> bool:
        """Whether the prompt is evaluated also while guidance is off."""
        return self.at_transition or self.opposite > 0

    def observe(self, timestep: float, magnitude: float) -> None:
        """‖Δ(x_t, t)‖, seen before it is decided how this step goes on."""
        if not self.curve or timestep < self.curve[-1][0]:  # some samplers ask twice at one timestep
            self.curve.append((timestep, magnitude))

    def is_off(self, timestep: float) -> bool:
        if self.at_transition and transition_point(self.curve) is not None:
            return False
        return guidance_off(timestep, self.tau)


def start_timestep(settings: ResolvedSettings, first: float) -> tuple[float, float | None]:
    """τ, or the latest timestep of a transition, in a pass that begins at the timestep `first`.

    Args:
        settings: resolved, with guidance that starts later than at the first step.

    Returns:
        The timestep; and what share of `first` it is, where it was taken as one: a pass that does not begin above a
        preset's τ (few steps of DDIM, img2img) would never hold guidance back otherwise, and half the method be gone.
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
