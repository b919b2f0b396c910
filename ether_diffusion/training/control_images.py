"""Where control images come from: a folder, a column of the data set, or a detector of the photo itself."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from ether_diffusion.control.detectors import Detector
from ether_diffusion.control.palette import MAX_CLASSES, Palette, palette_of, read_palette
from ether_diffusion.strict_json import Json
from ether_diffusion.tiny_world.world import PALETTE
from ether_diffusion.training.config import ControlConfig, DataConfig
from ether_diffusion.training.masks import FoundOverlays, Overlay, OverlayKind, find_overlays
from ether_diffusion.training.photos import FileSource, Photo, RowSource, Source
from ether_diffusion.training.plain_files import UnusableFileError
from ether_diffusion.wording import listed, printable

WORD = "control image"


def find_control_images(
    photos: Sequence[Photo], data: DataConfig, control: ControlConfig | None, *, without: Collection[Path]
) -> FoundOverlays:
    """Return each photo's control image, None where there is none yet: a detector's are drawn later.

    Raises:
        FileNotFoundError: there is no such folder, or no such palette.
        ValueError: it cannot be read, or what the detector needs is not there.
    """
    detector = detector_of(control)
    if control is None or detector is not None:
        opaque = [photo.name for photo in photos if not photo.has_alpha]
        if detector is not None and detector.needs_alpha and opaque:
            raise ValueError(
                f"detector={detector.name} needs photos with transparent parts, and {len(opaque)} of "
                f"{len(photos)} have none: {listed(opaque)}; cut their subjects out, or draw silhouettes "
                "and give conditioning_data_dir"
            )
        return FoundOverlays([None] * len(photos))
    kind = OverlayKind(WORD, "RGB", _finisher(control))
    if control.conditioning_data_dir is not None:
        return find_overlays(control.conditioning_data_dir, photos, kind, data, without=without)
    return _of_column(photos, kind, data, control.conditioning_image_column)


def detector_of(control: ControlConfig | None) -> Detector | None:
    """Return the detector that draws control images from photos; None where they are given.

    Raises:
        ValueError: what it needs is not installed.
    """
    if control is None or not control.is_detected:
        return None
    assert control.detector is not None
    return Detector(control.detector, control.canny_low_threshold, control.canny_high_threshold)


def finish_control(picture: Image.Image, control: ControlConfig) -> Image.Image:
    """Return a control image (mode RGB) as it is used: a map of classes in its palette's very colours.

    Raises:
        ValueError: it has colours that it must not have; the message follows its name.
    """
    return _finisher(control)(picture)


def _finisher(control: ControlConfig) -> Callable[[Image.Image], Image.Image]:
    if control.control_type != "palette":
        return _unchanged
    if control.palette is None:
        return _few_colours
    if control.palette == "tiny_world":
        colours: dict[str, Json] = {name: list(colour) for name, colour in PALETTE.items()}
        return partial(_snap, palette=palette_of(colours, "the palette of Tiny World"))
    return partial(_snap, palette=read_palette(control.palette))


def _unchanged(picture: Image.Image) -> Image.Image:
    return picture


def _few_colours(picture: Image.Image) -> Image.Image:
    if picture.getcolors(MAX_CLASSES) is None:
        raise UnusableFileError(
            f"has more than {MAX_CLASSES} colours, and each would be a class; save the map as PNG without "
            "smooth edges, or give its palette, to whose colours near ones are moved"
        )
    return picture


def _snap(picture: Image.Image, palette: Palette) -> Image.Image:
    try:
        return palette.snap(picture)
    except ValueError as error:
        raise UnusableFileError(str(error)) from None


def _of_column(photos: Sequence[Photo], kind: OverlayKind, data: DataConfig, column: str) -> FoundOverlays:
    name = printable(data.dataset_name)
    rows = _rows_with(photos[0].source, column, name)
    found: list[Overlay | None] = []
    problems: list[str] = []
    missing: list[str] = []
    for photo in photos:
        assert isinstance(photo.source, RowSource)
        overlay = None
        try:
            source = _cell(replace(photo.source, rows=rows, column=column), data)
            if source is None:
                missing.append(photo.name)
            else:
                overlay = kind.read(source, photo.name, photo)
        except UnusableFileError as reason:
            problems.append(f"the {WORD} of {photo.shown} {reason}")
        found.append(overlay)
    if missing:
        problems.append(
            f"{len(missing)} photos have no {WORD} in the column {printable(column)} of {name}: "
            f"{listed(missing, len(missing))}; add them, or delete the rows"
        )
    return FoundOverlays(found, tuple(problems))


def _rows_with(source: Source | None, column: str, name: str) -> Any:
    """Return the data set with the column's images undecoded.

    Raises:
        ValueError: there is no such column, or it holds neither images nor names of files.
    """
    import datasets

    assert isinstance(source, RowSource)
    rows: Any = source.rows
    if column not in rows.column_names:
        raise ValueError(
            f'conditioning_image_column="{printable(column)}" is no column of {name}; it has '
            f"{listed(rows.column_names, len(rows.column_names))}; in metadata.jsonl the field is called "
            f"{printable(column)} or {printable(column)}_file_name"
        )
    feature = rows.features[column]
    if isinstance(feature, datasets.Image):
        return rows.cast_column(column, datasets.Image(decode=False))
    if isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string"):
        return rows
    raise ValueError(
        f"the column {printable(column)} of {name} holds neither images nor names of files; name one that "
        "does as conditioning_image_column"
    )


def _cell(source: RowSource, data: DataConfig) -> Source | None:
    """Return where a row's control image is: in the data set, or a file named from its folder."""
    value = source.rows[source.index][source.column]
    if not value or isinstance(value, Mapping):
        return source if value else None
    folder = Path(data.dataset_name or "")
    if not folder.is_dir():
        raise UnusableFileError("is a name, and the data set is no folder that could hold the file")
    path = folder / str(value)
    return FileSource(path, source.inside) if path.exists() else None
