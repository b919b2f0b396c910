"""What is trained on: each photo with its prompt and mask, all checked before a model is loaded."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ether_diffusion.training.captions import Captions, Filling, caption_photos, read_captions
from ether_diffusion.training.config import DataConfig, PriorConfig
from ether_diffusion.training.data.companions import MASK, Companion, find_companions
from ether_diffusion.training.data.dataset_rows import DatasetRows
from ether_diffusion.training.data.order import chosen_samples
from ether_diffusion.training.data.sources import FileSource, Source
from ether_diffusion.training.photos import Photo, PhotoFolder, find_photos, name_repeats
from ether_diffusion.wording import listed

T = TypeVar("T")


@dataclass(frozen=True)
class Item:
    """A photo to be trained on, so many times an epoch.

    `mask` is a file's, None where there is none or it is the photo's alpha.
    """

    photo: Photo
    source: Source
    prompt: str
    mask: Companion | None = None
    control: Companion | None = None

    @property
    def name(self) -> str:
        """The photo's file name."""
        return self.photo.name

    @property
    def repeats(self) -> int:
        """Times that the name of its folder asks for in an epoch, or 1."""
        named = name_repeats(self.photo.name)
        return 1 if named is None else named[0]


@dataclass(frozen=True)
class Items:
    """All photos in a fixed order, warnings on them, and the SHA-256 of everything read, by name."""

    items: tuple[Item, ...]
    warnings: tuple[str, ...]
    fingerprint: dict[str, str]


def gather_items(config: DataConfig, *, without: Collection[Path] = ()) -> Items:
    """Find and check the photos, captions and masks that a configuration names.

    Folders `without`, and that of the masks, are left out where they lie among the photos.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: anything cannot be used; all problems are listed, one a line.
    """
    rows = None if config.dataset_name is None else DatasetRows.open(config)
    problems: list[str] = []
    without = (*without, *([] if config.mask_data_dir is None else [config.mask_data_dir]))
    if rows is None:
        assert config.instance_data_dir is not None
        found = find_photos(
            config.instance_data_dir,
            follow_symlinks=config.follow_symlinks,
            choose=lambda number: chosen_samples(number, config.max_train_samples),
            without=without,
        )
    else:
        found = rows.find_photos()
    if config.strict:
        problems += [refusal.sentence for refusal in found.refused]
    captions = _collect(problems, lambda: _captions(config, rows, found, without))
    masks, mask_warnings = _masks(config, found.photos, problems, without)
    if problems:
        lines = "\n  ".join(problems)
        raise ValueError(f"the training data cannot be used:\n  {lines}")
    assert captions is not None
    sources: Iterator[Source]
    sources = _file_sources(config, found.photos) if rows is None else rows.sources(found.photos)
    prompts = (caption.prompt for caption in captions.captions)
    items = tuple(map(Item, found.photos, sources, prompts, masks))
    return Items(
        items,
        (*_refusals(found), *found.warnings, *captions.warnings, *mask_warnings),
        found.fingerprint() | captions.fingerprint() | _mask_fingerprint(items),
    )


def gather_class_items(data: DataConfig, prior: PriorConfig, *, without: Collection[Path] = ()) -> Items:
    """Find and check the class images, all with the class prompt; folders `without` are left out.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: none of them can be used, or with `strict` any cannot.
    """
    assert prior.class_data_dir is not None
    assert prior.class_prompt is not None
    found = find_photos(
        prior.class_data_dir, follow_symlinks=data.follow_symlinks, strict=data.strict, without=without
    )
    inside = None if data.follow_symlinks else prior.class_data_dir
    items = tuple(Item(photo, FileSource(photo.path, inside), prior.class_prompt) for photo in found.photos)
    named = {each[2]: None for photo in found.photos if (each := name_repeats(photo.name)) is not None}
    unused = [f"{listed(named)}: neither repeats nor words are taken from these names"] if named else []
    warnings = tuple(f"class images: {warning}" for warning in (*_refusals(found), *found.warnings, *unused))
    fingerprint = {f"class image {name}": digest for name, digest in found.fingerprint().items()}
    return Items(items, warnings, fingerprint)


def _captions(
    config: DataConfig, rows: DatasetRows | None, found: PhotoFolder, without: Collection[Path]
) -> Captions:
    filling = Filling(config.instance_prompt, config.token, config.caption_template)
    filling.check()
    if rows is not None:
        return caption_photos(
            rows.captions(found.photos), found.photos, filling, problems=(), where=rows.name
        )
    assert config.instance_data_dir is not None
    return read_captions(
        config.instance_data_dir,
        found.photos,
        instance_prompt=config.instance_prompt,
        token=config.token,
        template=config.caption_template,
        follow_symlinks=config.follow_symlinks,
        without=without,
    )


def _masks(
    config: DataConfig, photos: Sequence[Photo], problems: list[str], without: Collection[Path]
) -> tuple[Sequence[Companion | None], tuple[str, ...]]:
    if config.mask_data_dir is not None:
        folder = config.mask_data_dir
        found = _collect(
            problems,
            lambda: find_companions(
                folder, photos, MASK, follow_symlinks=config.follow_symlinks, without=without
            ),
        )
        if found is not None:
            orphans = () if config.max_train_samples is not None else found.orphans
            problems += [*found.problems, *(orphans if config.strict else ())]
            return found.companions, () if config.strict else orphans
    opaque = [photo.name for photo in photos if not photo.has_alpha]
    if config.mask_from_alpha and len(opaque) == len(photos):
        problems.append("mask_from_alpha: no photo has transparent parts; cut one out, or switch it off")
    if config.mask_from_alpha and opaque:
        share = f"{len(opaque)} of {len(photos)} photos"
        return [None] * len(photos), (f"{share} have no transparent parts and count whole: {listed(opaque)}",)
    return [None] * len(photos), ()


def _collect(problems: list[str], work: Callable[[], T]) -> T | None:
    """Return what `work` gives; what is wrong with it joins the problems."""
    try:
        return work()
    except (ValueError, FileNotFoundError) as error:
        problems.append(str(error))
        return None


def _file_sources(config: DataConfig, photos: Sequence[Photo]) -> Iterator[FileSource]:
    for photo in photos:
        yield FileSource(photo.path, None if config.follow_symlinks else config.instance_data_dir)


def _refusals(found: PhotoFolder) -> Iterator[str]:
    return (f"not used: {refusal.sentence}" for refusal in found.refused)


def _mask_fingerprint(items: Sequence[Item]) -> dict[str, str]:
    return {f"mask of {item.name}": item.mask.sha256 for item in items if item.mask is not None}
