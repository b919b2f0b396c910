"""From pictures to scores: those of use, their likeness to photos and prompts, LPIPS, and drift."""

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from ether_diffusion.bases import fault_of
from ether_diffusion.metrics.encoders import Encoder, Views
from ether_diffusion.metrics.likeness import (
    Estimate,
    estimate,
    frechet_distance,
    frechet_obstacle,
    likeness_among,
    likeness_of_pairs,
    likeness_to,
)
from ether_diffusion.metrics.lpips import Lpips, distances_among, distances_to
from ether_diffusion.tiny_world.backgrounds import Background
from ether_diffusion.tiny_world.concepts import load_concepts
from ether_diffusion.tiny_world.recognition import OBJECT, RECOGNISED
from ether_diffusion.tiny_world.world import Scene
from ether_diffusion.wording import listed, printable

PROMPT = "tiny_t"
COLUMNS = {
    "dino": "DINO ↑",
    "clip_i": "CLIP-I ↑",
    OBJECT: "object ↑",
    "tiny_i": "tiny-I ↑",
    "clip_t": "CLIP-T ↑",
    PROMPT: "tiny-T ↑",
    "lpips_to_photos": "LPIPS ↑",
    RECOGNISED: "recognised ↑",
}
"""What tables call scores: those of the paper's, in its order; tiny are of Tiny World's own encoder."""
OTHER_PROMPTS = (
    "a photo of a dog on a beach",
    "a cat asleep on a sofa",
    "a portrait of an old woman, natural light",
    "a bowl of fruit on a wooden table",
    "a red car parked in a narrow street",
    "a mountain lake at sunrise",
    "a city skyline at night",
    "a watercolor painting of a sailing boat",
    "a child's backpack on a chair",
    "an oil painting of a forest in autumn",
)
"""Prompts without the subject, for bases of photographs; an adapter should leave them as the base draws."""
_BACKGROUNDS = ("red", "blue", "white", "green", "yellow", "gray", "teal", "pink")

LPIPS_TO_PHOTOS = "lpips_to_photos"
LPIPS_AMONG = "lpips_among"
PIXELS = "pixels"

MIN_SIDE_PX = 8
BLACK_BELOW = 3
"""A picture whose brightest value of 255 is below is what a safety filter or an overflow leaves."""


@dataclass(frozen=True)
class Sample:
    """A picture with its name, and what it was drawn from where that is known."""

    name: str
    image: Image.Image
    prompt: str | None = None
    seed: int | None = None


@dataclass(frozen=True)
class SortedSamples:
    """Pictures to be scored, in the order given; of those `set_aside`, by name, what is wrong with each."""

    usable: tuple[Sample, ...]
    set_aside: Mapping[str, str]


def find_fault(image: Image.Image) -> str | None:
    """Say why a picture shows nothing, or None: it has no pixels, is not finite, black or of one colour."""
    fault = fault_of(image)
    if fault is not None:
        return str(fault)
    if 0 in image.size:
        return "has no pixels"
    pixels = np.asarray(image if image.mode in ("F", "I", "L") else image.convert("RGB"))
    if not np.isfinite(pixels).all():
        return "has values that are not finite"
    if pixels.max() < BLACK_BELOW:
        return "is black"
    return "is empty: one colour throughout" if (pixels == pixels[:1, :1]).all() else None


def without_faults(samples: Iterable[Sample], set_aside: Mapping[str, str] | None = None) -> SortedSamples:
    """Set aside what shows nothing, after what is set aside already."""
    samples = list(samples)
    faults = {sample.name: fault for sample in samples if (fault := find_fault(sample.image)) is not None}
    usable = tuple(sample for sample in samples if sample.name not in faults)
    return SortedSamples(usable, {**(set_aside or {}), **faults})


def sort_samples(samples: Iterable[Sample], set_aside: Mapping[str, str] | None = None) -> SortedSamples:
    """Set aside what shows nothing, and what is not of the size of most: scores would mix two things.

    Raises:
        ValueError: no size is that of more than half, or nothing is left.
    """
    found = without_faults(samples, set_aside)
    if not found.usable:
        reasons = "; ".join(f"{printable(name)} {why}" for name, why in list(found.set_aside.items())[:5])
        raise ValueError(f"found no picture to score{f': {reasons}' if reasons else ''}")
    (size, count), *_ = Counter(sample.image.size for sample in found.usable).most_common(1)
    if count * 2 <= len(found.usable):
        sizes = sorted({f"{sample.image.width}x{sample.image.height}" for sample in found.usable})
        raise ValueError(f"found pictures of the sizes {listed(sizes)} px; score pictures of one size")
    others = {
        each.name: f"is {each.image.width}x{each.image.height} px, and most are {size[0]}x{size[1]}"
        for each in found.usable
        if each.image.size != size
    }
    usable = tuple(each for each in found.usable if each.image.size == size)
    return SortedSamples(usable, {**found.set_aside, **others})


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


