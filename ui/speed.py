"""How long steps take on this machine, as measured while pictures were drawn."""

from dataclasses import dataclass

from ether_diffusion.pipelines.sampling import Sampling
from ether_diffusion.ui.cost import Cost


@dataclass(frozen=True)
class Pace:
    """Seconds per denoising step, and per picture beside its steps."""

    step: float
    picture: float


class Speed:
    """The last measured pace by size and guidance; what was not measured is scaled from what was."""

    def __init__(self, cost: Cost) -> None:
        self._cost = cost
        self._paces: dict[tuple[int, int, bool], Pace] = {}

    def measured(self, sampling: Sampling, pace: Pace) -> None:
        """Remember what was measured."""
        self._paces[self._kind(sampling)] = pace

    def of(self, sampling: Sampling) -> Pace | None:
        """Return the pace to expect, by the operations of a step; None before anything was measured."""
        kind = self._kind(sampling)
        if kind in self._paces or not self._paces:
            return self._paces.get(kind)
        pixels = kind[0] * kind[1]
        nearest = min(self._paces, key=lambda known: abs(known[0] * known[1] - pixels))
        ratio = self._cost.step_flop(*kind) / self._cost.step_flop(*nearest)
        known = self._paces[nearest]
        return Pace(known.step * ratio, known.picture * pixels / (nearest[0] * nearest[1]))

    def _kind(self, sampling: Sampling) -> tuple[int, int, bool]:
        return *self._cost.size(sampling), sampling.guidance_scale > 1  # without guidance, half the work
