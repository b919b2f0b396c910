"""The rules of an evaluated run: which step is the best, and when it is good enough to stop."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev

from ether_diffusion.training.config import EvaluationConfig


@dataclass(frozen=True)
class Measured:
    """Scores picture by picture, in one order at every step.

    `fidelity` is likeness to the photos and `prompt` likeness to the own prompt (cosines). `drift` is the
    distance (1 - cosine) from the base's picture of the same prompt and seed, in units of the mean distance
    between the base's pictures of different prompts.
    """

    fidelity: tuple[float, ...]
    prompt: tuple[float, ...]
    drift: tuple[float, ...]


@dataclass(frozen=True)
class Score:
    """A mean and its standard error over pictures; None where there is one picture."""

    mean: float
    standard_error: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Score":
        """Return the mean of values that are independent of each other."""
        error = None if len(values) < 2 else stdev(values) / math.sqrt(len(values))
        return cls(fmean(values), error)


@dataclass(frozen=True)
class Record:
    """What was measured after so many updates; step 0 is the base, whatever the adapter begins with."""

    step: int
    measured: Measured

    @property
    def scores(self) -> dict[str, Score]:
        """The mean of each measure."""
        return {name: Score.of(values) for name, values in asdict(self.measured).items()}

    @property
    def fidelity(self) -> Score:
        """Likeness to the photos."""
        return Score.of(self.measured.fidelity)

    @property
    def prompt(self) -> Score:
        """Likeness to the prompts."""
        return Score.of(self.measured.prompt)

    @property
    def drift(self) -> Score:
        """Distance from the base on prompts without the subject."""
        return Score.of(self.measured.drift)


@dataclass(frozen=True)
class Stop:
    """Where a run is good, and why."""

    step: int
    reason: str


@dataclass(frozen=True)
class Curve:
    """All evaluations of a run, the base first, then by step, and what its settings make of them."""

    records: tuple[Record, ...]
    config: EvaluationConfig

    @property
    def base(self) -> Record:
        """What the base scores."""
        return self.records[0]

    @property
    def least_prompt(self) -> float:
        """The likeness to prompts below which a step is no candidate."""
        base = self.base.prompt.mean
        return base - self.config.eval_max_prompt_loss * abs(base)

    def is_candidate(self, record: Record) -> bool:
        """Say whether a step keeps to the bounds; the base is none."""
        return (
            record.step > 0
            and record.drift.mean <= self.config.eval_max_drift
            and record.prompt.mean >= self.least_prompt
        )

    def best(self) -> Record | None:
        """Return the candidate of the highest fidelity, the earliest of equal ones."""
        candidates = [record for record in self.records if self.is_candidate(record)]
        return max(candidates, key=lambda record: record.fidelity.mean, default=None)

    def stop(self) -> Stop | None:
        """Return where the run became good: a candidate rose above the base, and nothing above it since.

        To rise is to gain more than the standard error of the gain, over the same prompts and seeds. The
        run is good after eval_patience evaluations without a rise.
        """
        mark, waited = self.base, 0
        for record in self.records[1:]:
            if self.is_candidate(record) and _rises(mark, record):
                mark, waited = record, 0
            elif mark is not self.base:
                waited += 1
            if waited == self.config.eval_patience:
                return Stop(record.step, self._reason(mark, waited))
        return None

    def _reason(self, mark: Record, waited: int) -> str:
        gain = (
            f"fidelity rose from the base's {self.base.fidelity.mean:.3f} to {mark.fidelity.mean:.3f} at step"
        )
        evaluations = "evaluation" if waited == 1 else f"{waited} evaluations"
        return f"{gain} {mark.step} and by no more than its standard error in the {evaluations} since"


def _rises(before: Record, after: Record) -> bool:
    """Say whether fidelity gained more than the standard error of the gain, picture by picture."""
    pairs = zip(after.measured.fidelity, before.measured.fidelity, strict=True)
    gain = Score.of([now - then for now, then in pairs])
    return gain.mean > (gain.standard_error or 0.0)
