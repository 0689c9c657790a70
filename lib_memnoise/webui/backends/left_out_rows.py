"""When hosts leave out the unconditional rows of a step: "skip early CFG" and NGMS, as their denoisers have them."""

from __future__ import annotations

from dataclasses import dataclass

from modules import shared


@dataclass(frozen=True)
class StepNow:
    """The facts about a step that decide whether the host leaves out its unconditional rows."""

    number: int
    total: int
    sigma: float
    handed_floor: float
    """NGMS's sigma, as the sampler is given it from p."""

    @property
    def progress(self) -> float:
        """The share of steps that are done, 0…1."""
        return self.number / self.total

    @property
    def early(self) -> float:
        """The option "skip early CFG"."""
        return float(getattr(shared.opts, "skip_early_cond", 0.0))

    def is_below(self, floor: float) -> bool:
        """Whether NGMS is on and the step's sigma is below its own."""
        return floor > 0 and self.sigma < floor

    def takes_turns(self, turn: int) -> bool:
        """Whether NGMS acts in this step, which it does in every other step or in all."""
        return self.number % 2 == turn or bool(getattr(shared.opts, "s_min_uncond_all", False))


def by_a1111(step: StepNow) -> bool:
    """AUTOMATIC1111's rule, which Forge kept."""
    skips = step.early > 0 and step.progress <= step.early
    return skips or (step.is_below(step.handed_floor) and step.takes_turns(1))


def by_reforge(step: StepNow) -> bool:
    """It takes NGMS's sigma from the option, and the other steps in turn."""
    skips = step.number < step.early or (step.early != 0 and step.progress <= step.early)
    floor = float(getattr(shared.opts, "s_min_uncond", 0.0))
    return skips or (step.is_below(floor) and step.takes_turns(0))


def by_classic(step: StepNow) -> bool:
    """It sets the CFG scale to 1, which leaves the rows out. Its comparison is true of step 0 with the option at 0."""
    return step.progress <= step.early or step.is_below(step.handed_floor)
