"""Class images for prior preservation: those that are missing are drawn by the base itself."""

import hashlib
import io
import logging
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from ether_diffusion.bases import decoded_again
from ether_diffusion.durable_files import delete_unfinished, write_files
from ether_diffusion.training.photos import Photo, find_photos
from ether_diffusion.training.plain_files import NAME_LIMIT, find_files
from ether_diffusion.training.processes import DTYPES
from ether_diffusion.training.randomness import stream
from ether_diffusion.wording import printable

if TYPE_CHECKING:
    from ether_diffusion.training.setup import Run

logger = logging.getLogger(__name__)

_GENERATED = re.compile(r"(\d{5,})-[0-9a-f]{40}\.png")


def count_missing(
    folder: Path, num_class_images: int, *, follow_symlinks: bool = False, without: Collection[Path] = ()
) -> int:
    """Return how many class images a folder lacks; only photos that can be used are counted.

    Raises:
        ValueError: it is not a folder, or may not be read.
    """
    return max(num_class_images - len(_usable(folder, follow_symlinks, without)), 0)


def draw_class_images(run: "Run", *, without: Collection[Path]) -> None:
    """Draw the class images that are missing, by the base alone; folders `without` hold none."""
    config, prior = run.config, run.config.prior
    if prior.class_data_dir is None:
        return
    delete_unfinished(prior.class_data_dir, is_shared=True)
    if not run.num_missing:
        return
    assert config.class_prompt is not None
    logger.info("drawing %d class images into %s", run.num_missing, prior.class_data_dir)
    precision = prior.prior_generation_precision or run.accelerator.mixed_precision
    pipeline = run.base.load_unchecked_pipeline(DTYPES[precision]).to(run.accelerator.device)
    pipeline.set_progress_bar_config(disable=True)

    def report(done: int, wanted: int) -> None:
        logger.info("class images: %d of %d", done, wanted)
        run.check()

    with decoded_again(pipeline.vae):
        generate_class_images(
            pipeline,
            prior.class_data_dir,
            class_prompt=config.class_prompt,
            num_class_images=prior.num_class_images,
            sample_batch_size=prior.sample_batch_size,
            seed=config.compute.seed,
            follow_symlinks=config.data.follow_symlinks,
            without=without,
            on_progress=report,
        )


def generate_class_images(
    pipeline: Any,
    folder: Path,
    *,
    class_prompt: str,
    num_class_images: int,
    sample_batch_size: int,
    seed: int,
    follow_symlinks: bool = False,
    without: Collection[Path] = (),
    on_progress: Callable[[int, int], None] = lambda done, wanted: None,
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
        for number, image in zip(batch, images, strict=True):
            if number in wanted:
                _save(folder, number, image)
        done += len(wanted)
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
    image = image.convert("RGB")
    if image.getextrema() == ((0, 0),) * 3:
        raise ValueError(
            f"class image {number} for {printable(folder, NAME_LIMIT)} is black, as float16 or a safety "
            "checker makes it; set prior_generation_precision=fp32, or load the base without the checker"
        )
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    data = buffer.getvalue()
    write_files(folder, {f"{number:05d}-{hashlib.sha1(data, usedforsecurity=False).hexdigest()}.png": data})
