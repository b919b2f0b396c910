"""Which methods, rates and options help? What is learned of a subject, and what is lost of the base.

`python -m research.study_strength --output_dir runs/strength` trains rows × subjects × seeds adapters on
Tiny World 2, a minute for 200 steps on one CPU core; stopped, the same command goes on. It writes
strength.json and strength.png. None of the subjects is the benchmark's. Rows are those of `ether benchmark`.
"""

import argparse
import logging
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from research import BASE
from research.study import (
    SHARED,
    Cells,
    Scores,
    Training,
    cells_json,
    check_settings,
    kept_scores,
    run_study,
    settings_of,
    study_parser,
    summarise,
    write_study,
)

if TYPE_CHECKING:
    from ether_diffusion.metrics.scores import Estimate
    from ether_diffusion.strict_json import Json

logger = logging.getLogger(__name__)

SUBJECTS = ("panda", "crown")
VALUES = "target_modules=.*to_(v|out.0)"
"""Half of the projections: what is read and written, and not how much of it."""
METHODS = (
    *(f"ether_plus:learning_rate={rate}" for rate in (0.003, 0.01)),
    *(f"ether_plus:{VALUES},learning_rate={rate}" for rate in (0.003, 0.01)),
    "ether_plus:num_blocks=4,learning_rate=0.003",
    *(f"ether_plus:sides=output,learning_rate={rate}" for rate in (0.003, 0.01)),
    "ether_plus:sides=input,learning_rate=0.003",
    *(f"ether:learning_rate={rate}" for rate in (0.01, 0.1)),
    "ether:num_blocks=1,learning_rate=0.01",
    *(f"lora:rank={rank},learning_rate={rate}" for rank in (1, 2) for rate in (0.001, 0.003)),
    *(f"lora:learning_rate={rate}" for rate in (0.001, 0.003)),
    "lora:rank=16,learning_rate=0.001",
    *(f"delora:learning_rate={rate}" for rate in (0.001, 0.003)),
    *(
        "hra:learning_rate=0.03",
        "oft:learning_rate=0.001",
        "ia3:learning_rate=0.03",
        "full:learning_rate=0.0001",
    ),
)
"""Each method at the best of the rates that were tried before, and at the next ones where that was near."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study. Return 0, or 2 for what the user can mend."""
    parser = study_parser(__doc__, SUBJECTS, draws=False)
    parser.add_argument("--methods", nargs="+", default=METHODS, metavar="ROW")
    parser.add_argument(
        "--steps", nargs="+", type=int, default=[50, 100, 200], help="of trainings (50 100 200)"
    )
    return run_study("study_strength", parser, _run, arguments)


def plan(
    rows: Sequence[str], steps: Sequence[int], subjects: Sequence[str], seeds: Sequence[int]
) -> list[Training]:
    """Return all trainings of a study; a longer one goes on where the shorter one ended."""
    return [
        Training(
            {"method": row, "steps": number, "subject": subject, "seed": seed},
            ("method", "steps"),
            _folder(row, subject, seed) / f"{number} steps",
            {**SHARED, **settings_of(row), "max_train_steps": number, "checkpointing_steps": number},
        )
        for subject in dict.fromkeys(subjects)
        for seed in dict.fromkeys(seeds)
        for row in dict.fromkeys(rows)
        for number in sorted(set(steps))
    ]


def _folder(row: Any, subject: Any, seed: Any) -> Path:
    """Return where a row is trained."""
    from ether_diffusion.benchmark.plan import folder_of

    return Path(folder_of(row), f"{subject}_{seed}")


def without_rate(row: str) -> str:
    """Return a row without its learning rate, the last of its options."""
    return re.sub(r"[:,]learning_rate=[^,]*$", "", row)


def _run(parsed: argparse.Namespace) -> None:
    trainings = plan(parsed.methods, parsed.steps, parsed.subjects, parsed.seeds)
    check_settings(trainings)
    results = [(training, _learned(training, parsed.output_dir)) for training in trainings]
    cells = summarise(results)
    found: dict[str, Json] = {
        "subjects": list(parsed.subjects),
        "seeds": list(parsed.seeds),
        "base": BASE,
        "settings": {row: settings_of(row) for row in parsed.methods},
        "runs": [{**training.asked, "scores": dict(scores)} for training, scores in results],
        "methods": cells_json(cells),
    }
    write_study(parsed.output_dir, "strength", found, strength=draw_front(cells))


def _learned(training: Training, root: Path) -> Scores:
    """Train and measure, or read what came of it before; nothing where training diverged."""
    from safetensors.torch import load_file

    from ether_diffusion.adapters.format import TENSORS_NAME
    from ether_diffusion.tiny_world.concepts import find_concept
    from ether_diffusion.training.loop import NonFiniteError
    from ether_diffusion.training.methods import attach_saved
    from recipes.tiny_world.learned_subject import learn_subject
    from research.base import load_base
    from research.scene_loss import scene_scores

    folder, subject = root / training.folder, str(training.asked["subject"])
    place = _folder(*(training.asked[name] for name in ("method", "subject", "seed")))

    def measure() -> Scores:
        settings = {**training.settings, "seed": training.asked["seed"]}
        try:
            adapter = learn_subject(find_concept(subject), root / place, settings, base=BASE)
        except NonFiniteError as error:
            logger.info("%s: %s", root / place, error)
            return {}
        pipeline = load_base()
        attach_saved(pipeline, adapter)
        found = scene_scores(pipeline, subject)
        if not all(map(math.isfinite, found.values())):
            return {}
        parameters = sum(tensor.numel() for tensor in load_file(adapter / TENSORS_NAME).values())
        return {**found, "parameters": parameters}

    return kept_scores(folder, training.asked, measure)


def draw_front(cells: Cells) -> bytes:
    """Return a PNG: the loss after the longest training over parameters, each row at its best rate."""
    from ether_diffusion.benchmark.plan import label_of
    from ether_diffusion.metrics.report import new_figure, png_of

    figure = new_figure(9, 5.5)
    axes = figure.subplots()
    best: dict[str, Mapping[str, Estimate]] = {}
    for row, columns in cells.items():
        name, found = without_rate(row), columns[max(columns)]
        if found and (name not in best or found["scene_loss"].mean < best[name]["scene_loss"].mean):
            best[name] = found
    for name, found in best.items():
        place = found["parameters"].mean, found["scene_loss"].mean
        axes.plot(*place, "o", color="tab:red" if name.startswith("ether") else "tab:blue")
        axes.annotate(label_of(name), place, (6, 4), textcoords="offset points", fontsize=7)
    axes.set(xscale="log", xlabel="trained parameters", ylabel="loss on true pictures of new scenes")
    axes.grid(alpha=0.3)
    return png_of(figure)


if __name__ == "__main__":
    sys.exit(main())
