"""How much does a method's learning rate matter? Tiny World's subjects learned at many, over magnitudes.

The claim of ETHER, Bini et al. 2024, arXiv:2405.20271, figures 4, 5 and 8: bounded transforms keep working
over magnitudes of learning rate. `python -m research.study_learning_rate --output_dir runs/rates` trains
methods × rates × subjects × seeds adapters, about a minute each on one CPU core; stopped, the same command
goes on. Methods are rows of `ether benchmark`. It writes study.json and study.png.
"""

import argparse
import logging
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, TypeVar

from research import BASE
from research.study import (
    Scores,
    Training,
    cells_json,
    check_settings,
    draw_curves,
    learn_all,
    run_study,
    settings_of,
    study_parser,
    summarise,
    write_study,
)

if TYPE_CHECKING:
    from ether_diffusion.metrics.scores import Estimate

logger = logging.getLogger(__name__)

Number = TypeVar("Number", int, float)
METHODS = ("ether_plus", "ether_plus:target_modules=.*to_(v|out.0)", "ether", "lora", "oft")
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
SUBJECTS = ("panda",)
"""None of the benchmark."""
TOLERANCE = 0.05
MAX_PROMPT_LOSS = 0.1
"""As for the best step of a run (`eval_max_prompt_loss`): what ignores the prompt is not usable."""
PANELS = {
    "object": "likeness to the true pictures",
    "tiny_t": "likeness to the prompt",
    "recognised": "share recognised as the subject",
    "drift": "drift on prompts without the subject",
    "weight_distance": "distance of the weights, ‖W' − W‖ / ‖W‖",
    "transform_distance": "distance of the transform, ‖T − I‖",
}


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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study. Return 0, or 2 for what the user can mend."""
    parser = study_parser(__doc__, SUBJECTS)
    parser.add_argument("--methods", nargs="+", default=METHODS, metavar="ROW")
    parser.add_argument("--learning_rates", nargs="+", type=float, default=RATES)
    parser.add_argument("--steps", type=int, default=200, help="of each training (200)")
    return run_study("study_learning_rate", parser, _run, arguments)


def plan(
    methods: Sequence[str], rates: Sequence[float], subjects: Sequence[str], seeds: Sequence[int], steps: int
) -> list[Training]:
    """Return all trainings of a study: each method at each rate, in ascending order."""
    from ether_diffusion.benchmark.plan import folder_of

    return [
        Training(
            {"method": method, "learning_rate": rate, "subject": subject, "seed": seed, "steps": steps},
            ("method", "learning_rate"),
            Path(folder_of(method), f"{rate:g}", f"{subject.replace(' ', '_')}_{seed}"),
            {**settings_of(method), "learning_rate": rate, "max_train_steps": steps},
        )
        for method in dict.fromkeys(methods)
        for rate in sorted(set(rates))
        for subject in dict.fromkeys(subjects)
        for seed in dict.fromkeys(seeds)
    ]


def kept_fidelity(row: "Mapping[Number, Mapping[str, Estimate]]", least_prompt: float) -> dict[Number, float]:
    """Return the fidelity of what came to something and is at least so like the prompts.

    What shows a photo whatever is asked is the most like the photos.
    """
    return {
        key: found["object"].mean
        for key, found in row.items()
        if "object" in found and found["tiny_t"].mean >= least_prompt
    }


def usable_range(scores: Mapping[float, float]) -> UsableRange | None:
    """Return the range of rates that score at least best − tolerance · |best|.

    Give −inf for rates that came to nothing. None where no rate has a finite score.
    """
    rates = sorted(scores)
    finite = [rate for rate in rates if math.isfinite(scores[rate])]
    if not finite:
        return None
    best = max(finite, key=lambda rate: scores[rate])
    limit = scores[best] - TOLERANCE * abs(scores[best])
    usable = [rate for rate in finite if scores[rate] >= limit]
    low, high = usable[0], usable[-1]
    missed = tuple(rate for rate in rates if low < rate < high and rate not in usable)
    is_open = len(rates) > 1 and (low == rates[0] or high == rates[-1])
    return UsableRange(low, high, best, high / low, missed, is_open)


def fidelity_range(
    row: "Mapping[float, Mapping[str, Estimate]]", *, least_prompt: float = -math.inf
) -> UsableRange | None:
    """Return a method's usable range by fidelity, of rates that keep to the prompt."""
    kept = kept_fidelity(row, least_prompt)
    return usable_range({rate: kept.get(rate, -math.inf) for rate in row})


def least_prompt(base: Sequence[Scores]) -> float:
    """Return the likeness to the prompts that a usable rate keeps, from the scores of the base."""
    mean = fmean(scores["tiny_t"] for scores in base)
    return mean - MAX_PROMPT_LOSS * abs(mean)


def base_of(parsed: argparse.Namespace) -> tuple[Scores, float]:
    """Return the mean scores of the base alone over a study's subjects and seeds, and `least_prompt`."""
    from research.subject_scores import kept_base_scores

    scores = [
        kept_base_scores(subject, seed, parsed.output_dir, parsed.inference_steps)
        for subject in dict.fromkeys(parsed.subjects)
        for seed in dict.fromkeys(parsed.seeds)
    ]
    return {name: fmean(each[name] for each in scores) for name in scores[0]}, least_prompt(scores)


def _run(parsed: argparse.Namespace) -> None:
    from ether_diffusion.benchmark.plan import labels_of

    trainings = plan(parsed.methods, parsed.learning_rates, parsed.subjects, parsed.seeds, parsed.steps)
    check_settings(trainings)
    base, least = base_of(parsed)
    cells = summarise(learn_all(trainings, parsed.output_dir, parsed.inference_steps))
    ranges = {method: fidelity_range(row, least_prompt=least) for method, row in cells.items()}
    by_fidelity = {method: fidelity_range(row) for method, row in cells.items()}
    found = {
        "base_name": BASE,
        "steps": parsed.steps,
        "inference_steps": parsed.inference_steps,
        "subjects": list(parsed.subjects),
        "seeds": list(parsed.seeds),
        "base": dict(base),
        "least_prompt": least,
        "methods": cells_json(cells),
        "usable_range": {name: each and asdict(each) for name, each in ranges.items()},
        "range_by_fidelity_alone": {name: each and asdict(each) for name, each in by_fidelity.items()},
    }
    plot = draw_curves(PANELS, cells, base, labels_of(cells), size=(15, 8), xlabel="learning rate")
    write_study(parsed.output_dir, "study", found, study=plot)
    for method, each in ranges.items():
        shown = "none" if each is None else f"{each.lowest:g} to {each.highest:g}, {each.ratio:.3g} times"
        logger.info("%s: usable learning rates %s", method, shown)


if __name__ == "__main__":
    sys.exit(main())
