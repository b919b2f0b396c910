"""What is trained on: a folder or a data set, read into photos with prompts, masks and control images.

A folder is read by `find_photos`, a data set by the `datasets` library; all else is the same for both.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from PIL import Image

from ether_diffusion.control.detectors import Detector
from ether_diffusion.control.palette import MAX_CLASSES, Palette, read_palette
from ether_diffusion.tiny_world.world import PALETTE
from ether_diffusion.training.captions import TEXT_COLUMNS, FoundCaption, caption_photos, read_caption_files
from ether_diffusion.training.config import ControlConfig, DataConfig
from ether_diffusion.training.decoding import BLACK, MAX_BYTES, decode_bytes
from ether_diffusion.training.photos import (
    Overlay,
    Photo,
    PhotoFolder,
    Read,
    Scaling,
    check_photos,
    choose_samples,
    file_reader,
    find_photos,
)
from ether_diffusion.training.plain_files import NAME_LIMIT, UnusableFileError, find_files
from ether_diffusion.wording import listed, printable

_IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".avif", ".tif", ".tiff", ".gif", ".bmp"}
_TABLE_SUFFIXES = {".parquet", ".arrow", ".tar", ".zip"}
TrainingData = PhotoFolder
Files = Mapping[str, tuple[Path, Read]]
"""Files by name: photos, or what lies over the photos of these names."""
Open = Callable[[bytes, str], Image.Image]


def read_training_data(
    config: DataConfig,
    *,
    control: ControlConfig | None = None,
    scaling: Scaling | None = None,
    without: Collection[Path] = (),
) -> PhotoFolder:
    """Find and check the photos, captions, masks and control images that a configuration names.

    Folders `without`, and that of the masks, are left out where they lie among the photos. Photos of the
    sizes of `scaling` are kept in memory as far as it has room.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: anything cannot be used; all problems are listed, one a line.
    """
    without = [folder for folder in (*without, config.mask_data_dir) if folder is not None]
    rows, folder, links = None, config.instance_data_dir, config.follow_symlinks
    if folder is None:
        rows = _Rows(config)
        found, problems = rows.photos(scaling), list[str]()
        captions = rows.captions({photo.name for photo in found.photos})
    else:
        limit = config.max_train_samples
        found = find_photos(folder, follow_symlinks=links, limit=limit, without=without, scaling=scaling)
        captions, problems = read_caption_files(folder, follow_symlinks=links, without=without)
    refused = [refusal.sentence for refusal in found.refused]
    problems = [*(refused if config.strict else []), *problems]
    warnings = [*([] if config.strict else [f"not used: {each}" for each in refused]), *found.warnings]
    photos = caption_photos(found.photos, captions, config, problems, warnings)
    overlays = _Overlays(photos, config, without, problems, warnings)
    for lay in (overlays.lay_masks, lambda: overlays.lay_controls(control, rows)):
        try:
            lay()
        except (ValueError, FileNotFoundError) as error:
            problems.append(str(error))
    if problems:
        lines = "\n  ".join(problems)
        raise ValueError(f"the training data cannot be used:\n  {lines}")
    return replace(found, photos=tuple(overlays.photos), warnings=tuple(warnings))


@dataclass
class _Overlays:
    """Lays masks and control images over photos, and notes what is wrong with them."""

    photos: list[Photo]
    config: DataConfig
    without: Collection[Path]
    problems: list[str]
    warnings: list[str]

    @property
    def opaque(self) -> tuple[list[str], str]:
        """The photos without transparent parts, and how many of how many they are."""
        names = [photo.name for photo in self.photos if not photo.has_alpha]
        return names, f"{len(names)} of {len(self.photos)} photos have no transparent parts"

    def lay_masks(self) -> None:
        """Lay the folder's masks over the photos; where they are the alpha, say which photos have none."""
        (opaque, share), folder = self.opaque, self.config.mask_data_dir
        if folder is not None:
            self._lay("mask", *self._in_folder(folder, "mask"), partial(_open, mode="L", finish=_not_black))
        elif self.config.mask_from_alpha and len(opaque) == len(self.photos):
            self.problems.append(f"mask_from_alpha: {share}; cut one out, or switch it off")
        elif self.config.mask_from_alpha and opaque:
            self.warnings.append(f"{share} and count whole: {listed(opaque)}")

    def lay_controls(self, control: ControlConfig | None, rows: "_Rows | None") -> None:
        """Lay control images of a folder or a column over the photos; a detector's are drawn later."""
        detector, (opaque, share), word = detector_of(control), self.opaque, "control image"
        if detector is not None and detector.needs_alpha and opaque:
            remedy = "cut them out, or draw silhouettes and give conditioning_data_dir"
            raise ValueError(f"detector={detector.name}: {share}: {listed(opaque)}; {remedy}")
        if control is None or detector is not None:
            return
        if control.conditioning_data_dir is not None:
            files, where = self._in_folder(control.conditioning_data_dir, word)
        else:
            assert rows is not None
            files, where = rows.files(control.conditioning_image_column)
        self._lay(word, files, where, partial(_open, mode="RGB", finish=control_finisher(control)))

    def _in_folder(self, folder: Path, word: str) -> tuple[Files, str]:
        """Return each photo's picture of the same stem and subfolder, and what to call them."""
        links, shown = self.config.follow_symlinks, printable(folder.name, NAME_LIMIT)
        files, _ = find_files(folder, f"the {word}s", without=self.without, follow_symlinks=links)
        by_stem = defaultdict[str, list[str]](list)
        for name in files:
            by_stem[_stem(name)].append(name)
        stems = {_stem(photo.name) for photo in self.photos}
        for stem in sorted(stems):
            if len(by_stem[stem]) > 1:
                self.problems.append(f"{listed(by_stem[stem])} in {shown} are {word}s of one photo; keep one")
        unused = [name for stem, names in by_stem.items() if stem not in stems for name in names]
        if unused and self.config.max_train_samples is None:
            no_photo = f"{len(unused)} {word}s in {shown} belong to no usable photo and are not used"
            (self.problems if self.config.strict else self.warnings).append(f"{no_photo}: {listed(unused)}")
        found = {photo.name: by_stem[_stem(photo.name)][:1] for photo in self.photos}
        paths = {name: files[each] for name, names in found.items() for each in names}
        read = {name: (path, file_reader(path, None if links else folder)) for name, path in paths.items()}
        return read, f"{shown}; add files of the same names, such as dog.png for dog.jpg"

    def _lay(self, word: str, files: Files, where: str, opened: Open) -> None:
        """Give each photo its picture, checked, and note a problem for each photo without a usable one."""
        missing = [photo.name for photo in self.photos if photo.name not in files]
        if missing:
            shown = listed(missing, len(missing))
            self.problems.append(f"{len(missing)} photos have no {word}: {shown}; looked in {where}")
        for number, photo in enumerate(self.photos):
            if photo.name not in files:
                continue
            path, read = files[photo.name]
            try:
                data = read()
                width, height = opened(data, path.suffix).size
                if abs(width * photo.height - height * photo.width) > max(width, height, *photo.size):
                    sides = f"{width} × {height} px, and its photo {photo.width} × {photo.height} px"
                    raise UnusableFileError(f"has {sides}; save it at the photo's size")
            except UnusableFileError as reason:
                self.problems.append(f"the {word} of {photo.shown} {reason}")
                continue
            name, digest = f"{word} of {photo.name}", hashlib.sha256(data).hexdigest()
            overlay = Overlay(path=path, name=name, sha256=digest, read=read, open=opened)
            is_mask = word == "mask"
            laid = replace(photo, mask=overlay) if is_mask else replace(photo, control=overlay)
            self.photos[number] = laid


