"""What is trained on: a folder or a data set, read into photos with prompts, masks and control images.

A folder is read by `find_photos`, a data set by the `datasets` library; all else is the same for both.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from ether_diffusion.training.captions import (
    TEXT_COLUMNS,
    FoundCaption,
    PromptRules,
    caption_photos,
    read_caption_files,
)
from ether_diffusion.training.config import ControlConfig, DataConfig, PriorConfig
from ether_diffusion.training.control_images import find_control_images
from ether_diffusion.training.crops import Scaling
from ether_diffusion.training.masks import Overlay, find_masks
from ether_diffusion.training.photos import (
    Photo,
    PhotoFolder,
    RowSource,
    check_photos,
    find_photos,
    remarks_on,
)
from ether_diffusion.training.plain_files import NAME_LIMIT
from ether_diffusion.training.randomness import stream
from ether_diffusion.wording import listed, printable

_IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".avif", ".tif", ".tiff", ".gif", ".bmp"}
_TABLE_SUFFIXES = {".parquet", ".arrow", ".tar", ".zip"}

T = TypeVar("T")


@dataclass(frozen=True)
class TrainingPhoto:
    """A photo with its prompt, so many times an epoch; `mask` is a file's, None where it is the alpha."""

    photo: Photo
    prompt: str
    mask: Overlay | None = None
    control: Overlay | None = None

    @property
    def name(self) -> str:
        """The photo's file name."""
        return self.photo.name

    @property
    def repeats(self) -> int:
        """Times that the name of its folder asks for in an epoch, or 1."""
        named = self.photo.named_repeats
        return 1 if named is None else named[0]


@dataclass(frozen=True)
class TrainingData:
    """All photos in a fixed order, warnings on them, and the SHA-256 of everything read, by name."""

    photos: tuple[TrainingPhoto, ...]
    warnings: tuple[str, ...]
    fingerprint: dict[str, str]


def read_training_data(
    config: DataConfig,
    *,
    control: ControlConfig | None = None,
    scaling: Scaling | None = None,
    without: Collection[Path] = (),
) -> TrainingData:
    """Find and check the photos, captions, masks and control images that a configuration names.

    Folders `without`, and that of the masks, are left out where they lie among the photos. Photos of the
    sizes of `scaling` are kept in memory as far as it has room.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: anything cannot be used; all problems are listed, one a line.
    """
    problems: list[str] = []
    without = (*without, *([] if config.mask_data_dir is None else [config.mask_data_dir]))

    def collect(find: Callable[[], T]) -> T | None:
        try:
            return find()
        except (ValueError, FileNotFoundError) as error:
            problems.append(str(error))
            return None

    read = _read_folder if config.dataset_name is None else _read_rows
    found, find_captions, where = read(config, scaling, without)
    photos = found.photos
    if config.strict:
        problems += [refusal.sentence for refusal in found.refused]

    def caption() -> Any:
        rules = PromptRules(config.instance_prompt, config.token, config.caption_template)
        texts, unread = find_captions()
        return caption_photos(texts, photos, rules, problems=unread, where=where)

    captions = collect(caption)
    masks = collect(lambda: find_masks(photos, config, without=without))
    controls = collect(lambda: find_control_images(photos, config, control, without=without))
    problems += [problem for each in (masks, controls) if each is not None for problem in each.problems]
    if problems:
        lines = "\n  ".join(problems)
        raise ValueError(f"the training data cannot be used:\n  {lines}")
    assert captions is not None
    assert masks is not None
    assert controls is not None
    prompts = (each.prompt for each in captions.captions)
    hashes = {
        f"{overlay.kind.word} of {photo.name}": overlay.sha256
        for each in (masks, controls)
        for photo, overlay in zip(photos, each.overlays, strict=True)
        if overlay is not None
    }
    return TrainingData(
        tuple(map(TrainingPhoto, photos, prompts, masks.overlays, controls.overlays)),
        (*_refusals(found), *found.warnings, *captions.warnings, *masks.warnings, *controls.warnings),
        found.fingerprint() | captions.fingerprint() | hashes,
    )


def read_class_images(
    data: DataConfig, prior: PriorConfig, *, scaling: Scaling | None = None, without: Collection[Path] = ()
) -> TrainingData:
    """Find and check the class images, all with the class prompt; folders `without` are left out.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: none of them can be used, or with `strict` any cannot.
    """
    assert prior.class_data_dir is not None
    assert prior.class_prompt is not None
    found = find_photos(
        prior.class_data_dir,
        follow_symlinks=data.follow_symlinks,
        strict=data.strict,
        without=without,
        scaling=None if scaling is None or len(scaling.sizes) > 1 else scaling,  # they take the photos' sizes
    )
    named = {each[2]: None for photo in found.photos if (each := photo.named_repeats) is not None}
    unused = [f"{listed(named)}: neither repeats nor words are taken from these names"] if named else []
    warnings = tuple(f"class images: {warning}" for warning in (*_refusals(found), *found.warnings, *unused))
    fingerprint = {f"class image {name}": digest for name, digest in found.fingerprint().items()}
    photos = tuple(TrainingPhoto(photo, prior.class_prompt) for photo in found.photos)
    return TrainingData(photos, warnings, fingerprint)


def _refusals(found: PhotoFolder) -> Iterator[str]:
    return (f"not used: {refusal.sentence}" for refusal in found.refused)


