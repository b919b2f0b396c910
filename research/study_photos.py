"""How many photos, and how many steps? Subjects of Tiny World learned from few and more, for long or not.

`python -m research.study_photos --output_dir runs/photos` trains photos × steps × subjects × seeds adapters,
about a minute each on one CPU core; stopped, the same command goes on. The method is a row of `ether
benchmark`. It writes photos.json and photos.png.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from research import BASE
from research.study import (
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

ADVISED = "ether_plus:target_modules=.*to_(v|out.0)"
SUBJECTS = ("panda", "sailboat")
NEARLY = 0.02
"""The share of the best likeness that fewer steps, or parameters, may lack: with 5 % less is recognised."""
PANELS = {
    "object": "likeness to the true pictures",
    "recognised": "share recognised as the subject",
    "tiny_t": "likeness to the prompt",
    "drift": "drift on prompts without the subject",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study. Return 0, or 2 for what the user can mend."""
    parser = study_parser(__doc__, SUBJECTS)
    parser.add_argument("--num_photos", nargs="+", type=int, default=[1, 2, 4, 6], help="(1 2 4 6)")
    parser.add_argument(
        "--steps", nargs="+", type=int, default=[50, 100, 200, 400], help="of trainings (50 100 200 400)"
    )
    parser.add_argument("--method", default=ADVISED, metavar="ROW", help="(what ether plan advises)")
    return run_study("study_photos", parser, _run, arguments)


def training(row: str, num_photos: int, steps: int, subject: str, seed: int) -> Training:
    """Return one training of the study."""
    return Training(
        {
            "method": row,
            "num_photos": num_photos,
            "steps": steps,
            "subject": subject,
            "seed": seed,
        },
        ("num_photos", "steps"),
        Path(f"{num_photos}_photos", f"{steps}_steps", f"{subject.replace(' ', '_')}_{seed}"),
        {**settings_of(row), "max_train_steps": steps},
        num_photos,
    )


def enough_steps(row: "Mapping[int, Mapping[str, Estimate]]", least_prompt: float) -> int | None:
    """Return the fewest steps whose fidelity is within 2 % of the best that keeps the prompt.

    None where none keeps it.
    """
    from research.study_learning_rate import kept_fidelity

    means = kept_fidelity(row, least_prompt)
    best = max(means.values(), default=0.0)
    return min((steps for steps, mean in means.items() if mean >= best - NEARLY * abs(best)), default=None)


def _run(parsed: argparse.Namespace) -> None:
    from ether_diffusion.benchmark.plan import label_of
    from ether_diffusion.tiny_world.subjects import NUM_PHOTOS
    from research.study_learning_rate import base_of

    wrong = [count for count in parsed.num_photos if not 1 <= count <= NUM_PHOTOS]
    if wrong:
        raise ValueError(f"a subject of Tiny World has 1 to {NUM_PHOTOS} photos; asked for {wrong[0]}")
    trainings = [
        training(parsed.method, num_photos, steps, subject, seed)
        for subject, seed, num_photos, steps in product(
            *(
                dict.fromkeys(each)
                for each in (parsed.subjects, parsed.seeds, parsed.num_photos, parsed.steps)
            )
        )
    ]
    check_settings(trainings)
    base, least = base_of(parsed)
    cells = summarise(learn_all(trainings, parsed.output_dir, parsed.inference_steps))
    found = {
        "method": parsed.method,
        "base_name": BASE,
        "learning_rate": settings_of(parsed.method)["learning_rate"],
        "inference_steps": parsed.inference_steps,
        "subjects": list(parsed.subjects),
        "seeds": list(parsed.seeds),
        "base": dict(base),
        "least_prompt": least,
        "photos": cells_json(cells),
        "enough_steps": {str(number): enough_steps(row, least) for number, row in cells.items()},
    }
    plot = draw_curves(
        PANELS,
        cells,
        base,
        {number: f"{number} photo{'s' if number > 1 else ''}" for number in cells},
        size=(11, 7.4),
        xlabel="steps",
        ticks=sorted({steps for row in cells.values() for steps in row}),
        title=label_of(parsed.method),
    )
    write_study(parsed.output_dir, "photos", found, photos=plot)


if __name__ == "__main__":
    sys.exit(main())
