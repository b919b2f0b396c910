"""Where control images come from: a folder, a column of the data set, or a detector of the photo itself."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from ether_diffusion.control.detectors import Detector
from ether_diffusion.control.palette import MAX_CLASSES, Palette, palette_of, read_palette
from ether_diffusion.tiny_world.control import PALETTE
from ether_diffusion.training.config import ControlConfig, DataConfig
from ether_diffusion.training.data.companions import (
    Companion,
    CompanionKind,
    FoundCompanions,
    find_companions,
)
from ether_diffusion.training.data.items import Item, Items
from ether_diffusion.training.data.sources import FileSource, RowSource, Source
from ether_diffusion.training.plain_files import NAME_LIMIT, UnusableFileError
from ether_diffusion.wording import listed, printable

WORD = "control image"


def with_controls(
    items: Items, data: DataConfig, control: ControlConfig, *, without: Collection[Path] = ()
) -> Items:
    """Return items with their control images, which join the fingerprint; a detector's are drawn later.

    Folders `without` are left out where they lie among the control images.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: a photo has no usable control image; all problems are listed, one a line.
    """
    detector = detector_of(control)
    if detector is not None:
        _check_alpha(items, detector)
        return items
    kind = CompanionKind(WORD, "RGB", _finisher(control))
    if control.conditioning_data_dir is not None:
        found = find_companions(
            control.conditioning_data_dir,
            [item.photo for item in items.items],
            kind,
            follow_symlinks=data.follow_symlinks,
            without=without,
        )
    else:
        found = _of_column(items.items, kind, data, control.conditioning_image_column)
    orphans = () if data.max_train_samples is not None else found.orphans
    problems = [*found.problems, *(orphans if data.strict else ())]
    if problems:
        lines = "\n  ".join(problems)
        raise ValueError(f"the control images cannot be used:\n  {lines}")
    pairs = list(zip(items.items, found.companions, strict=True))
    hashes = {f"control image of {item.name}": file.sha256 for item, file in pairs if file is not None}
    return replace(
        items,
        items=tuple(replace(item, control=file) for item, file in pairs),
        warnings=(*items.warnings, *(() if data.strict else orphans)),
        fingerprint=items.fingerprint | hashes,
    )


def detector_of(control: ControlConfig | None) -> Detector | None:
    """Return the detector that draws control images from photos; None where they are given.

    Raises:
        ValueError: what it needs is not installed.
    """
    if control is None or not control.is_detected:
        return None
    assert control.detector is not None
    return Detector(control.detector, control.canny_low_threshold, control.canny_high_threshold)


def open_palette(control: ControlConfig) -> Palette | None:
    """Return the palette of a run's control images; None where any few colours will do.

    Raises:
        FileNotFoundError, ValueError: there is no such palette.
    """
    if control.palette is None or control.control_type != "palette":
        return None
    if control.palette == "tiny_world":
        return palette_of(
            {name: list(colour) for name, colour in PALETTE.items()}, "the palette of Tiny World"
        )
    return read_palette(control.palette)


def finish_control(picture: Image.Image, control: ControlConfig) -> Image.Image:
    """Return a control image (mode RGB) as it is used: a map of classes in its palette's very colours.

    Raises:
        ValueError: it has colours that it must not have; the message follows its name.
    """
    return _finisher(control)(picture)


def _finisher(control: ControlConfig) -> Callable[[Image.Image], Image.Image]:
    palette = open_palette(control)
    if palette is not None:
        return partial(_snap, palette=palette)
    return _few_colours if control.control_type == "palette" else _unchanged


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


def _check_alpha(items: Items, detector: Detector) -> None:
    opaque = [item.name for item in items.items if not item.photo.has_alpha]
    if detector.needs_alpha and opaque:
        raise ValueError(
            f"detector={detector.name} needs photos with transparent parts, and {len(opaque)} of "
            f"{len(items.items)} have none: {listed(opaque)}; cut their subjects out, or draw silhouettes "
            "and give conditioning_data_dir"
        )


def _of_column(items: Sequence[Item], kind: CompanionKind, data: DataConfig, column: str) -> FoundCompanions:
    name = printable(data.dataset_name)
    rows = _rows_with(items, column, name)
    companions: list[Companion | None] = []
    problems: list[str] = []
    missing: list[str] = []
    for item in items:
        assert isinstance(item.source, RowSource)
        found = None
        try:
            source = _cell(replace(item.source, rows=rows, column=column), data)
            if source is None:
                missing.append(item.name)
            else:
                found = kind.read(source, item.name, item.photo)
        except UnusableFileError as reason:
            problems.append(f"the {WORD} of {printable(item.name, NAME_LIMIT)} {reason}")
        companions.append(found)
    if missing:
        problems.append(
            f"{len(missing)} photos have no {WORD} in the column {printable(column)} of {name}: "
            f"{listed(missing, len(missing))}; add them, or delete the rows"
        )
    return FoundCompanions(tuple(companions), tuple(problems))


def _rows_with(items: Sequence[Item], column: str, name: str) -> Any:
    """Return the data set with the column's images undecoded.

    Raises:
        ValueError: there is no such column, or it holds neither images nor names of files.
    """
    import datasets

    source = items[0].source
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
    if not value:
        return None
    if isinstance(value, Mapping):
        return source
    folder = Path(data.dataset_name or "")
    if not folder.is_dir():
        raise UnusableFileError("is a name, and the data set is no folder that could hold the file")
    path = folder / str(value)
    if not path.exists():
        return None
    return FileSource(path, source.inside)
