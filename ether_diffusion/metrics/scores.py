"""From pictures to scores: those of use, their likeness to photos and prompts, LPIPS, drift, and errors."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from statistics import fmean

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ether_diffusion.bases import fault_of
from ether_diffusion.metrics.encoders import Encoder, Views
from ether_diffusion.metrics.lpips import NEEDS_TORCHMETRICS, Lpips, distances_among, distances_to
from ether_diffusion.tiny_world.concepts import load_concepts
from ether_diffusion.tiny_world.pictures import OBJECT, OUTSIDE, RECOGNISED
from ether_diffusion.tiny_world.world import Background, Scene
from ether_diffusion.wording import listed


@dataclass(frozen=True)
class Estimate:
    """A mean over `num_values`, and its standard error over `num_groups`; None where there is one group."""

    mean: float
    standard_error: float | None
    num_values: int
    num_groups: int

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + ("" if self.standard_error is None else f" ± {self.standard_error:.3f}")


def estimate(values: Sequence[float] | Tensor, groups: Sequence[Hashable]) -> Estimate:
    """Return the mean of values, and its standard error where values of one group are not independent.

    Groups are subjects where there are several, else seeds. With m the mean of N values and G groups,
    SE² = G / (G − 1) · Σ_g (Σ_{i in g} (x_i − m))² / N²: for groups of one size that of their means.
    """
    numbers = [float(value) for value in values]
    if not numbers:
        raise ValueError("found no values to average")
    mean = math.fsum(numbers) / len(numbers)
    residuals: defaultdict[Hashable, list[float]] = defaultdict(list)
    for number, group in zip(numbers, groups, strict=True):
        residuals[group].append(number - mean)
    num_groups, error = len(residuals), None
    if num_groups > 1:
        squares = math.fsum(math.fsum(each) ** 2 for each in residuals.values())
        error = math.sqrt(num_groups / (num_groups - 1) * squares) / len(numbers)
    return Estimate(mean, error, len(numbers), num_groups)


def pooled(
    counts: Sequence[Tensor], groups: Sequence[Hashable], statistic: Callable[[Tensor], float]
) -> Estimate:
    """Return a statistic of summed counts, with its standard error by leaving out one group at a time.

    With θ_g the statistic without group g of G: SE² = (G − 1) / G · Σ (θ_g − mean θ)², the jackknife (Efron
    and Stein 1981). For a mean over groups of one size it is that of `estimate`.
    """
    by_group: dict[Hashable, Tensor] = {}
    for each, group in zip(counts, groups, strict=True):
        by_group[group] = by_group[group] + each if group in by_group else each
    total, num_groups, error = torch.stack(list(by_group.values())).sum(0), len(by_group), None
    if num_groups > 1:
        without = [statistic(total - each) for each in by_group.values()]
        mean = math.fsum(without) / num_groups
        squares = math.fsum((each - mean) ** 2 for each in without)
        error = math.sqrt((num_groups - 1) / num_groups * squares)
    return Estimate(statistic(total), error, len(counts), num_groups)


def likeness_to(photos: Tensor, pictures: Tensor) -> Tensor:
    """Return for each picture (g, d) its mean cosine with all photos (r, d): (g).

    Their mean is that over all real × generated pairs: DINO and CLIP-I of the published tables.
    """
    return (pictures @ photos.T).mean(dim=1)


def likeness_among(photos: Tensor) -> Tensor:
    """Return for each photo (r, d) of two or more its mean cosine with the others: (r), "real images"."""
    if len(photos) < 2:
        raise ValueError(f"likeness among photos needs at least two; found {len(photos)}")
    cosines = photos @ photos.T
    return (cosines.sum(dim=1) - cosines.diagonal()) / (len(photos) - 1)


def likeness_of_pairs(first: Tensor, second: Tensor) -> Tensor:
    """Return the cosine of each row of one (g, d) with the same row of the other: (g).

    Of pictures with their prompts it is CLIP-T; of the base's with the adapter's, 1 minus it is drift.
    """
    return (first * second).sum(dim=1)


def relative_drift(drawn: Tensor, base: Tensor, prompts: Tensor) -> Tensor:
    """Return how far pictures (g, d) are from the base's of the same prompt and seed (g, d): (g).

    In units of the mean distance (1 − cosine) between the base's pictures of different prompts, whose numbers
    are `prompts` (g): 0 is the base's own picture, 1 as far from it as those of other prompts are.
    """
    between = (1 - base @ base.T)[prompts[:, None] != prompts[None, :]].mean()
    return (1 - likeness_of_pairs(drawn, base)).clamp(min=0) / between.clamp(min=1e-6)


def frechet_distance(photos: Tensor, pictures: Tensor) -> float | str:
    """Return |μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2 (Σ₁Σ₂)^½) of features (r, d) and (g, d), through torchmetrics.

    It is FID, where the features are Inception's. Where there is none, as a covariance would be singular,
    return why.
    """
    size = photos.shape[1]
    if min(len(photos), len(pictures)) <= size:
        found = f"found {len(photos)} photos and {len(pictures)} pictures"
        return f"{found}; with {size} features a Fréchet distance needs more than {size} of each"
    if find_spec("torchmetrics") is None:
        return NEEDS_TORCHMETRICS
    from torchmetrics.image.fid import FrechetInceptionDistance

    features = nn.Identity()  # where torchmetrics expects a network that makes them
    features.num_features = size  # type: ignore[assignment]
    metric = FrechetInceptionDistance(feature=features).set_dtype(torch.float64)
    metric.update(photos.double(), real=True)
    metric.update(pictures.double(), real=False)
    return float(metric.compute())


PROMPT = "tiny_t"
LPIPS_TO_PHOTOS, LPIPS_AMONG, PIXELS = "lpips_to_photos", "lpips_among", "pixels"
DIVERSITY, DRIFT = "diversity", "drift"
COLUMNS = {
    "dino": "DINO ↑",
    "clip_i": "CLIP-I ↑",
    OBJECT: "object ↑",
    "dinov2": "DINOv2 ↑",
    OUTSIDE: "object, outside ↑",
    "tiny_i": "tiny-I ↑",
    "clip_t": "CLIP-T ↑",
    PROMPT: "tiny-T ↑",
    LPIPS_TO_PHOTOS: "LPIPS ↑",
    RECOGNISED: "recognised ↑",
    DIVERSITY: "diversity ↑",
    LPIPS_AMONG: "LPIPS among ↑",
    DRIFT: "drift ↓",
}
"""What tables call scores: those of the paper's, in its order; tiny are of Tiny World's own encoder."""
OUTSIDE_JUDGES = ("dinov2", OUTSIDE)
"""Likenesses by networks that choose nothing."""
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
    faults = [(sample, find_fault(sample.image)) for sample in samples]
    aside = {sample.name: fault for sample, fault in faults if fault is not None}
    usable = tuple(sample for sample, fault in faults if fault is None)
    return SortedSamples(usable, {**(set_aside or {}), **aside})


def sort_samples(samples: Iterable[Sample], set_aside: Mapping[str, str] | None = None) -> SortedSamples:
    """Set aside what shows nothing, and what is not of the size of most: scores would mix two things.

    Where no size is that of more than half, or nothing is left, it is a ValueError.
    """
    found = without_faults(samples, set_aside)
    if not found.usable:
        reasons = listed(map(" ".join, found.set_aside.items()))
        raise ValueError(f"found no picture to score{f': {reasons}' if reasons else ''}")
    sized = [(sample, f"{sample.image.width}x{sample.image.height}") for sample in found.usable]
    ((most, count),) = Counter(size for _, size in sized).most_common(1)
    if count * 2 <= len(sized):
        sizes = listed(sorted({size for _, size in sized}))
        raise ValueError(f"found pictures of the sizes {sizes} px; score pictures of one size")
    others = {each.name: f"is {size} px, and most are {most}" for each, size in sized if size != most}
    usable = tuple(each for each, size in sized if size == most)
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
        return cls(images, {encoder.kind: encoder.view(images) for encoder in encoders})


@dataclass(frozen=True)
class Scores:
    """What pictures came to: estimates by column, means by prompt and column, and distances of whole sets.

    Columns are an encoder's kind for its likeness to the photos ("dino", "dinov2", "clip_i", "tiny_i"), with
    "_t" for likeness to the prompts, LPIPS in both readings, and diversity: the mean distance (1 − cosine)
    between pictures of one prompt, by the first encoder. `sets` has Fréchet distances ("fid_dino");
    `left_out` says why a column is not there.
    """

    columns: Mapping[str, Estimate]
    by_prompt: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    sets: Mapping[str, float] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)

    def with_distances(self, distances: Mapping[str, float | str]) -> "Scores":
        """Add the distances of sets by an encoder's kind, or why there is none."""
        found = {f"fid_{kind}": each for kind, each in distances.items()}
        sets = {name: each for name, each in found.items() if not isinstance(each, str)}
        reasons = {name: each for name, each in found.items() if isinstance(each, str)}
        return Scores(self.columns, self.by_prompt, sets, {**self.left_out, **reasons})


