"""Do blocks and sides matter? Tiny World's subjects with n = 1, 4 and 16 blocks, on one side and on both.

ETHER, Bini et al. 2024, arXiv:2405.20271, tables 9 to 11: blocks hardly do, both sides of ETHER+ do.
`python -m research.study_blocks --output_dir runs/blocks` trains variants × blocks × subjects × seeds
adapters, about a minute each on one CPU core; stopped, the same command goes on. It writes blocks.json and
blocks.png.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from research import BASE
from research.study import (
    Cells,
    Training,
    cells_json,
    learn_all,
    run_study,
    study_parser,
    summarise,
    write_study,
)

if TYPE_CHECKING:
    from ether_diffusion.strict_json import Json

SUBJECTS = ("panda", "crown", "sailboat")
VARIANTS: "Mapping[str, Mapping[str, Json]]" = {
    "ETHER": {"adapter": "ether", "sides": "input"},
    "ETHER+ one-sided": {"adapter": "ether_plus", "sides": "input"},
    "ETHER+": {"adapter": "ether_plus", "sides": "both"},
}
PANELS = {
    "object": "likeness to the true pictures",
    "recognised": "share recognised",
    "tiny_t": "likeness to the prompt",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study. Return 0, or 2 for what the user can mend."""
    parser = study_parser(__doc__, SUBJECTS)
    parser.add_argument("--blocks", nargs="+", type=int, default=[1, 4, 16], help="per side (1 4 16)")
    parser.add_argument("--steps", type=int, default=200, help="of each training (200)")
    return run_study("study_blocks", parser, _run, arguments)


def plan(blocks: Sequence[int], subjects: Sequence[str], seeds: Sequence[int], steps: int) -> list[Training]:
    """Return all trainings of a study."""
    return [
        Training(
            {"variant": variant, "num_blocks": number, "subject": subject, "seed": seed, "steps": steps},
            ("variant", "num_blocks"),
            Path(*(x.replace(" ", "_").lower() for x in (variant, f"{number} blocks", f"{subject}_{seed}"))),
            {**settings, "num_blocks": number, "max_train_steps": steps},
        )
        for subject in dict.fromkeys(subjects)
        for seed in dict.fromkeys(seeds)
        for variant, settings in VARIANTS.items()
        for number in dict.fromkeys(blocks)
    ]


def _run(parsed: argparse.Namespace) -> None:
    trainings = plan(parsed.blocks, parsed.subjects, parsed.seeds, parsed.steps)
    results = learn_all(trainings, parsed.output_dir, parsed.inference_steps)
    cells = summarise(results)
    found = {
        "base_name": BASE,
        "steps": parsed.steps,
        "inference_steps": parsed.inference_steps,
        "subjects": list(parsed.subjects),
        "seeds": list(parsed.seeds),
        "runs": [{**training.asked, "scores": dict(scores)} for training, scores in results],
        "variants": cells_json(cells),
    }
    write_study(parsed.output_dir, "blocks", found, blocks=draw_bars(cells))


def draw_bars(cells: Cells) -> bytes:
    """Return a PNG: for each score a group of bars by variant, a bar by number of blocks."""
    from ether_diffusion.metrics.report import new_figure, png_of

    figure = new_figure(4.8 * len(PANELS), 3.6)
    blocks = sorted({num_blocks for row in cells.values() for num_blocks in row})
    width = 0.8 / len(blocks)
    for axes, (name, title) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        for place, num_blocks in enumerate(blocks):
            there = {
                group: row[num_blocks][name]
                for group, row in enumerate(cells.values())
                if name in row.get(num_blocks, {})
            }
            axes.bar(
                [group + (place - (len(blocks) - 1) / 2) * width for group in there],
                [found.mean for found in there.values()],
                width,
                yerr=[found.standard_error or 0.0 for found in there.values()],
                capsize=3,
                label=f"n = {num_blocks}",
                color=("#9ec5fe", "#5b8ff9", "#1f3f8f", "#0b1b3f")[place % 4],
            )
        axes.set_xticks(range(len(cells)), list(cells))
        axes.set_title(title)
        axes.grid(axis="y", alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(blocks))
    return png_of(figure)


if __name__ == "__main__":
    sys.exit(main())
