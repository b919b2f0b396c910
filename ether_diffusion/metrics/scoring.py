"""From pictures to scores: fidelity to the photos and to the prompts, LPIPS, and drift from the base."""

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from ether_diffusion.metrics.encoders import Encoder, Views
from ether_diffusion.metrics.frechet import find_obstacle, frechet_distance
from ether_diffusion.metrics.likeness import (
    Estimate,
    estimate,
    likeness_among,
    likeness_of_pairs,
    likeness_to,
)
from ether_diffusion.metrics.perceptual import Lpips, distances_among, distances_to
from ether_diffusion.metrics.samples import Sample

LPIPS_TO_PHOTOS = "lpips_to_photos"
LPIPS_AMONG = "lpips_among"
PIXELS = "pixels"

Values = Mapping[str, Sequence[float]]
"""By column, a value per picture."""


@dataclass(frozen=True)
class PhotoReference:
    """The photos of a subject, as each encoder's kind views them: embedded once for all rows."""

    images: tuple[Image.Image, ...]
    views: Mapping[str, Views]

    @classmethod
    def of(cls, photos: Sequence[Sample], encoders: Sequence[Encoder]) -> "PhotoReference":
        """Embed photos."""
        images = tuple(photo.image for photo in photos)
        return cls(images, {encoder.kind: Views.of(encoder, images) for encoder in encoders})


@dataclass(frozen=True)
class Scores:
    """What pictures came to: estimates by column, means by prompt and column, and distances of whole sets.

    Columns are an encoder's kind for its likeness to the photos ("dino", "dinov2", "clip_i", "tiny_i"), with
    "_t" for likeness to the prompts, and LPIPS in both readings. `sets` has Fréchet distances ("fid_dino");
    `left_out` says why a column is not there.
    """

    columns: Mapping[str, Estimate]
    by_prompt: Mapping[str, Mapping[str, float]]
    sets: Mapping[str, float] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)


def image_column(encoder: Encoder) -> str:
    """Return the column of likeness to the photos."""
    return f"{encoder.kind}_i" if encoder.reads_texts else encoder.kind


def text_column(encoder: Encoder) -> str:
    """Return the column of likeness to the prompts."""
    return f"{encoder.kind}_t"


def score_photos(reference: PhotoReference, encoders: Sequence[Encoder], lpips: Lpips | None) -> Scores:
    """Score the photos against each other: what a perfect adapter could reach, the row "real images"."""
    values: dict[str, Sequence[float]] = {
        image_column(encoder): likeness_among(reference.views[encoder.kind].subjects).tolist()
        for encoder in encoders
    }
    if lpips is not None:
        values[LPIPS_TO_PHOTOS] = distances_among(lpips, reference.images)
    return Scores(_estimates(values, range(len(reference.images))), {})


def score_samples(
    reference: PhotoReference,
    samples: Sequence[Sample],
    encoders: Sequence[Encoder],
    lpips: Lpips | None,
    *,
    identifier: str | None = None,
) -> Scores:
    """Score pictures of one size against the photos and their own prompts.

    Prompts are compared without `identifier`, a word that no encoder knows. Errors are over seeds, or over
    pictures where seeds are not known.
    """
    images = [sample.image for sample in samples]
    groups = [_group(sample) for sample in samples]
    values: dict[str, Sequence[float]] = {}
    sets: dict[str, float] = {}
    left_out: dict[str, str] = {}
    for encoder in encoders:
        photos, seen = reference.views[encoder.kind], Views.of(encoder, images)
        values[image_column(encoder)] = likeness_to(photos.subjects, seen.subjects).tolist()
        if encoder.reads_texts and any(sample.prompt is None for sample in samples):
            left_out[text_column(encoder)] = "the prompts of the pictures are not known"
        elif encoder.reads_texts:
            texts = encoder.embed_texts(
                [without_identifier(sample.prompt or "", identifier) for sample in samples]
            )
            values[text_column(encoder)] = likeness_of_pairs(seen.whole, texts).tolist()
        obstacle = find_obstacle(len(photos.whole), len(seen.whole), encoder.size)
        if obstacle is None:
            sets[f"fid_{encoder.kind}"] = frechet_distance(photos.whole, seen.whole)
        else:
            left_out[f"fid_{encoder.kind}"] = obstacle
    if lpips is not None:
        values[LPIPS_TO_PHOTOS] = distances_to(lpips, reference.images, images)
    columns = dict(_estimates(values, groups))
    by_prompt = _by_prompt(values, samples)
    if lpips is not None:
        among = _among_prompts(lpips, samples)
        if not among:
            left_out[LPIPS_AMONG] = "no prompt has two pictures"
        else:
            columns[LPIPS_AMONG] = estimate(list(among.values()), list(among))
            by_prompt = {
                prompt: {**row, **({LPIPS_AMONG: among[prompt]} if prompt in among else {})}
                for prompt, row in by_prompt.items()
            }
    return Scores(columns, by_prompt, sets, left_out)


