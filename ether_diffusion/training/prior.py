"""Class images for prior preservation: those that are missing are drawn by the base itself."""

import hashlib
import io
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image

from ether_diffusion.durable_files import write_files
from ether_diffusion.training.photos import Photo, find_photos
from ether_diffusion.training.plain_files import NAME_LIMIT, find_files
from ether_diffusion.training.randomness import stream
from ether_diffusion.wording import printable

_GENERATED = re.compile(r"(\d{5,})-[0-9a-f]{40}\.png")


class Drawn(Protocol):
    """What is used of a diffusers pipeline's output."""

    images: list[Image.Image]


class Pipeline(Protocol):
    """What is used of a diffusers text-to-image pipeline."""

    def __call__(self, prompt: list[str], *, generator: list[torch.Generator]) -> Drawn: ...


def count_missing(
    folder: Path, num_class_images: int, *, follow_symlinks: bool = False, without: Collection[Path] = ()
) -> int:
    """Return how many class images a folder lacks; only photos that can be used are counted.

    Raises:
        ValueError: it is not a folder, or may not be read.
    """
    return max(num_class_images - len(_usable(folder, follow_symlinks, without)), 0)


def generate_class_images(
    pipeline: Pipeline,
    folder: Path,
    *,
    class_prompt: str,
    num_class_images: int,
    sample_batch_size: int,
    seed: int,
    follow_symlinks: bool = False,
    without: Collection[Path] = (),
    on_progress: Callable[[int, int], None] | None = None,
) -> int:
    """Fill a folder up to `num_class_images` usable photos; return how many were drawn.

    Image k comes from the stream (seed, "class", k) and is saved as `{k:05d}-{sha1}.png`. It is always drawn
    in the same batch, as a pipeline rounds differently in others; so an interrupted call, made again, ends
    with the files of an uninterrupted one.

    Raises:
        ValueError: the folder cannot be read, or the pipeline draws a black image.
    """
    folder.mkdir(parents=True, exist_ok=True)
    usable = _usable(folder, follow_symlinks, without)
    drawn_before = {int(match[1]) for photo in usable if (match := _GENERATED.fullmatch(photo.name))}
    num_wanted = num_class_images - (len(usable) - len(drawn_before))
    missing = [number for number in range(num_wanted) if number not in drawn_before]
    missing = missing[: max(num_class_images - len(usable), 0)]
    done = 0
    for start in range(0, num_wanted, sample_batch_size):
        batch = range(start, min(start + sample_batch_size, num_wanted))
        wanted = set(missing) & set(batch)
        if not wanted:
            continue
        generators = [stream(seed, "class", number) for number in batch]
        images = pipeline([class_prompt] * len(batch), generator=generators).images
        assert len(images) == len(batch)
        for number, image in zip(batch, images, strict=True):
            if number in wanted:
                _save(folder, number, image)
        done += len(wanted)
        if on_progress is not None:
            on_progress(done, len(missing))
    return done


def _usable(folder: Path, follow_symlinks: bool, without: Collection[Path]) -> tuple[Photo, ...]:
    """Return the photos that can be used; none where the folder is not there yet, or holds nothing else."""
    if not folder.exists():
        return ()
    find_files(folder, "the class images", without=without)  # a folder that cannot be read is an error
    try:
        return find_photos(folder, follow_symlinks=follow_symlinks, without=without).photos
    except ValueError:  # none is usable; whoever trains is told why when all are gathered
        return ()


def _save(folder: Path, number: int, image: Image.Image) -> None:
    buffer = io.BytesIO()
    image = image.convert("RGB")
    image.save(buffer, "PNG")
    data = buffer.getvalue()
    if image.getextrema() == ((0, 0),) * 3:
        shown = printable(folder, NAME_LIMIT)
        raise ValueError(
            f"class image {number} for {shown} is black, as float16 or a safety checker makes it; "
            "set prior_generation_precision=fp32, or load the base without the checker"
        )
    write_files(folder, {f"{number:05d}-{hashlib.sha1(data, usedforsecurity=False).hexdigest()}.png": data})
