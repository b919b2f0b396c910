"""The photos that a visitor has added so far: noted in their browser, kept in a folder of ours for a day."""

import re
from collections.abc import Sequence
from pathlib import Path

from ether_diffusion.ui.uploads import MAX_PHOTOS, THUMBNAILS, Accepted, IntakeReport, Refused
from ether_diffusion.wording import printable

Note = list[str]
"""A photo as the browser keeps it: our folder, our file, its name for people, the remark on it."""
_FOLDER = re.compile(r"[0-9a-f]{16}")
_FILE = re.compile(r"photo-\d{3}(\.[a-z0-9]{1,6})?", re.ASCII)
_MAX_CHARACTERS = 300


def note_photos(photos: Sequence[Accepted]) -> list[Note]:
    """Return photos as the browser keeps them."""
    return [[photo.path.parent.name, photo.path.name, photo.name, photo.note] for photo in photos]


def recall_photos(kept: object, folder: Path) -> list[Accepted]:
    """Return the photos that a browser says it added, as far as they still are in `folder`.

    Whatever it says, nothing but our own copies is reached.
    """
    found = []
    for each in kept[:MAX_PHOTOS] if isinstance(kept, list) else []:
        photo = _recalled(each, folder)
        if photo is not None and photo.path.is_file() and photo.thumbnail.is_file():
            found.append(photo)
    return found


def _recalled(kept: object, folder: Path) -> Accepted | None:
    if not isinstance(kept, list) or len(kept) != 4 or not all(isinstance(word, str) for word in kept):
        return None
    own, file, name, note = kept
    if not _FOLDER.fullmatch(own) or not _FILE.fullmatch(file):
        return None
    path = folder / own / file
    thumbnail = path.parent / THUMBNAILS / f"{path.stem}.png"
    return Accepted(printable(name, _MAX_CHARACTERS), path, thumbnail, printable(note, _MAX_CHARACTERS))


def add_photos(earlier: Sequence[Accepted], report: IntakeReport) -> IntakeReport:
    """Add photos to those that are there already; what is there is not taken again."""
    photos, refused = list(earlier), list(report.refused)
    known = {photo.thumbnail.read_bytes(): photo.name for photo in earlier}
    for photo in report.accepted:
        other = known.get(photo.thumbnail.read_bytes())
        if other is not None:
            refused.append(Refused(photo.name, f"is the same picture as {other}, which was added before"))
        elif len(photos) >= MAX_PHOTOS:
            refused.append(Refused(photo.name, f"is more than the {MAX_PHOTOS} photos that are taken"))
        else:
            photos.append(photo)
    return IntakeReport(tuple(photos), tuple(refused))