def score_drift(
    base: Sequence[Sample], adapter: Sequence[Sample], encoders: Sequence[Encoder]
) -> Mapping[str, Estimate]:
    """Return how far the adapter's pictures are from the base's on the same prompts and seeds.

    By encoder 1 − cosine, from 0 to 2; "pixels" is the mean absolute difference of values in [0, 1].

    Raises:
        ValueError: they are not of the same prompts and seeds, in the same order.
    """
    if [(each.prompt, each.seed) for each in base] != [(each.prompt, each.seed) for each in adapter]:
        raise ValueError("drift compares pictures of the same prompts and seeds; found others")
    values: dict[str, Sequence[float]] = {}
    for encoder in encoders:
        first, second = (encoder.embed_images([each.image for each in side]) for side in (base, adapter))
        values[encoder.kind] = (1 - likeness_of_pairs(first, second)).clamp(min=0).tolist()
    values[PIXELS] = [pixel_distance(a.image, b.image) for a, b in zip(base, adapter, strict=True)]
    return _estimates(values, [_group(sample) for sample in base])


def pixel_distance(first: Image.Image, second: Image.Image) -> float:
    """Return the mean absolute difference of two pictures' RGB values in [0, 1]."""
    a, b = (np.asarray(each.convert("RGB"), dtype=np.float64) for each in (first, second))
    return float(np.abs(a - b).mean() / 255)


def _estimates(values: Values, groups: Sequence[Hashable]) -> Mapping[str, Estimate]:
    return {column: estimate(row, groups) for column, row in values.items()}


def _group(sample: Sample) -> Hashable:
    return sample.name if sample.seed is None else sample.seed


def _by_prompt(values: Values, samples: Sequence[Sample]) -> Mapping[str, Mapping[str, float]]:
    numbers: defaultdict[str, list[int]] = defaultdict(list)
    for number, sample in enumerate(samples):
        if sample.prompt is not None:
            numbers[sample.prompt].append(number)
    return {
        prompt: {column: sum(row[k] for k in chosen) / len(chosen) for column, row in values.items()}
        for prompt, chosen in numbers.items()
    }


def _among_prompts(lpips: Lpips, samples: Sequence[Sample]) -> dict[str, float]:
    """Return diversity by prompt, where there are two pictures or more."""
    images: defaultdict[str, list[Image.Image]] = defaultdict(list)
    for sample in samples:
        if sample.prompt is not None:
            images[sample.prompt].append(sample.image)
    rows = {prompt: distances_among(lpips, each) for prompt, each in images.items() if len(each) > 1}
    return {prompt: sum(row) / len(row) for prompt, row in rows.items()}


def without_identifier(prompt: str, identifier: str | None) -> str:
    """Leave a word out of a prompt: "a sks dog" becomes "a dog"."""
    if identifier is None:
        return prompt
    return " ".join(word for word in prompt.split() if word.strip(".,;:!?") != identifier)
