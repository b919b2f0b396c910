"""The pictures that are scored: drawn or read from a folder, and those of no use set aside by name."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ether_diffusion.bases import fault_of
from ether_diffusion.pipelines.metadata import read_image_metadata
from ether_diffusion.strict_json import parse_json
from ether_diffusion.training import decode_photo, find_photos
from ether_diffusion.training.caption_files import FILE_COLUMN, TEXT_COLUMNS, decode_text
from ether_diffusion.training.plain_files import UnusableFileError
from ether_diffusion.wording import listed, printable

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
class SetAside:
    """A picture that is not scored, and why, as what follows its name."""

    name: str
    reason: str


@dataclass(frozen=True)
class SortedSamples:
    """Pictures to be scored, in the order of their names as given, and those that are not."""

    usable: tuple[Sample, ...]
    set_aside: tuple[SetAside, ...]


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
    if (pixels == pixels[:1, :1]).all():
        return "is empty: one colour throughout"
    return None


def sort_samples(samples: Iterable[Sample]) -> SortedSamples:
    """Set aside what shows nothing, and what is not of the size of most: scores would mix two things.

    Raises:
        ValueError: no size is that of more than half, or nothing is left.
    """
    usable: list[Sample] = []
    set_aside: list[SetAside] = []
    for sample in samples:
        fault = find_fault(sample.image)
        if fault is None:
            usable.append(sample)
        else:
            set_aside.append(SetAside(sample.name, fault))
    if not usable:
        reasons = "; ".join(f"{printable(each.name)} {each.reason}" for each in set_aside[:5])
        raise ValueError(f"found no picture to score{f': {reasons}' if reasons else ''}")
    (size, count), *_ = Counter(sample.image.size for sample in usable).most_common(1)
    if count * 2 <= len(usable):
        sizes = sorted({f"{sample.image.width}x{sample.image.height}" for sample in usable})
        raise ValueError(f"found pictures of the sizes {listed(sizes)} px; score pictures of one size")
    set_aside += [
        SetAside(each.name, f"is {each.image.width}x{each.image.height} px, and most are {size[0]}x{size[1]}")
        for each in usable
        if each.image.size != size
    ]
    return SortedSamples(tuple(each for each in usable if each.image.size == size), tuple(set_aside))


def read_photos(folder: Path) -> SortedSamples:
    """Read the real photos of a subject, of any sizes: encoders scale each by itself.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: there are fewer than two that show something.
    """
    found = find_photos(folder, min_side=MIN_SIDE_PX, without=())
    samples = [
        Sample(photo.name, decode_photo(photo.path, min_side=MIN_SIDE_PX)[0]) for photo in found.photos
    ]
    faults = {sample.name: find_fault(sample.image) for sample in samples}
    usable = tuple(sample for sample in samples if faults[sample.name] is None)
    set_aside = [SetAside(each.name, each.reason) for each in found.refused]
    set_aside += [SetAside(name, fault) for name, fault in faults.items() if fault is not None]
    if len(usable) < 2:
        reasons = "".join(f"; {printable(each.name)} {each.reason}" for each in set_aside[:5])
        raise ValueError(
            f"found {len(usable) or 'no'} photo{'s' if not usable else ''} to compare with in "
            f"{printable(folder)}; give at least two{reasons}"
        )
    return SortedSamples(usable, tuple(set_aside))


def read_generated(folder: Path, captions: Mapping[str, str] | None = None) -> SortedSamples:
    """Read pictures that were generated before.

    Their prompts are `captions` by file name, or else what each PNG of ours says of itself; seeds are always
    from there.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: fewer than two pictures can be scored, or captions and pictures do not fit.
    """
    found = find_photos(folder, min_side=MIN_SIDE_PX)
    names = [photo.path.name for photo in found.photos]
    if captions is not None:
        _check_captions(captions, names, [refusal.path.name for refusal in found.refused])
    samples = []
    for photo in found.photos:
        image, _ = decode_photo(photo.path, min_side=MIN_SIDE_PX)
        said = read_image_metadata(photo.path) if photo.path.suffix.lower() == ".png" else None
        prompt = captions[photo.path.name] if captions is not None else said.prompt if said else None
        samples.append(Sample(photo.path.name, image, prompt, said.seed if said else None))
    result = sort_samples(samples)
    if len(result.usable) < 2:
        raise ValueError(f"found one picture to score in {printable(folder)}; give at least two")
    refused = tuple(SetAside(each.path.name, each.reason) for each in found.refused)
    return SortedSamples(result.usable, refused + result.set_aside)


def read_caption_file(path: Path) -> dict[str, str]:
    """Read prompts by file name from JSON Lines: {"file_name": "0.png", "text": "a photo of a dog"}.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is something else, or two name one file.
    """
    shown = printable(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file of captions {shown}")
    try:
        text = decode_text(path.read_bytes())
    except UnusableFileError as reason:
        raise ValueError(f"{shown} {reason}") from None
    captions: dict[str, str] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"line {number} of {shown}"
        row = parse_json(line.encode(), where)
        name = row.get(FILE_COLUMN) if isinstance(row, dict) else None
        values = [row[key] for key in TEXT_COLUMNS if key in row] if isinstance(row, dict) else []
        if not isinstance(name, str) or len(values) != 1 or not isinstance(values[0], str):
            raise ValueError(f'{where} is no caption; write {{"{FILE_COLUMN}": …, "text": …}} a line')
        if name in captions:
            raise ValueError(f"{where} names {printable(name)} a second time; leave one line")
        captions[name] = values[0]
    return captions


def _check_captions(captions: Mapping[str, str], names: Sequence[str], refused: Sequence[str]) -> None:
    without = [name for name in names if name not in captions]
    if without:
        raise ValueError(f"there is no caption for {listed(without)}; give every picture one")
    unknown = sorted(captions.keys() - {*names, *refused})
    if unknown:
        raise ValueError(
            f"there are captions for {listed(unknown)}, and no such pictures; delete those lines"
        )