def choose_samples(number: int, limit: int | None) -> list[int]:
    """Return which of so many samples a run trains on, in their order: all, or as many as the limit."""
    if limit is None or limit >= number:
        return list(range(number))
    drawn = torch.randperm(number, generator=stream(0, "chosen samples", number))
    return sorted(drawn[:limit].tolist())


# the two readers: photos, what finds their captions and its problems, and what to call the place

FoundCaptions = tuple[Sequence[FoundCaption], Sequence[str]]
Read = tuple[PhotoFolder, Callable[[], FoundCaptions], str]


def _read_folder(config: DataConfig, scaling: Scaling | None, without: Collection[Path]) -> Read:
    folder = config.instance_data_dir
    assert folder is not None
    links = config.follow_symlinks
    found = find_photos(
        folder,
        follow_symlinks=links,
        choose=lambda number: choose_samples(number, config.max_train_samples),
        without=without,
        scaling=scaling,
    )
    return (
        found,
        lambda: read_caption_files(folder, follow_symlinks=links, without=without),
        printable(folder, NAME_LIMIT),
    )


def _read_rows(config: DataConfig, scaling: Scaling | None, without: Collection[Path]) -> Read:
    """Read the training split of a data set, from a folder or from the Hub.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it has not the columns named, cannot be loaded, or none of its photos can be used.
    """
    import datasets  # takes a second, and is needed for no folder

    assert config.dataset_name is not None
    shown = printable(config.dataset_name)
    rows = _load(config.dataset_name, config.dataset_config_name)
    columns = list(rows.column_names)
    for flag, wanted in (("image_column", config.image_column), ("caption_column", config.caption_column)):
        if wanted is not None and wanted not in columns:
            found = listed(columns, len(columns))
            raise ValueError(f'{flag}="{printable(wanted)}" is no column of {shown}; it has {found}')
    column, texts = config.image_column, config.caption_column
    if not isinstance(rows.features[column], datasets.Image):
        raise ValueError(
            f"the column {printable(column)} of {shown} holds no images; name one as image_column"
        )
    rows = rows.cast_column(column, datasets.Image(decode=False))  # ours is proof against hostile files
    if config.max_train_samples is not None:
        rows = rows.select(choose_samples(len(rows), config.max_train_samples))
    folder = Path(config.dataset_name)
    inside = folder if folder.is_dir() and not config.follow_symlinks else None
    names = _row_names(rows, column)
    photos, refused = check_photos(
        ((Path(name), name, RowSource(rows, row, column, inside)) for row, name in enumerate(names)),
        scaling=scaling,
    )
    if not photos:
        reasons = ";\n  ".join(refusal.sentence for refusal in refused)
        raise ValueError(f"no usable photos in the data set {shown}:\n  {reasons or 'it is empty'}")
    warnings = [*remarks_on(photos)]
    if texts is not None and isinstance(rows[0][texts], list):
        warnings.append(f"the column {printable(texts)} holds lists of captions; the first of each is used")
    unused = next((name for name in columns if name in TEXT_COLUMNS), None)
    if texts is None and unused is not None:
        warnings.append(
            f"the data set's column {unused} is not used; for captions, set caption_column={unused}"
        )

    def captions() -> FoundCaptions:
        found = []
        for photo in photos if texts is not None else ():
            assert isinstance(photo.source, RowSource)
            text = rows[photo.source.index][texts]
            if isinstance(text, list):
                text = text[0] if text else None
            if text is not None:
                found.append(FoundCaption(photo.name, str(text), f"row {photo.source.index}"))
        return found, ()

    return PhotoFolder(tuple(photos), tuple(refused), tuple(warnings)), captions, shown


def _load(name: str, config_name: str | None) -> Any:
    import datasets

    try:
        with _uncounted():
            if _is_image_folder(Path(name)):
                if config_name is not None:
                    raise ValueError("it is a folder of images; leave dataset_config_name out")
                splits = datasets.load_dataset("imagefolder", config_name, data_dir=name)
            else:
                splits = datasets.load_dataset(name, config_name)
    except FileNotFoundError as error:
        reason = printable(error, NAME_LIMIT)
        raise FileNotFoundError(
            f"the data set {printable(name)} is not found ({reason}); give a folder of images or a hub id"
        ) from None
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = printable(error, NAME_LIMIT)
        raise ValueError(f"the data set {printable(name)} cannot be loaded ({reason})") from error
    if "train" not in splits and len(splits) != 1:
        raise ValueError(f"the data set {printable(name)} has no split train, only {listed(splits)}")
    return splits["train"] if "train" in splits else next(iter(splits.values()))


@contextmanager
def _uncounted() -> Iterator[None]:
    """Keep the library from reporting to a server what is loaded, as it does even of folders."""
    import datasets

    before = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    try:
        yield
    finally:
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = before


def _is_image_folder(folder: Path) -> bool:
    """Say whether a folder is one of image files; the library takes one with sidecars for a set of texts."""
    if not folder.is_dir():
        return False
    suffixes = {path.suffix.lower() for path in folder.rglob("*")}
    return bool(suffixes & _IMAGE_SUFFIXES) and not suffixes & _TABLE_SUFFIXES


def _row_names(rows: Any, column: str) -> list[str]:
    """Return the file names; where there are none or the same twice, with the row's number."""
    paths = [(image or {}).get("path") for image in rows[column]]
    names = [Path(path).name if path else "" for path in paths]
    counts = Counter(names)
    return [
        name if name and counts[name] == 1 else f"row-{index:05d}{'-' if name else ''}{name}"
        for index, name in enumerate(names)
    ]
