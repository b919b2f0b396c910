"""How much a method's learning rate matters: subjects of Tiny World learned at many, fidelity and distance.

The claim of ETHER, Bini et al. 2024, arXiv:2405.20271, figures 4, 5 and 8: bounded transforms keep working
over magnitudes of learning rate.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ether_diffusion.adapter_file.strict_json import Json
from ether_diffusion.evaluation.columns import PROMPT
from ether_diffusion.evaluation.likeness import Estimate
from research.kept_scores import Scores, kept_scores
from research.subject_scores import FIDELITY, learn_and_score, score_base, summarise

TOLERANCE = 0.05
MAX_PROMPT_LOSS = 0.1
"""As for the best step of a run (`eval_max_prompt_loss`): what ignores the prompt is not usable."""
BASE = "base"


@dataclass(frozen=True)
class StudyRun:
    """One training of the study."""

    method: str
    learning_rate: float
    subject: str
    seed: int

    def folder(self, root: Path) -> Path:
        """Return where it lies."""
        name = f"{self.subject.replace(' ', '_')}_{self.seed}"
        return root / self.method / f"{self.learning_rate:g}" / name


@dataclass(frozen=True)
class UsableRange:
    """The least and the greatest rate whose score is within the tolerance of the best's.

    ratio is highest / lowest; missed are rates between them whose score is not, is_open whether one of them
    is the least or the greatest that was tried: the range may reach further.
    """

    lowest: float
    highest: float
    best: float
    ratio: float
    missed: tuple[float, ...]
    is_open: bool


def carry_out(run: StudyRun, root: Path, *, max_train_steps: int, num_inference_steps: int) -> Scores:
    """Train, draw and score one run, or read what it came to before.

    Raises:
        ValueError: the settings cannot be used, or an earlier run had others.
        InterruptedError: a signal stopped the training; called again, it goes on.
    """
    settings: dict[str, Json] = {
        "adapter": run.method,
        "learning_rate": run.learning_rate,
        "max_train_steps": max_train_steps,
    }
    asked: dict[str, Json] = {**asdict(run), "steps": max_train_steps}
    return learn_and_score(run.subject, run.seed, run.folder(root), asked, settings, num_inference_steps)


def carry_out_base(subject: str, seed: int, root: Path, *, num_inference_steps: int) -> Scores:
    """Score what the base draws without an adapter, or read what it came to before.

    Raises:
        ValueError: an earlier run had other settings.
    """
    asked: dict[str, Json] = {"subject": subject, "seed": seed, "inference_steps": num_inference_steps}
    folder = root / BASE / f"{subject.replace(' ', '_')}_{seed}"
    return kept_scores(folder, asked, lambda: score_base(subject, seed, num_inference_steps))


def by_rates(results: Mapping[StudyRun, Scores]) -> dict[str, dict[float, dict[str, Estimate]]]:
    """Return estimates by method, rate in ascending order, and score."""
    summary: dict[str, dict[float, dict[str, Estimate]]] = {}
    cells = summarise(results, lambda run: (run.method, run.learning_rate))
    for method in dict.fromkeys(method for method, _ in cells):
        rates = sorted(rate for name, rate in cells if name == method)
        summary[method] = {rate: cells[method, rate] for rate in rates}
    return summary


def usable_range(scores: Mapping[float, float], *, tolerance: float = TOLERANCE) -> UsableRange | None:
    """Return the range of rates that score at least best − tolerance · |best|.

    Give −inf for rates that came to nothing. None where no rate has a finite score.
    """
    rates = sorted(scores)
    finite = [rate for rate in rates if math.isfinite(scores[rate])]
    if not finite:
        return None
    best = max(finite, key=lambda rate: scores[rate])
    limit = scores[best] - tolerance * abs(scores[best])
    usable = [rate for rate in finite if scores[rate] >= limit]
    low, high = usable[0], usable[-1]
    missed = tuple(rate for rate in rates if low < rate < high and rate not in usable)
    is_open = len(rates) > 1 and (low == rates[0] or high == rates[-1])
    return UsableRange(low, high, best, high / low, missed, is_open)


def fidelity_range(
    rates: Mapping[float, Mapping[str, Estimate]], *, least_prompt: float = -math.inf
) -> UsableRange | None:
    """Return a method's usable range by fidelity, of rates that keep to the prompt.

    least_prompt is the likeness to the prompts below which a rate is not usable, however like the photos its
    pictures are: those that show a photo whatever is asked are the most like it.
    """
    return usable_range(
        {
            rate: found[FIDELITY].mean
            if FIDELITY in found and found[PROMPT].mean >= least_prompt
            else -math.inf
            for rate, found in rates.items()
        }
    )


def least_prompt(base: Sequence[Scores]) -> float:
    """Return the likeness to the prompts that a usable rate keeps, from the scores of the base."""
    mean = math.fsum(scores[PROMPT] for scores in base) / len(base)
    return mean - MAX_PROMPT_LOSS * abs(mean)


def plan_runs(
    methods: Sequence[str], rates: Sequence[float], subjects: Sequence[str], seeds: Sequence[int]
) -> list[StudyRun]:
    """Return all runs of a study: each method at each rate on each subject and seed."""
    return [
        StudyRun(method, rate, subject, seed)
        for method in methods
        for rate in dict.fromkeys(rates)
        for subject in dict.fromkeys(subjects)
        for seed in dict.fromkeys(seeds)
    ]