def _stem(name: str) -> str:
    return str(PurePosixPath(name).with_suffix(""))


def _open(
    data: bytes, suffix: str, *, mode: Literal["L", "RGB"], finish: Callable[[Image.Image], Image.Image]
) -> Image.Image:
    """Return the picture of a file, what is transparent over black."""
    return finish(decode_bytes(data, suffix, background=BLACK, min_side=1).rgb.convert(mode))


def _not_black(mask: Image.Image) -> Image.Image:
    """White where the loss sees the photo, and black or transparent where it does not."""
    if mask.getextrema()[1] == 0:
        raise UnusableFileError("is black everywhere, so that nothing is learned; paint the subject white")
    return mask


def detector_of(control: ControlConfig | None) -> Detector | None:
    """Return the detector that draws control images from photos; None where they are given."""
    if control is None or control.detector is None or not control.is_detected:
        return None
    return Detector(control.detector, control.canny_low_threshold, control.canny_high_threshold)


def control_finisher(control: ControlConfig) -> Callable[[Image.Image], Image.Image]:
    """Return what makes a control image (mode RGB) the one that is used: a map in its palette's very colours.

    It raises an UnusableFileError where the map has colours that it must not have.
    """
    palette, is_map = None, control.control_type == "palette"
    if is_map and control.palette == "tiny_world":
        palette = Palette("the palette of Tiny World", tuple(PALETTE), tuple(PALETTE.values()))
    elif is_map and control.palette is not None:
        palette = read_palette(control.palette)
    return partial(_in_classes, palette=palette) if is_map else Image.Image.copy


def _in_classes(picture: Image.Image, palette: Palette | None) -> Image.Image:
    if palette is None and picture.getcolors(MAX_CLASSES) is None:
        raise UnusableFileError(
            f"has more than {MAX_CLASSES} colours, and each would be a class; save the map as PNG without "
            "smooth edges, or give its palette, to whose colours near ones are moved"
        )
    try:
        return picture if palette is None else palette.snap(picture)
    except ValueError as error:
        raise UnusableFileError(str(error)) from None


# data sets


