"""Folders of photos in tests: nothing on disk may change by looking at them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import photo_files
import pytest

from ether_diffusion.training.photos import PhotoFolder, find_photos


def fill(folder: Path, **files: bytes) -> None:
    for name, data in files.items():
        stem, _, suffix = name.rpartition("_")
        (folder / f"{stem}.{suffix}").write_bytes(data)


def check(folder: Path, **options: bool | int) -> PhotoFolder:
    before = photo_files.snapshot(folder.parent)
    found = find_photos(folder, **options)  # type: ignore[arg-type]
    assert photo_files.snapshot(folder.parent) == before
    return found


def failure(folder: Path | str, **options: bool | int) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        find_photos(folder, **options)  # type: ignore[arg-type]
    return str(caught.value)


def refusals(folder: Path, **options: bool | int) -> list[str]:
    """What is said of the bad files beside one good photo."""
    fill(folder, zz_png=photo_files.photo(seed=99))
    found = check(folder, **options)
    assert [photo.path.name for photo in found.photos] == ["zz.png"]
    return [refusal.sentence for refusal in found.refused]


@contextmanager
def without_rights() -> Iterator[None]:
    """Root may read everything, so that it becomes nobody for a while."""
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)
