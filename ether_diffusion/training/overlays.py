"""Pictures that lie over photos: masks and control images, given or drawn by a detector."""

import hashlib
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path, PurePosixPath

from PIL import Image

from ether_diffusion.control.detectors import Detector
from ether_diffusion.control.palette import MAX_CLASSES, Palette, palette_of, read_palette
from ether_diffusion.strict_json import Json
from ether_diffusion.tiny_world.world import PALETTE
from ether_diffusion.training.config import ControlConfig, DataConfig
from ether_diffusion.training.photos import Findings, Overlay, OverlayKind, Photo, Read, file_reader
from ether_diffusion.training.plain_files import NAME_LIMIT, UnusableFileError, find_files
from ether_diffusion.wording import listed, printable

Find = Callable[[Photo], Sequence[tuple[Path, Read]]]
"""The files that may be a photo's overlay: one, none, or too many."""


def find_masks(
    photos: Sequence[Photo], data: DataConfig, findings: Findings, *, without: Collection[Path]
) -> Sequence[Overlay | None]:
    """Return each photo's mask from their folder, None where there is none or it is the photo's alpha.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is not a folder, or may not be read.
    """
    if data.mask_data_dir is not None:
        return _in_folder(data.mask_data_dir, photos, MASK, data, findings, without)
    opaque = [photo.name for photo in photos if not photo.has_alpha]
    if data.mask_from_alpha and len(opaque) == len(photos):
        findings.problems.append(
            "mask_from_alpha: no photo has transparent parts; cut one out, or switch it off"
        )
    elif data.mask_from_alpha and opaque:
        share = f"{len(opaque)} of {len(photos)} photos"
        findings.warnings.append(f"{share} have no transparent parts and count whole: {listed(opaque)}")
    return [None] * len(photos)


def find_control_images(
    photos: Sequence[Photo],
    data: DataConfig,
    control: ControlConfig | None,
    findings: Findings,
    *,
    without: Collection[Path],
    column: Callable[[str], Find] | None,
) -> Sequence[Overlay | None]:
    """Return each photo's control image, None where there is none yet: a detector's are drawn later.

    `column` finds those of a data set's column.

    Raises:
        FileNotFoundError: there is no such folder, or no such palette.
        ValueError: it cannot be read, or what the detector needs is not there.
    """
    detector = detector_of(control)
    opaque = [photo.name for photo in photos if not photo.has_alpha]
    if detector is not None and detector.needs_alpha and opaque:
        raise ValueError(
            f"detector={detector.name} needs photos with transparent parts, and {len(opaque)} of "
            f"{len(photos)} have none: {listed(opaque)}; cut their subjects out, or draw silhouettes "
            "and give conditioning_data_dir"
        )
    if control is None or detector is not None:
        return [None] * len(photos)
    kind = OverlayKind("control image", "RGB", _finisher(control))
    if control.conditioning_data_dir is not None:
        return _in_folder(control.conditioning_data_dir, photos, kind, data, findings, without)
    assert column is not None
    name = control.conditioning_image_column
    where = f"the column {printable(name)} of {printable(data.dataset_name)}"
    return _read(photos, kind, column(name), where, "add them, or delete the rows", findings)


def _in_folder(
    folder: Path,
    photos: Sequence[Photo],
    kind: OverlayKind,
    data: DataConfig,
    findings: Findings,
    without: Collection[Path],
) -> Sequence[Overlay | None]:
    """Return each photo's picture of the same stem, in a subfolder of the same name."""
    by_stem: dict[str, list[str]] = {}
    links = data.follow_symlinks
    files = find_files(folder, f"the {kind.word}s", without=without, follow_symlinks=links).files
    for name in files:
        by_stem.setdefault(_stem(name), []).append(name)

    def find(photo: Photo) -> Sequence[tuple[Path, Read]]:
        paths = [files[name] for name in by_stem.get(_stem(photo.name), [])]
        return [(path, file_reader(path, None if links else folder)) for path in paths]

    where, remedy = (
        printable(folder.name, NAME_LIMIT),
        "add files of the same names, such as dog.png for dog.jpg",
    )
    found = _read(photos, kind, find, where, remedy, findings)
    stems = {_stem(photo.name) for photo in photos}
    unused = [name for stem, names in by_stem.items() if stem not in stems for name in names]
    if unused and data.max_train_samples is None:
        no_photo = "belong to no usable photo and are not used"
        orphans = f"{len(unused)} {kind.word}s in {where} {no_photo}: {listed(unused)}"
        (findings.problems if data.strict else findings.warnings).append(orphans)
    return found


def _stem(name: str) -> str:
    return str(PurePosixPath(name).with_suffix(""))


def _read(
    photos: Sequence[Photo], kind: OverlayKind, find: Find, where: str, remedy: str, findings: Findings
) -> Sequence[Overlay | None]:
    """Return each photo's picture, checked, and a problem for each photo without a usable one."""
    found: list[Overlay | None] = []
    missing: list[str] = []
    for photo in photos:
        overlay = None
        try:
            files = find(photo)
            if len(files) > 1:
                names = listed([path.name for path, _ in files])
                raise UnusableFileError(f"is there {len(files)} times, as {names}; keep one")
            if files:
                overlay = _over(photo, kind, *files[0])
            else:
                missing.append(photo.name)
        except UnusableFileError as reason:
            findings.problems.append(f"the {kind.word} of {photo.shown} {reason}")
        found.append(overlay)
    if missing:
        absent = f"{len(missing)} photos have no {kind.word} in {where}"
        findings.problems.append(f"{absent}: {listed(missing, len(missing))}; {remedy}")
    return found


def _over(photo: Photo, kind: OverlayKind, path: Path, read: Read) -> Overlay:
    data = read()
    width, height = kind.decode(data, path.suffix).size
    if abs(width * photo.height - height * photo.width) > max(width, height, photo.width, photo.height):
        raise UnusableFileError(
            f"has {width} × {height} px, and its photo {photo.width} × {photo.height} px; "
            "save it at the photo's size"
        )
    digest = hashlib.sha256(data).hexdigest()
    return Overlay(path=path, name=f"{kind.word} of {photo.name}", sha256=digest, read=read, kind=kind)


# what is used of a picture


def _not_black(mask: Image.Image) -> Image.Image:
    if mask.getextrema()[1] == 0:
        raise UnusableFileError("is black everywhere, so that nothing is learned; paint the subject white")
    return mask


MASK = OverlayKind("mask", "L", _not_black)
"""White where the loss sees the photo, and black or transparent where it does not."""


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
    palette = None
    if control.control_type == "palette" and control.palette == "tiny_world":
        colours: dict[str, Json] = {name: list(colour) for name, colour in PALETTE.items()}
        palette = palette_of(colours, "the palette of Tiny World")
    elif control.control_type == "palette" and control.palette is not None:
        palette = read_palette(control.palette)
    return partial(_in_classes, palette=palette, is_map=control.control_type == "palette")


def _in_classes(picture: Image.Image, palette: Palette | None, *, is_map: bool) -> Image.Image:
    if palette is not None:
        try:
            return palette.snap(picture)
        except ValueError as error:
            raise UnusableFileError(str(error)) from None
    if is_map and picture.getcolors(MAX_CLASSES) is None:
        raise UnusableFileError(
            f"has more than {MAX_CLASSES} colours, and each would be a class; save the map as PNG without "
            "smooth edges, or give its palette, to whose colours near ones are moved"
        )
    return picture
