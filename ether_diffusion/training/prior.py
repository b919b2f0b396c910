"""Class images for prior preservation: those that are missing are drawn by the base itself."""

import hashlib
import io
import logging
import re
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from ether_diffusion.bases import decoded_again
from ether_diffusion.durable_files import delete_unfinished, write_files
from ether_diffusion.training.config import DataConfig, PriorConfig
from ether_diffusion.training.photos import PhotoFolder, Scaling, find_photos, may_be_photo
from ether_diffusion.training.plain_files import NAME_LIMIT, find_files
from ether_diffusion.training.processes import DTYPES
from ether_diffusion.training.randomness import stream
from ether_diffusion.wording import listed, printable

if TYPE_CHECKING:
    from ether_diffusion.training.setup import Run

logger = logging.getLogger(__name__)

_GENERATED = re.compile(r"(\d{5,})-[0-9a-f]{40}\.png")


def read_class_images(
    prior: PriorConfig,
    data: DataConfig | None = None,
    *,
    without: Collection[Path] = (),
    scaling: Scaling | None = None,
) -> PhotoFolder:
    """Find and check class images: none where none are wanted, or nothing that can be used is there yet.

    Folders `without` are left out. Where all photos are of one size, class images are kept at it: `scaling`.

    Raises:
        ValueError: there is no folder that may be read, or of `data` that is strict any file cannot be used.
    """
    folder, links, strict = (
        prior.class_data_dir,
        bool(data and data.follow_symlinks),
        bool(data and data.strict),
    )
    if folder is None or prior.prior_preservation != "class_images" or not folder.exists():
        return PhotoFolder()
    files, _ = find_files(folder, "the class images", without=without)
    one_size = None if scaling is None or len(scaling.sizes) > 1 else scaling  # else they take the photos'
    try:
        found = find_photos(folder, strict=strict, follow_symlinks=links, without=without, scaling=one_size)
    except ValueError as error:
        if strict and any(map(may_be_photo, files.values())):
            raise
        return PhotoFolder(warnings=(str(error),) * bool(files))
    warnings = [*(f"not used: {refusal.sentence}" for refusal in found.refused), *found.warnings]
    named = {photo.named_repeats[2]: None for photo in found.photos if photo.named_repeats}
    if named:
        warnings.append(f"{listed(named)}: neither repeats nor words are taken from these names")
    return replace(found, warnings=tuple(warnings))


def draw_class_images(run: "Run", *, without: Collection[Path]) -> None:
    """Draw the class images that are missing, by the base alone; folders `without` hold none."""
    prior, data = run.config.prior.replace(class_prompt=run.config.class_prompt), run.config.data
    if prior.class_data_dir is None:
        return
    delete_unfinished(prior.class_data_dir, is_shared=True)
    if not run.num_missing:
        return
    logger.info("drawing %d class images into %s", run.num_missing, prior.class_data_dir)
    precision = prior.prior_generation_precision or run.accelerator.mixed_precision
    pipeline = run.base.load_unchecked_pipeline(DTYPES[precision]).to(run.accelerator.device)
    pipeline.set_progress_bar_config(disable=True)

    def report(done: int, wanted: int) -> None:
        logger.info("class images: %d of %d", done, wanted)
        run.check()

    with decoded_again(pipeline.vae):
        there = read_class_images(prior, data, without=without)
        generate_class_images(pipeline, prior, there, seed=run.config.compute.seed, on_progress=report)


def generate_class_images(
    pipeline: Any,
    prior: PriorConfig,
    there: PhotoFolder,
    *,
    seed: int,
    on_progress: Callable[[int, int], None] = lambda done, wanted: None,
) -> int:
    """Fill the folder of class images up, where some are `there`; return how many were drawn.

    Image k comes from the stream (seed, "class", k) and is saved as `{k:05d}-{sha1}.png`. It is always drawn
    in the same batch, as a pipeline rounds differently in others; so an interrupted call, made again, ends
    with the files of an uninterrupted one.

    Raises:
        ValueError: the pipeline draws a black image.
    """
    folder, usable, done = prior.class_data_dir, [photo.name for photo in there.photos], 0
    assert folder is not None
    folder.mkdir(parents=True, exist_ok=True)
    drawn_before = {int(match[1]) for name in usable if (match := _GENERATED.fullmatch(name))}
    num_wanted = prior.num_class_images - (len(usable) - len(drawn_before))
    missing = [number for number in range(num_wanted) if number not in drawn_before]
    missing = missing[: max(prior.num_class_images - len(usable), 0)]
    for start in range(0, num_wanted, prior.sample_batch_size):
        batch = range(start, min(start + prior.sample_batch_size, num_wanted))
        wanted = set(missing) & set(batch)
        if wanted:
            generators = [stream(seed, "class", number) for number in batch]
            images = pipeline(prompt=[prior.class_prompt] * len(batch), generator=generators).images
            for number in sorted(wanted):
                _save(folder, number, images[number - start])
            done += len(wanted)
            on_progress(done, len(missing))
    return done


def _save(folder: Path, number: int, image: Image.Image) -> None:
    image, buffer = image.convert("RGB"), io.BytesIO()
    if not image.getbbox():
        raise ValueError(
            f"class image {number} for {printable(folder, NAME_LIMIT)} is black, as float16 or a safety "
            "checker makes it; set prior_generation_precision=fp32, or load the base without the checker"
        )
    image.save(buffer, "PNG")
    digest = hashlib.sha1(buffer.getvalue(), usedforsecurity=False).hexdigest()
    write_files(folder, {f"{number:05d}-{digest}.png": buffer.getvalue()})
