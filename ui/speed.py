"""How long steps take on this machine, as measured while pictures were drawn."""

from dataclasses import dataclass

from ether_diffusion.pipelines.sampling import Sampling


@dataclass(frozen=True)
class Pace:
    """Seconds per denoising step, and per picture beside its steps."""

    step: float
    picture: float


class Speed:
    """The last measured pace by size and guidance; what was not measured is scaled from what was."""

    def __init__(self, native_size: int) -> None:
        self._native_size = native_size
        self._paces: dict[tuple[int, bool], Pace] = {}

    def measured(self, sampling: Sampling, pace: Pace) -> None:
        """Remember what was measured."""
        self._paces[self._kind(sampling)] = pace

    def of(self, sampling: Sampling) -> Pace | None:
        """Return the pace to expect; None before anything was measured."""
        pixels, is_guided = kind = self._kind(sampling)
        if kind in self._paces or not self._paces:
            return self._paces.get(kind)
        nearest = min(self._paces, key=lambda known: abs(known[0] - pixels))
        ratio = pixels / nearest[0] * (1 + is_guided) / (1 + nearest[1])
        return Pace(self._paces[nearest].step * ratio, self._paces[nearest].picture * pixels / nearest[0])

    def _kind(self, sampling: Sampling) -> tuple[int, bool]:
        width, height = (side or self._native_size for side in (sampling.width, sampling.height))
        return width * height, sampling.guidance_scale > 1  # without guidance, half the work
