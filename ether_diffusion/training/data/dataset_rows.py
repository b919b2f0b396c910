"""Photos and captions by the `datasets` library: a folder of images with metadata, or one of the Hub."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ether_diffusion.training.caption_files import TEXT_COLUMNS, FoundCaption
from ether_diffusion.training.config import DataConfig
from ether_diffusion.training.data.order import chosen_samples
from ether_diffusion.training.data.sources import Rows, RowSource
from ether_diffusion.training.photos import Photo, PhotoFolder, Refusal, check_photo, remarks_on
from ether_diffusion.training.plain_files import NAME_LIMIT, UnusableFileError
from ether_diffusion.wording import listed, printable

_IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".avif", ".tif", ".tiff", ".gif", ".bmp"}
_TABLE_SUFFIXES = {".parquet", ".arrow", ".tar", ".zip"}


@dataclass(frozen=True)
class DatasetRows:
    """The training split of a data set, with images undecoded; `names` are unique, one a row."""

    name: str
    rows: Rows
    columns: tuple[str, ...]
    image_column: str
    caption_column: str | None
    inside: Path | None
    names: tuple[str, ...]

    @classmethod
    def open(cls, config: DataConfig) -> "DatasetRows":
        """Load the data set that a configuration names, from a folder or from the Hub.

        Raises:
            FileNotFoundError: it is not there.
            ValueError: it has not the columns named, or cannot be loaded.
        """
        assert config.dataset_name is not None
        rows = _load(config.dataset_name, config.dataset_config_name)
        columns = tuple(rows.column_names)
        shown = printable(config.dataset_name)
        for flag, column in (
            ("image_column", config.image_column),
            ("caption_column", config.caption_column),
        ):
            if column is not None and column not in columns:
                found = listed(columns, len(columns))
                raise ValueError(f'{flag}="{printable(column)}" is no column of {shown}; it has {found}')
        rows = _with_undecoded_images(rows, config.image_column, shown)
        if config.max_train_samples is not None:
            rows = rows.select(chosen_samples(len(rows), config.max_train_samples))
        is_local = Path(config.dataset_name).is_dir()
        return cls(
            name=shown,
            rows=rows,
            columns=columns,
            image_column=config.image_column,
            caption_column=config.caption_column,
            inside=Path(config.dataset_name) if is_local and not config.follow_symlinks else None,
            names=_names(rows, config.image_column),
        )

    def find_photos(self) -> PhotoFolder:
        """Check every row's photo.

        Raises:
            ValueError: none can be used.
        """
        photos: list[Photo] = []
        refused: list[Refusal] = []
        for index, name in enumerate(self.names):
            try:
                photos.append(check_photo(Path(name), self._source(index).read(), name=name))
            except UnusableFileError as reason:
                refused.append(Refusal(Path(name), name, str(reason)))
        if not photos:
            reasons = ";\n  ".join(refusal.sentence for refusal in refused)
            raise ValueError(f"no usable photos in the data set {self.name}:\n  {reasons or 'it is empty'}")
        return PhotoFolder(tuple(photos), tuple(refused), (*remarks_on(photos), *self._remarks_on_captions()))

    def captions(self, photos: Sequence[Photo]) -> list[FoundCaption]:
        """Return the photos' captions; none where no column is named."""
        if self.caption_column is None:
            return []
        found: list[FoundCaption] = []
        for photo, index in zip(photos, self._indices(photos), strict=True):
            text = self.rows[index][self.caption_column]
            if isinstance(text, list):
                text = text[0] if text else None
            if text is not None:
                found.append(FoundCaption(photo.name, str(text), f"row {index}", is_sidecar=False))
        return found

    def sources(self, photos: Sequence[Photo]) -> Iterator[RowSource]:
        """Return where each photo's bytes are."""
        return (self._source(index) for index in self._indices(photos))

    def _indices(self, photos: Sequence[Photo]) -> Iterator[int]:
        by_name = {name: index for index, name in enumerate(self.names)}
        return (by_name[photo.name] for photo in photos)

    def _source(self, index: int) -> RowSource:
        return RowSource(self.rows, index, self.image_column, self.inside)

    def _remarks_on_captions(self) -> Iterator[str]:
        if self.caption_column is not None and isinstance(self.rows[0][self.caption_column], list):
            column = printable(self.caption_column)
            yield f"the column {column} holds lists of captions; the first of each is used"
        unused = [column for column in self.columns if column in TEXT_COLUMNS]
        if self.caption_column is None and unused:
            name = unused[0]
            yield f"the data set's column {name} is not used; for captions, set caption_column={name}"


def _load(name: str, config_name: str | None) -> Any:
    import datasets  # takes a second, and is needed for no folder

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
    if "train" in splits:
        return splits["train"]
    if len(splits) == 1:
        return next(iter(splits.values()))
    raise ValueError(f"the data set {printable(name)} has no split train, only {listed(splits)}")


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


def _with_undecoded_images(rows: Any, column: str, shown: str) -> Any:
    """Leave decoding to `decode_bytes`, which is proof against hostile files."""
    import datasets

    if not isinstance(rows.features[column], datasets.Image):
        raise ValueError(
            f"the column {printable(column)} of {shown} holds no images; name one as image_column"
        )
    return rows.cast_column(column, datasets.Image(decode=False))


def _names(rows: Any, column: str) -> tuple[str, ...]:
    """Return the file names; where there are none or the same twice, with the row's number."""
    paths = [(image or {}).get("path") for image in rows[column]]
    names = [Path(path).name if path else "" for path in paths]
    counts = Counter(names)
    return tuple(
        name if name and counts[name] == 1 else f"row-{index:05d}{'-' if name else ''}{name}"
        for index, name in enumerate(names)
    )