def score_photos(reference: PhotoReference, encoders: Sequence[Encoder], lpips: Lpips | None) -> Scores:
    """Score the photos against each other: what a perfect adapter could reach, the row "real images"."""
    values: dict[str, Sequence[float]] = {
        _image_column(encoder): likeness_among(reference.views[encoder.kind].subjects).tolist()
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
    values: dict[str, Sequence[float]] = {}
    sets: dict[str, float] = {}
    left_out: dict[str, str] = {}
    for encoder in encoders:
        photos, seen = reference.views[encoder.kind], Views.of(encoder, images)
        values[_image_column(encoder)] = likeness_to(photos.subjects, seen.subjects).tolist()
        if encoder.reads_texts and any(sample.prompt is None for sample in samples):
            left_out[f"{encoder.kind}_t"] = "the prompts of the pictures are not known"
        elif encoder.reads_texts:
            prompts = [without_identifier(sample.prompt or "", identifier) for sample in samples]
            texts = encoder.embed_texts(prompts)
            values[f"{encoder.kind}_t"] = likeness_of_pairs(seen.whole, texts).tolist()
        obstacle = frechet_obstacle(len(photos.whole), len(seen.whole), encoder.size)
        if obstacle is None:
            sets[f"fid_{encoder.kind}"] = frechet_distance(photos.whole, seen.whole)
        else:
            left_out[f"fid_{encoder.kind}"] = obstacle
    if lpips is not None:
        values[LPIPS_TO_PHOTOS] = distances_to(lpips, reference.images, images)
    columns, by_prompt = _estimates(values, _groups(samples)), dict[str, dict[str, float]]()
    diversity: dict[str, float] = {}
    for prompt, places in _places_by_prompt(samples).items():
        by_prompt[prompt] = {name: sum(row[k] for k in places) / len(places) for name, row in values.items()}
        if lpips is not None and len(places) > 1:
            among = distances_among(lpips, [images[k] for k in places])
            by_prompt[prompt][LPIPS_AMONG] = diversity[prompt] = sum(among) / len(among)
    if diversity:
        columns[LPIPS_AMONG] = estimate(list(diversity.values()), list(diversity))
    elif lpips is not None:
        left_out[LPIPS_AMONG] = "no prompt has two pictures"
    return Scores(columns, by_prompt, sets, left_out)


def score_drift(
    base: Sequence[Sample], adapter: Sequence[Sample], encoders: Sequence[Encoder]
) -> Mapping[str, Estimate]:
    """Return how far the adapter's pictures are from the base's on the same prompts and seeds, in one order.

    By encoder 1 − cosine, from 0 to 2; "pixels" is the mean absolute difference of values in [0, 1].
    """
    values: dict[str, Sequence[float]] = {}
    for encoder in encoders:
        first, second = (encoder.embed_images([each.image for each in side]) for side in (base, adapter))
        values[encoder.kind] = (1 - likeness_of_pairs(first, second)).clamp(min=0).tolist()
    values[PIXELS] = [pixel_distance(a.image, b.image) for a, b in zip(base, adapter, strict=True)]
    return _estimates(values, _groups(base))


def pixel_distance(first: Image.Image, second: Image.Image) -> float:
    """Return the mean absolute difference of two pictures' RGB values in [0, 1]."""
    a, b = (np.asarray(each.convert("RGB"), dtype=np.float64) for each in (first, second))
    return float(np.abs(a - b).mean() / 255)


def _image_column(encoder: Encoder) -> str:
    return f"{encoder.kind}_i" if encoder.reads_texts else encoder.kind


def _estimates(values: Mapping[str, Sequence[float]], groups: Sequence[Hashable]) -> dict[str, Estimate]:
    return {column: estimate(row, groups) for column, row in values.items()}


def _groups(samples: Sequence[Sample]) -> list[Hashable]:
    return [sample.name if sample.seed is None else sample.seed for sample in samples]


def _places_by_prompt(samples: Sequence[Sample]) -> dict[str, list[int]]:
    places: defaultdict[str, list[int]] = defaultdict(list)
    for place, sample in enumerate(samples):
        if sample.prompt is not None:
            places[sample.prompt].append(place)
    return places


def without_identifier(prompt: str, identifier: str | None) -> str:
    """Leave a word out of a prompt: "a sks dog" becomes "a dog"."""
    if identifier is None:
        return prompt
    return " ".join(word for word in prompt.split() if word.strip(".,;:!?") != identifier)


def other_tiny_prompts() -> tuple[str, ...]:
    """Return captions of concepts that Tiny World was trained on, spread over its kinds."""
    concepts = load_concepts("trained")
    stride = len(concepts) // len(_BACKGROUNDS)
    return tuple(
        Scene(concepts[number * stride], Background("plain", colour)).caption()
        for number, colour in enumerate(_BACKGROUNDS)
    )
