"""Files that belong to photos by their names: masks, control images."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from ether_diffusion.adapter_file.wording import listed, printable
from ether_diffusion.training.data.sources import FileSource
from ether_diffusion.training.photos import Photo
from ether_diffusion.training.plain_files import NAME_LIMIT, UnusableFileError, list_files

T = TypeVar("T")


def find_companions(
    folder: str | Path,
    photos: Sequence[Photo],
    check: Callable[[FileSource, Photo], T],
    *,
    word: str,
    follow_symlinks: bool,
) -> tuple[list[T | None], list[str]]:
    """Return each photo's file of the same stem, and a sentence for each photo without a usable one.

    `check` says of a file that it is usable; `word` is what messages call it, "mask".

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is not a folder, or may not be read.
    """
    by_stem: dict[str, list[Path]] = {}
    for path in list_files(folder, f"the {word}s"):
        by_stem.setdefault(path.stem, []).append(path)
    inside = None if follow_symlinks else Path(folder)
    companions: list[T | None] = []
    problems: list[str] = []
    missing: list[str] = []
    for photo in photos:
        paths = by_stem.get(photo.path.stem, [])
        found = None
        if not paths:
            missing.append(photo.path.name)
        elif len(paths) > 1:
            names = listed(path.name for path in paths)
            problems.append(f"{_shown(photo.path)} has several {word}s, {names}; keep one")
        else:
            try:
                found = check(FileSource(paths[0], inside), photo)
            except UnusableFileError as reason:
                problems.append(f"the {word} {_shown(paths[0])} {reason}")
        companions.append(found)
    if missing:
        problems.append(
            f"{len(missing)} photos have no {word} in {_shown(folder)}: {listed(missing, len(missing))}; "
            "add files of the same names, such as dog.png for dog.jpg"
        )
    return companions, problems


def check_proportions(size: tuple[int, int], photo: Photo) -> None:
    """Check that a file of this width and height (px) lies over its photo.

    Raises:
        UnusableFileError: it has other proportions.
    """
    width, height = size
    if abs(width * photo.height - height * photo.width) > max(width, height, photo.width, photo.height):
        raise UnusableFileError(
            f"has {width} × {height} px, and its photo {photo.width} × {photo.height} px; "
            "save it at the photo's size"
        )


def _shown(path: str | Path) -> str:
    return printable(path.name if isinstance(path, Path) else path, NAME_LIMIT)
