"""How well an adapter has learned a subject of Tiny World: the scores of the studies that train many."""

import logging
import math
from functools import cache
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from ether_diffusion.metrics.encoders import Encoder, load_encoder
from ether_diffusion.metrics.scores import (
    PhotoReference,
    Sample,
    other_tiny_prompts,
    relative_drift,
    score_samples,
    sort_samples,
)
from ether_diffusion.strict_json import Json
from ether_diffusion.tiny_world import ALIAS
from ether_diffusion.tiny_world.concepts import Concept, find_concept
from ether_diffusion.tiny_world.pictures import OBJECT, generate, score_against_truth, to_images
from ether_diffusion.tiny_world.subjects import (
    IDENTIFIER,
    NUM_PHOTOS,
    photos_of,
    unseen_prompts,
    unseen_scenes,
)
from ether_diffusion.tiny_world.world import draw
from ether_diffusion.training.loop import NonFiniteError
from ether_diffusion.training.methods import attach_saved
from recipes.tiny_world.learned_subject import learn_subject
from research import BASE
from research.base import load_base
from research.distances import transform_distance, weight_distance
from research.study import SHARED, Scores, Training, kept_scores

FIDELITY = OBJECT

logger = logging.getLogger(__name__)


def learn_and_score(training: Training, root: Path, num_inference_steps: int) -> Scores:
    """Train on a subject, draw and score it, or read what this came to before; nothing where it diverged.

    Raises:
        ValueError: the settings cannot be used, or an earlier run had others.
        StoppedError: a signal stopped the training; called again, it goes on.
    """
    folder, subject, seed = root / training.folder, str(training.asked["subject"]), training.asked["seed"]
    assert isinstance(seed, int)
    num_photos = NUM_PHOTOS if training.num_photos is None else training.num_photos

    def measure() -> Scores:
        try:
            settings = {**SHARED, **training.settings, "seed": seed}
            concept = find_concept(subject)
            adapter = learn_subject(concept, folder, settings, base=BASE, num_photos=num_photos)
        except NonFiniteError as error:
            logger.info("%s: %s", folder, error)
            return {}
        return score_subject(subject, seed, adapter, num_inference_steps)

    return kept_scores(folder, {**training.asked, "inference_steps": num_inference_steps}, measure)


def kept_base_scores(subject: str, seed: int, root: Path, num_inference_steps: int) -> Scores:
    """Score what the base draws without an adapter, or read what it came to before.

    Raises:
        ValueError: an earlier run had other settings.
    """
    asked: dict[str, Json] = {"subject": subject, "seed": seed, "inference_steps": num_inference_steps}
    folder = root / "base" / f"{subject.replace(' ', '_')}_{seed}"
    return kept_scores(folder, asked, lambda: score_base(subject, seed, num_inference_steps))


def score_base(subject: str, seed: int, num_inference_steps: int) -> dict[str, float]:
    """Score what the base draws from a subject's prompts, without any adapter."""
    return _score_pictures(find_concept(subject), load_base(), seed, num_inference_steps)


def score_subject(subject: str, seed: int, adapter: Path, num_inference_steps: int) -> dict[str, float]:
    """Draw a subject where no photo has it, from a seed, and score what is drawn.

    Returns likeness to the true pictures (`FIDELITY`), to the photos and to the prompts (`PROMPT`), the share
    recognised, drift on prompts without the subject, and the distances of the weights and of the transform.
    Only the distances where no picture shows anything, and nothing where weights are not finite.
    """
    pipeline = load_base()
    attach_saved(pipeline, adapter)
    distance = weight_distance(pipeline.unet)
    if not math.isfinite(distance):
        return {}
    turned = transform_distance(pipeline.unet)
    distances = {"weight_distance": distance} | ({} if turned is None else {"transform_distance": turned})
    scores = _score_pictures(find_concept(subject), pipeline, seed, num_inference_steps)
    if not scores:
        return distances
    drawn = _view(pipeline, seed, num_inference_steps)
    base = _view_of_base(seed, num_inference_steps)
    drift = relative_drift(drawn, base, torch.arange(len(drawn)))
    return {**scores, "drift": float(drift.mean()), **distances}


def _score_pictures(
    concept: Concept, pipeline: StableDiffusionPipeline, seed: int, num_inference_steps: int
) -> dict[str, float]:
    """Return what pictures of a subject score; nothing where none shows anything."""
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
        return {}
    photos = [
        Sample(photo.caption, draw(photo.scene, size=pictures.shape[-1])) for photo in photos_of(concept)
    ]
    reference = PhotoReference.of(photos, [_encoder()])
    columns = score_samples(reference, usable, [_encoder()], None, identifier=IDENTIFIER).columns
    scenes = unseen_scenes(concept)
    truth = score_against_truth(pictures, scenes, [int(sample.name) for sample in usable])
    return {**{column: found.mean for column, found in columns.items()}, **truth}


def _view(pipeline: StableDiffusionPipeline, seed: int, num_inference_steps: int) -> Tensor:
    """Return the vectors of pictures of other things than the subject."""
    prompts = other_tiny_prompts()
    pictures, _ = generate(pipeline, prompts, num_steps=num_inference_steps, seed=seed)
    return _encoder().embed_images(to_images(pictures.nan_to_num(-1)))


@cache
def _view_of_base(seed: int, num_inference_steps: int) -> Tensor:
    return _view(load_base(), seed, num_inference_steps)


@cache
def _encoder() -> Encoder:
    return load_encoder(ALIAS)