def score_photos(reference: PhotoReference, encoders: Sequence[Encoder], lpips: Lpips | None) -> Scores:
    """Score the photos against each other: what a perfect adapter could reach, the row "real images"."""
    values: dict[str, Sequence[float]] = {
        _image_column(each): likeness_among(reference.views[each.kind].subjects).tolist() for each in encoders
    }
    if lpips is not None:
        values[LPIPS_TO_PHOTOS] = distances_among(lpips, reference.images)
    return Scores(_estimates(values, range(len(reference.images))))


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
    prompts = [without_identifier(each.prompt, identifier) for each in samples if each.prompt is not None]
    values: dict[str, Sequence[float]] = {}
    left_out, distances = dict[str, str](), dict[str, float | str]()
    among: dict[str, Callable[[list[int]], float]] = {}
    for encoder in encoders:
        photos, seen = reference.views[encoder.kind], encoder.view(images)
        values[_image_column(encoder)] = likeness_to(photos.subjects, seen.subjects).tolist()
        if encoder.reads_texts and len(prompts) < len(samples):
            left_out[f"{encoder.kind}_t"] = "the prompts of the pictures are not known"
        elif encoder.reads_texts:
            texts = encoder.embed_texts(prompts)
            values[f"{encoder.kind}_t"] = likeness_of_pairs(seen.whole, texts).tolist()
        distances[encoder.kind] = frechet_distance(photos.whole, seen.whole)
        among.setdefault(DIVERSITY, partial(_diversity, seen.subjects))
    if lpips is not None:
        values[LPIPS_TO_PHOTOS] = distances_to(lpips, reference.images, images)
        among[LPIPS_AMONG] = lambda own: fmean(distances_among(lpips, [images[k] for k in own]))
    columns, by_prompt = _estimates(values, _groups(samples)), dict[str, dict[str, float]]()
    places: defaultdict[str, list[int]] = defaultdict(list)
    for place, sample in enumerate(samples):
        if sample.prompt is not None:
            places[sample.prompt].append(place)
    for prompt, own in places.items():
        by_prompt[prompt] = {name: fmean(row[k] for k in own) for name, row in values.items()}
        if len(own) > 1:
            by_prompt[prompt] |= {name: measure(own) for name, measure in among.items()}
    for name in among:
        found = {prompt: row[name] for prompt, row in by_prompt.items() if name in row}
        if found:
            columns[name] = estimate(list(found.values()), list(found))
        else:
            left_out[name] = "no prompt has two pictures"
    return Scores(columns, by_prompt, {}, left_out).with_distances(distances)


def _diversity(vectors: Tensor, own: list[int]) -> float:
    return float(1 - likeness_among(vectors[own]).mean())


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


def without_identifier(prompt: str, identifier: str | None) -> str:
    """Leave a word out of a prompt: "a sks dog" becomes "a dog"."""
    words = prompt.split() if identifier is not None else [prompt]
    return " ".join(word for word in words if word.strip(".,;:!?") != identifier)


def other_tiny_prompts() -> tuple[str, ...]:
    """Return captions of concepts that Tiny World was trained on, spread over its kinds."""
    concepts = load_concepts("trained")
    stride = len(concepts) // len(_BACKGROUNDS)
    scenes = zip(concepts[::stride], _BACKGROUNDS, strict=False)
    return tuple(Scene(concept, Background("plain", colour)).caption() for concept, colour in scenes)
