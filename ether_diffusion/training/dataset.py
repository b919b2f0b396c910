"""What is trained on: a folder or a data set, read into photos with prompts, masks and control images.

A folder is read by `find_photos`, a data set by the `datasets` library; all else is the same for both.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ether_diffusion.training.captions import (
    TEXT_COLUMNS,
    FoundCaption,
    caption_photos,
    read_caption_files,
)
from ether_diffusion.training.config import ControlConfig, DataConfig, PriorConfig
from ether_diffusion.training.crops import Scaling
from ether_diffusion.training.decoding import MAX_BYTES
from ether_diffusion.training.overlays import Find, find_control_images, find_masks
from ether_diffusion.training.photos import (
    Findings,
    Photo,
    PhotoFolder,
    Read,
    check_photos,
    choose_samples,
    file_reader,
    find_photos,
    remarks_on,
)
from ether_diffusion.training.plain_files import NAME_LIMIT, UnusableFileError
from ether_diffusion.wording import listed, printable

_IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".avif", ".tif", ".tiff", ".gif", ".bmp"}
_TABLE_SUFFIXES = {".parquet", ".arrow", ".tar", ".zip"}


@dataclass(frozen=True)
class TrainingData:
    """All photos in a fixed order, warnings on them, and the SHA-256 of everything read, by name."""

    photos: tuple[Photo, ...]
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
    without = (*without, *([] if config.mask_data_dir is None else [config.mask_data_dir]))
    if config.dataset_name is None:
        read, column = _read_folder(config, scaling, without), None
    else:
        rows = _Rows(config)
        read, column = rows.read(scaling), rows.find
    found, captions, where = read
    photos: Sequence[Photo] = found.photos
    refused = [refusal.sentence for refusal in found.refused]
    findings = Findings(refused if config.strict else [], [f"not used: {each}" for each in refused])
    findings.warnings += found.warnings
    with findings:
        photos = caption_photos(photos, *captions(), config, findings, where=where)
    with findings:
        masks = find_masks(photos, config, findings, without=without)
        photos = [replace(photo, mask=each) for photo, each in zip(photos, masks, strict=True)]
    with findings:
        controls = find_control_images(photos, config, control, findings, without=without, column=column)
        photos = [replace(photo, control=each) for photo, each in zip(photos, controls, strict=True)]
    if findings.problems:
        lines = "\n  ".join(findings.problems)
        raise ValueError(f"the training data cannot be used:\n  {lines}")
    hashes = {f"prompt of {photo.shown}": _sha256(photo.prompt) for photo in photos}
    overlays = (each for photo in photos for each in (photo.mask, photo.control) if each is not None)
    hashes |= {overlay.name: overlay.sha256 for overlay in overlays}
    return TrainingData(tuple(photos), tuple(findings.warnings), found.fingerprint() | hashes)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


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
    warnings = [*(f"not used: {refusal.sentence}" for refusal in found.refused), *found.warnings]
    named = {each[2]: None for photo in found.photos if (each := photo.named_repeats) is not None}
    if named:
        warnings.append(f"{listed(named)}: neither repeats nor words are taken from these names")
    return TrainingData(
        tuple(replace(photo, prompt=prior.class_prompt) for photo in found.photos),
        tuple(f"class images: {warning}" for warning in warnings),
        {f"class image {name}": digest for name, digest in found.fingerprint().items()},
    )


Captions = Callable[[], tuple[Sequence[FoundCaption], Sequence[str]]]
_Found = tuple[PhotoFolder, Captions, str]
"""Photos, what finds their captions and its problems, and what to call the place."""


def _read_folder(config: DataConfig, scaling: Scaling | None, without: Collection[Path]) -> _Found:
    folder, links = config.instance_data_dir, config.follow_symlinks
    assert folder is not None
    found = find_photos(
        folder, follow_symlinks=links, limit=config.max_train_samples, without=without, scaling=scaling
    )
    captions = partial(read_caption_files, folder, follow_symlinks=links, without=without)
    return found, captions, printable(folder, NAME_LIMIT)


class _Rows:
    """The training split of a data set, from a folder or from the Hub.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it cannot be loaded, or has not the columns named.
    """

    def __init__(self, config: DataConfig) -> None:
        assert config.dataset_name is not None
        self.config, self.shown = config, printable(config.dataset_name)
        self.folder = Path(config.dataset_name)
        self.inside = self.folder if self.folder.is_dir() and not config.follow_symlinks else None
        self.rows = _load(config.dataset_name, config.dataset_config_name)
        if config.caption_column is not None:
            self._check_column("caption_column", config.caption_column)
        self.rows = self._undecoded("image_column", config.image_column)
        if config.max_train_samples is not None:
            self.rows = self.rows.select(choose_samples(len(self.rows), config.max_train_samples))
        names = _row_names(self.rows, config.image_column)
        self.numbers = {name: number for number, name in enumerate(names)}

    def read(self, scaling: Scaling | None) -> _Found:
        """Return the photos that can be used.

        Raises:
            ValueError: none can.
        """
        column = self.config.image_column
        photos, refused = check_photos(
            (
                (Path(name), name, partial(_read_cell, self.rows, number, column, self.inside))
                for name, number in self.numbers.items()
            ),
            scaling=scaling,
        )
        if not photos:
            reasons = ";\n  ".join(refusal.sentence for refusal in refused)
            raise ValueError(f"no usable photos in the data set {self.shown}:\n  {reasons or 'it is empty'}")
        warnings, texts = [*remarks_on(photos)], self.config.caption_column
        if texts is not None and isinstance(self.rows[0][texts], list):
            warnings.append(
                f"the column {printable(texts)} holds lists of captions; the first of each is used"
            )
        unused = next((name for name in self.rows.column_names if name in TEXT_COLUMNS), None)
        if texts is None and unused is not None:
            warnings.append(
                f"the data set's column {unused} is not used; for captions, set caption_column={unused}"
            )
        captions = [] if texts is None else [*self._captions(photos, texts)]
        return PhotoFolder(tuple(photos), tuple(refused), tuple(warnings)), lambda: (captions, ()), self.shown

    def _captions(self, photos: Sequence[Photo], column: str) -> Iterator[FoundCaption]:
        for photo in photos:
            text = self.rows[self.numbers[photo.name]][column]
            if isinstance(text, list):
                text = text[0] if text else None
            if text is not None:
                yield FoundCaption(photo.name, str(text), f"row {self.numbers[photo.name]}")

    def find(self, column: str) -> Find:
        """Return what finds the image of a column that belongs to a photo, or the file that it names.

        Raises:
            ValueError: there is no such column, or it holds neither images nor names of files.
        """
        rows = self._undecoded("conditioning_image_column", column, or_names=True)

        def found(photo: Photo) -> Sequence[tuple[Path, Read]]:
            number = self.numbers[photo.name]
            value = rows[number][column]
            if not value:
                return []
            if isinstance(value, Mapping):
                return [(photo.path, partial(_read_cell, rows, number, column, self.inside))]
            if not self.folder.is_dir():
                raise UnusableFileError("is a name, and the data set is no folder that could hold the file")
            path = self.folder / str(value)
            return [(path, file_reader(path, self.inside))] if path.exists() else []

        return found

    def _check_column(self, flag: str, column: str) -> None:
        columns = list(self.rows.column_names)
        if column not in columns:
            raise ValueError(
                f'{flag}="{printable(column)}" is no column of {self.shown}; it has '
                f"{listed(columns, len(columns))}; metadata.jsonl gives one by its name or by its name with "
                "_file_name"
            )

    def _undecoded(self, flag: str, column: str, *, or_names: bool = False) -> Any:
        """Return the rows with the column's images as bytes: our decoding is proof against hostile files."""
        import datasets  # takes a second, and is needed for no folder

        self._check_column(flag, column)
        feature = self.rows.features[column]
        if isinstance(feature, datasets.Image):
            return self.rows.cast_column(column, datasets.Image(decode=False))
        if or_names and isinstance(feature, datasets.Value) and "string" in feature.dtype:
            return self.rows
        needed = "neither images nor names of files" if or_names else "no images"
        raise ValueError(f"the column {printable(column)} of {self.shown} holds {needed}; name one as {flag}")


def _read_cell(rows: Any, number: int, column: str, inside: Path | None) -> bytes:
    """Return the bytes of a row's image, which it holds itself or as the path of a file."""
    image = rows[number][column]
    if not isinstance(image, Mapping):
        raise UnusableFileError("holds no image; delete the row")
    data, path = image.get("bytes"), image.get("path")
    if isinstance(data, bytes):
        if len(data) > MAX_BYTES:
            raise UnusableFileError(f"has more than {MAX_BYTES / 2**20:g} MiB; give a smaller file")
        return data
    if not isinstance(path, str):
        raise UnusableFileError("holds neither bytes nor a path; delete the row")
    return file_reader(Path(path), inside)()


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
