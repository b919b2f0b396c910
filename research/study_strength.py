"""Which options of a method help? What is learned of a subject, and what is lost of the base.

`python -m research.study_strength --output_dir runs/strength` trains variants × steps × subjects × seeds
adapters of Tiny World, about a minute each on one CPU core; stopped, the same command goes on. It writes
strength.json and strength.png. None of the subjects is the benchmark's. In the place of the variants of a
learned strength --methods takes rows as `ether benchmark` does, with rates of their own, and with the
strength of the unconditional row, which trains nothing and is told by drawn pictures:

    --methods lora ether:num_reflections=4,learning_rate=0.01 ether:unconditional_strength=0.5 --num_images 1
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from research import BASE
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
SHARE = "unconditional_strength"
"""The option of a row that is of drawing."""
_PLACES: "Mapping[str, Json]" = {
    "pretrained_model_name_or_path": BASE, "instance_data_dir": "photos", "output_dir": "adapter"
}  # fmt: skip
SHARED: "Mapping[str, Json]" = {"train_batch_size": 4, "random_flip": True, "export_lora": False}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study. Return 0, or 2 for what the user can mend."""
    parser = study_parser(__doc__, SUBJECTS)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS, metavar="NAME")
    parser.add_argument("--methods", nargs="+", default=[], metavar="ROW", help="rows instead of variants")
    parser.add_argument("--num_images", type=int, default=0, help="drawn of each new scene, and scored (0)")
    parser.add_argument("--steps", nargs="+", type=int, default=[80], help="of the trainings (80)")
    return run_study("study_strength", parser, _run, arguments)


def settings_of(variant: str) -> "dict[str, Json]":
    """Return the options of a variant, or of a row of the benchmark with the rate of its method."""
    from ether_diffusion.benchmark.plan import TINY_LEARNING_RATES, method_of
    from ether_diffusion.training.config import DEFAULT_LEARNING_RATES

    if variant in VARIANTS:
        return dict(VARIANTS[variant])
    method, options = method_of(variant)
    rates: dict[Any, float] = {**DEFAULT_LEARNING_RATES, **TINY_LEARNING_RATES}
    return {"adapter": method, "learning_rate": rates[method], **options}


def plan(
    variants: Sequence[str],
    steps: Sequence[int],
    subjects: Sequence[str],
    seeds: Sequence[int],
    drawing: "Mapping[str, Json] | None" = None,
) -> list[Training]:
    """Return all trainings of a study; those of variants that only draw otherwise have the same settings."""
    return [
        Training(
            {"variant": variant, "steps": number, "subject": subject, "seed": seed, **(drawing or {})},
            ("variant", "steps"),
            _folder(variant, number, subject, seed),
            {**SHARED, **settings, "max_train_steps": number, "checkpointing_steps": number},
        )
        for subject in dict.fromkeys(subjects)
        for seed in dict.fromkeys(seeds)
        for variant in dict.fromkeys(variants)
        for settings in [{n: each for n, each in settings_of(variant).items() if n != SHARE}]
        for number in dict.fromkeys(steps)
    ]


def _folder(variant: Any, steps: Any, subject: Any, seed: Any, *, is_drawn: bool = True) -> Path:
    """Return where a training lies, and what was drawn with it."""
    method, _, options = variant.partition(":")
    parts = [part for part in options.split(",") if part and (is_drawn or not part.startswith(SHARE))]
    name = "_".join([method.replace(", ", "_").lower(), *parts])
    return Path(name, f"{steps} steps", f"{subject}_{seed}")


def _run(parsed: argparse.Namespace) -> None:
    from ether_diffusion.training.config import DreamBoothConfig

    variants, number = parsed.methods or parsed.variants, parsed.num_images
    drawing = {"num_images": number, "inference_steps": parsed.inference_steps} if number else {}
    if not number and any(SHARE in settings_of(variant) for variant in variants):
        raise ValueError(f"{SHARE} is told by drawn pictures alone; give --num_images 1 or more")
    trainings = plan(variants, parsed.steps, parsed.subjects, parsed.seeds, drawing)
    for training in trainings:  # what cannot be used is said before anything is trained
        DreamBoothConfig.from_flat({**training.settings, **_PLACES})
    results = [(training, _learned(training, parsed.output_dir)) for training in trainings]
    cells = summarise(results)
    found: dict[str, Json] = {
        "subjects": list(parsed.subjects),
        "seeds": list(parsed.seeds),
        "settings": {name: settings_of(name) for name in variants},
        "runs": [{**training.asked, "scores": dict(scores)} for training, scores in results],
        "variants": cells_json(cells),
    }
    write_study(parsed.output_dir, "strength", found, strength=draw_front(cells))


def _learned(training: Training, root: Path) -> Scores:
    """Train and measure, or read what came of it before."""
    from safetensors.torch import load_file

    from ether_diffusion.adapters.format import TENSORS_NAME
    from ether_diffusion.tiny_world.concepts import find_concept
    from ether_diffusion.training.methods import attach_saved
    from recipes.tiny_world.learned_subject import learn_subject
    from research.base import load_base
    from research.scene_loss import scene_scores

    folder, subject = root / training.folder, str(training.asked["subject"])
    share = settings_of(str(training.asked["variant"])).get(SHARE, 1.0)
    place = _folder(
        *(training.asked[name] for name in ("variant", "steps", "subject", "seed")), is_drawn=False
    )

    def measure() -> Scores:
        settings = {**training.settings, "seed": training.asked["seed"]}
        adapter = learn_subject(find_concept(subject), root / place, settings, base=BASE)
        pipeline = load_base()
        attach_saved(pipeline, adapter)
        parameters = sum(tensor.numel() for tensor in load_file(adapter / TENSORS_NAME).values())
        drawn = _drawn_scores(adapter, training, share) if "num_images" in training.asked else {}
        return {**scene_scores(pipeline, subject), **drawn, "parameters": parameters}

    return kept_scores(folder, training.asked, measure)


def _drawn_scores(adapter: Path, training: Training, share: Any) -> Scores:
    """Draw the subject in new scenes, and compare the pictures with the true ones."""
    import torch

    from ether_diffusion.adapters import read_adapter
    from ether_diffusion.bases import open_base
    from ether_diffusion.serving.engine import Engine, Request
    from ether_diffusion.tiny_world.concepts import find_concept
    from ether_diffusion.tiny_world.networks import load_outside_features
    from ether_diffusion.tiny_world.pictures import score_against_truth, to_tensor
    from ether_diffusion.tiny_world.subjects import unseen_prompts, unseen_scenes

    concept, base = find_concept(str(training.asked["subject"])), open_base(BASE)
    asked: Mapping[str, Any] = training.asked
    engine = Engine(base, device=torch.device("cpu"), num_slots=None, max_rows=8)
    engine.add_adapter("it", read_adapter(adapter))
    how: Any = {"steps": asked["inference_steps"], "guidance_scale": base.guidance_scale}
    pictures = engine.draw(
        Request(prompt=prompt, seed=seed, adapters={"it": 1.0}, unconditional_strength=float(share), **how)
        for prompt in unseen_prompts(concept)
        for seed in range(asked["num_images"])
    )
    scenes = [scene for scene in unseen_scenes(concept) for _ in range(asked["num_images"])]
    try:
        outside = load_outside_features()
    except ModuleNotFoundError:  # the extra evaluate
        outside = None
    return score_against_truth(to_tensor(list(pictures)), scenes, outside=outside)


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
