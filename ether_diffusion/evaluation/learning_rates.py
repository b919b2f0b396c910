"""How much a method's learning rate matters: subjects of Tiny World learned at many, fidelity and distance.

The claim of ETHER, Bini et al. 2024, arXiv:2405.20271, figures 4, 5 and 8: bounded transforms keep working
over magnitudes of learning rate.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

from ether_diffusion.adapter_file.strict_json import Json
from ether_diffusion.evaluation.encoder_loading import load_encoder
from ether_diffusion.evaluation.kept_scores import Scores, kept_scores
from ether_diffusion.evaluation.likeness import Estimate, estimate
from ether_diffusion.evaluation.samples import Sample, sort_samples
from ether_diffusion.evaluation.saved_adapters import attach_saved, weight_distance
from ether_diffusion.evaluation.scoring import PhotoReference, score_samples
from ether_diffusion.evaluation.tiny_subjects import learn_subject, to_images
from ether_diffusion.evaluation.transform_distance import transform_distance
from ether_diffusion.tiny_world import tiny_world_path
from ether_diffusion.tiny_world.clip import load_tiny_clip
from ether_diffusion.tiny_world.concepts import find_concept
from ether_diffusion.tiny_world.pictures import generate
from ether_diffusion.tiny_world.recognition import recognise, shipped_concepts
from ether_diffusion.tiny_world.subjects import IDENTIFIER, photos_of, unseen_prompts, unseen_scenes
from ether_diffusion.tiny_world.world import NATIVE_SIZE, draw
from ether_diffusion.training.loop import NonFiniteError

logger = logging.getLogger(__name__)

FIDELITY = "tiny_i"
TOLERANCE = 0.05


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
    """The rates around the best whose score is within the tolerance of it; ratio is highest / lowest."""

    lowest: float
    highest: float
    best: float
    ratio: float


def carry_out(run: StudyRun, root: Path, *, max_train_steps: int, num_inference_steps: int) -> Scores:
    """Train, draw and score one run, or read what it came to before.

    Scores are likeness to the photos and the prompts, the share recognised and the distance of the weights.
    Where training diverged there are none, and only the distance where no picture shows anything.

    Raises:
        ValueError: the settings cannot be used, or an earlier run had others.
        InterruptedError: a signal stopped the training; called again, it goes on.
    """
    folder = run.folder(root)
    asked: dict[str, Json] = {**asdict(run), "steps": max_train_steps, "inference_steps": num_inference_steps}
    settings: dict[str, Json] = {
        "adapter": run.method,
        "learning_rate": run.learning_rate,
        "seed": run.seed,
        "max_train_steps": max_train_steps,
    }

    def measure() -> Scores:
        try:
            adapter = learn_subject(find_concept(run.subject), folder, settings)
        except NonFiniteError as error:
            logger.info("%s: %s", folder, error)
            return {}
        return score_subject(run.subject, run.seed, adapter, num_inference_steps)

    return kept_scores(folder, asked, measure)


def score_subject(subject: str, seed: int, adapter: Path, num_inference_steps: int) -> dict[str, float]:
    """Draw a subject where no photo has it, from a seed, and score what is drawn."""
    concept = find_concept(subject)
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_world_path(), dtype=torch.float32)
    attach_saved(pipeline, adapter)
    distance = weight_distance(pipeline.unet)
    if not math.isfinite(distance):
        return {}
    turned = transform_distance(pipeline.unet)
    distances = {"weight_distance": distance} | ({} if turned is None else {"transform_distance": turned})
    prompts = unseen_prompts(concept)
    pictures, _ = generate(pipeline, prompts, num_steps=num_inference_steps, seed=seed)
    pictures = pictures.nan_to_num(-1)
    drawn = [
        Sample(str(number), image, prompt, number)
        for number, (image, prompt) in enumerate(zip(to_images(pictures), prompts, strict=True))
    ]
    try:
        usable = sort_samples(drawn).usable
    except ValueError:
        return distances
    photos = [Sample(photo.caption, draw(photo.scene, size=NATIVE_SIZE)) for photo in photos_of(concept)]
    encoder = load_encoder("tiny_world")
    reference = PhotoReference.of(photos, [encoder])
    columns = score_samples(reference, usable, [encoder], None, identifier=IDENTIFIER).columns
    clip = load_tiny_clip(tiny_world_path())
    named = recognise(clip.embed_images, pictures, unseen_scenes(concept), shipped_concepts())
    return {
        **{column: found.mean for column, found in columns.items()},
        "recognised": sum(each == concept for each in named) / len(named),
        **distances,
    }


def summarise(results: Mapping[StudyRun, Scores]) -> dict[str, dict[float, dict[str, Estimate]]]:
    """Return estimates by method, rate and score, with errors over subjects, or over seeds of one subject.

    A rate at which any run came to nothing has no estimate of what that run lacks.
    """
    by_rate: dict[str, dict[float, list[tuple[StudyRun, Scores]]]] = {}
    for run, scores in results.items():
        by_rate.setdefault(run.method, {}).setdefault(run.learning_rate, []).append((run, scores))
    one_subject = len({run.subject for run in results}) == 1
    summary: dict[str, dict[float, dict[str, Estimate]]] = {}
    for method, rates in by_rate.items():
        for rate, pairs in sorted(rates.items()):
            names = set.intersection(*(set(scores) for _, scores in pairs))
            groups = [run.seed if one_subject else run.subject for run, _ in pairs]
            summary.setdefault(method, {})[rate] = {
                name: estimate([scores[name] for _, scores in pairs], groups) for name in sorted(names)
            }
    return summary


def usable_range(scores: Mapping[float, float], *, tolerance: float = TOLERANCE) -> UsableRange | None:
    """Return the unbroken range of rates around the best that score at least best − tolerance · |best|.

    Rates without a score are left out of `scores` only if they were not tried; give −inf for those that
    came to nothing. None where no rate has a finite score.
    """
    rates = sorted(scores)
    finite = [rate for rate in rates if math.isfinite(scores[rate])]
    if not finite:
        return None
    best = max(finite, key=lambda rate: scores[rate])
    limit = scores[best] - tolerance * abs(scores[best])
    low = high = rates.index(best)
    while low > 0 and scores[rates[low - 1]] >= limit:
        low -= 1
    while high < len(rates) - 1 and scores[rates[high + 1]] >= limit:
        high += 1
    return UsableRange(rates[low], rates[high], best, rates[high] / rates[low])


def fidelity_range(rates: Mapping[float, Mapping[str, Estimate]]) -> UsableRange | None:
    """Return a method's usable range by likeness to the photos."""
    return usable_range(
        {rate: found[FIDELITY].mean if FIDELITY in found else -math.inf for rate, found in rates.items()}
    )


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