class _Rows:
    """The training split of a data set, from a folder or from the Hub, and what its columns hold."""

    def __init__(self, config: DataConfig) -> None:
        assert config.dataset_name is not None
        self.config, self.shown = config, printable(config.dataset_name)
        self.folder = Path(config.dataset_name)
        self.inside = self.folder if self.folder.is_dir() and not config.follow_symlinks else None
        self.rows = _load(config.dataset_name, config.dataset_config_name)
        if config.caption_column is not None:
            self._check_column("caption_column", config.caption_column)
        self.rows = self._undecoded("image_column", config.image_column)
        self.rows = self.rows.select(choose_samples(len(self.rows), config.max_train_samples))
        paths = [(image or {}).get("path") for image in self.rows[config.image_column]]
        names = [Path(path).name if path else "" for path in paths]
        counts = Counter(names)  # without a name, or with one that is there twice, a row has its number
        self.names = [
            name if name and counts[name] == 1 else f"row-{number:05d}{'-' if name else ''}{name}"
            for number, name in enumerate(names)
        ]

    def photos(self, scaling: Scaling | None) -> PhotoFolder:
        """Return the photos, and warnings on the columns; a ValueError says that none can be used."""
        texts, columns, remarks = self.config.caption_column, self.rows.column_names, list[str]()
        unused = next((name for name in columns if name in TEXT_COLUMNS), None)
        if texts is None and unused is not None:
            remarks.append(
                f"the data set's column {unused} is not used; for captions, set caption_column={unused}"
            )
        if texts is not None and len(self.rows) and isinstance(self.rows[0][texts], list):
            remarks.append(
                f"the column {printable(texts)} holds lists of captions; the first of each is used"
            )
        column, inside = self.config.image_column, self.inside
        files = {
            name: (Path(name), partial(_read_cell, self.rows, number, column, inside))
            for number, name in enumerate(self.names)
        }
        return check_photos(files, f"the data set {self.shown}", remarks, scaling=scaling)

    def captions(self, wanted: Collection[str]) -> list[FoundCaption]:
        """Return the captions of photos, of which some may have none."""
        column, found = self.config.caption_column, list[FoundCaption]()
        for number, name in enumerate(self.names):
            text = self.rows[number][column] if column and name in wanted else None
            text = (text or [None])[0] if isinstance(text, list) else text
            found += [] if text is None else [FoundCaption(name, str(text), f"row {number}")]
        return found

    def files(self, column: str) -> tuple[Files, str]:
        """Return each photo's image of a column, or the file that it names, and what to call these.

        A ValueError says that there is no such column, or that it holds neither images nor names of files.
        """
        rows, found = self._undecoded("conditioning_image_column", column, or_names=True), dict[str, Any]()
        for number, name in enumerate(self.names):
            value = rows[number][column]
            path = self.folder / value if isinstance(value, str) else Path(name)
            if isinstance(value, Mapping):
                found[name] = path, partial(_read_cell, rows, number, column, self.inside)
            elif value and path.exists():
                found[name] = path, file_reader(path, self.inside)
        return found, f"the column {printable(column)} of {self.shown}; add them, or delete the rows"

    def _check_column(self, flag: str, column: str) -> None:
        columns = self.rows.column_names
        if column not in columns:
            known = (
                f"it has {listed(columns, len(columns))}; metadata.jsonl gives one by its name or that with"
            )
            raise ValueError(f'{flag}="{printable(column)}" is no column of {self.shown}; {known} _file_name')

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
    image = rows[number][column] or {}
    data, path = image.get("bytes"), image.get("path")
    if isinstance(data, bytes) and len(data) <= MAX_BYTES:
        return data
    if isinstance(data, bytes) or not isinstance(path, str):
        raise UnusableFileError(f"holds no image of at most {MAX_BYTES / 2**20:g} MiB; delete the row")
    return file_reader(Path(path), inside)()


def _load(name: str, config_name: str | None) -> Any:
    import datasets

    shown, folder = printable(name), Path(name)
    suffixes = {path.suffix.lower() for path in folder.rglob("*")} if folder.is_dir() else set()
    # the library takes a folder of images with text files beside them for a set of texts
    is_image_folder = suffixes & _IMAGE_SUFFIXES and not suffixes & _TABLE_SUFFIXES
    if is_image_folder and config_name is not None:
        raise ValueError(f"the data set {shown} is a folder of images; leave dataset_config_name out")
    counts, datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS, False
    try:
        if is_image_folder:
            splits = datasets.load_dataset("imagefolder", data_dir=name)
        else:
            splits = datasets.load_dataset(name, config_name)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = f"({printable(error, NAME_LIMIT)}); give a folder of images or a hub id"
        if isinstance(error, FileNotFoundError):
            raise FileNotFoundError(f"the data set {shown} is not found {reason}") from None
        raise ValueError(f"the data set {shown} cannot be loaded {reason}") from error
    finally:  # else the library would have reported to a server what is loaded, even of folders
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = counts
    if "train" not in splits and len(splits) != 1:
        raise ValueError(f"the data set {shown} has no split train, only {listed(splits)}")
    return splits["train"] if "train" in splits else next(iter(splits.values()))
