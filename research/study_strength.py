"""Does a learned strength help, and where should it start? What is learned of a subject, and what is lost.

`python -m research.study_strength --output_dir runs/strength` trains variants × steps × subjects × seeds
adapters of Tiny World, about a minute each on one CPU core; stopped, the same command goes on. It writes
strength.json and strength.png. None of the subjects is the benchmark's.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from research.study import (
    Cells,
    Scores,
    Training,
    cells_json,
    kept_scores,
    run_study,
    study_parser,
    summarise,
    write_study,
)

if TYPE_CHECKING:
    from ether_diffusion.strict_json import Json

SUBJECTS = ("panda", "sailboat")
LEARNED: "Mapping[str, Json]" = {"strength": "learned", "strength_lr": 0.03}
VARIANTS: "Mapping[str, Mapping[str, Json]]" = {
    "ETHER": {"adapter": "ether", "learning_rate": 0.03},
    "ETHER, λ": {"adapter": "ether", "learning_rate": 0.03, **LEARNED},
    "ETHER, λ, gradient": {"adapter": "ether", "learning_rate": 0.03, **LEARNED, "gradient_init": True},
    "ETHER+": {"adapter": "ether_plus", "learning_rate": 0.003},
    "ETHER+, λ": {"adapter": "ether_plus", "learning_rate": 0.003, **LEARNED},
    "ETHER+, λ, gradient": {
        "adapter": "ether_plus", "learning_rate": 0.003, **LEARNED, "strength_lr": 0.01, "gradient_init": True
    },
    "LoRA r=4": {"adapter": "lora", "learning_rate": 0.003},
}  # fmt: skip
SHARED: "Mapping[str, Json]" = {"train_batch_size": 4, "random_flip": True, "export_lora": False}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study. Return 0, or 2 for what the user can mend."""
    parser = study_parser(__doc__, SUBJECTS)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS, metavar="NAME")
    parser.add_argument("--steps", nargs="+", type=int, default=[80], help="of the trainings (80)")
    return run_study("study_strength", parser, _run, arguments)


def plan(
    variants: Sequence[str], steps: Sequence[int], subjects: Sequence[str], seeds: Sequence[int]
) -> list[Training]:
    """Return all trainings of a study."""
    return [
        Training(
            {"variant": variant, "steps": number, "subject": subject, "seed": seed},
            ("variant", "steps"),
            Path(variant.replace(", ", "_").lower(), f"{number} steps", f"{subject}_{seed}"),
            {**SHARED, **VARIANTS[variant], "max_train_steps": number, "checkpointing_steps": number},
        )
        for subject in dict.fromkeys(subjects)
        for seed in dict.fromkeys(seeds)
        for variant in dict.fromkeys(variants)
        for number in dict.fromkeys(steps)
    ]


def _run(parsed: argparse.Namespace) -> None:
    trainings = plan(parsed.variants, parsed.steps, parsed.subjects, parsed.seeds)
    results = [(training, _learned(training, parsed.output_dir)) for training in trainings]
    cells = summarise(results)
    found: dict[str, Json] = {
        "subjects": list(parsed.subjects),
        "seeds": list(parsed.seeds),
        "settings": {name: dict(VARIANTS[name]) for name in parsed.variants},
        "runs": [{**training.asked, "scores": dict(scores)} for training, scores in results],
        "variants": cells_json(cells),
    }
    write_study(parsed.output_dir, "strength", found, strength=draw_front(cells))


def _learned(training: Training, root: Path) -> Scores:
    """Train and measure, or read what came of it before."""
    import torch
    from diffusers import StableDiffusionPipeline
    from safetensors.torch import load_file

    from ether_diffusion.adapters.format import TENSORS_NAME
    from ether_diffusion.tiny_world import tiny_world_path
    from ether_diffusion.tiny_world.concepts import find_concept
    from ether_diffusion.training.methods import attach_saved
    from recipes.tiny_world.learned_subject import learn_subject
    from research.scene_loss import scene_scores

    folder, subject = root / training.folder, str(training.asked["subject"])

    def measure() -> Scores:
        settings = {**training.settings, "seed": training.asked["seed"]}
        adapter = learn_subject(find_concept(subject), folder, settings)
        pipeline = StableDiffusionPipeline.from_pretrained(tiny_world_path(), dtype=torch.float32)
        attach_saved(pipeline, adapter)
        parameters = sum(tensor.numel() for tensor in load_file(adapter / TENSORS_NAME).values())
        return {**scene_scores(pipeline, subject), "parameters": parameters}

    return kept_scores(folder, training.asked, measure)


def draw_front(cells: Cells) -> bytes:
    """Return a PNG: the loss on new scenes over the drift elsewhere, a curve of steps for each variant."""
    from ether_diffusion.metrics.report import new_figure, png_of

    figure = new_figure(7, 5)
    axes = figure.subplots()
    for variant, row in cells.items():
        xs, ys = ([found[name].mean for found in row.values()] for name in ("prediction_drift", "scene_loss"))
        axes.plot(xs, ys, marker="o", markersize=4, label=variant)
    axes.set(
        xlabel="change of what the base predicts of others", ylabel="loss on true pictures of new scenes"
    )
    axes.grid(alpha=0.3)
    axes.legend()
    return png_of(figure)


if __name__ == "__main__":
    sys.exit(main())
