"""What visitors send: files and zips of them, and photos, decoded and copied by us."""

import re
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from PIL import Image

from ether_diffusion.console import give_memory_back
from ether_diffusion.training.captions import read_caption_files
from ether_diffusion.training.decoding import decode_bytes
from ether_diffusion.training.photos import check_photo, find_likes, look_at
from ether_diffusion.training.plain_files import UnusableFileError, read_plain_file
from ether_diffusion.training.zip_files import MAX_BYTES, Wanted, is_archive, read_zip
from ether_diffusion.ui.outputs import plain_png
from ether_diffusion.ui.words import disk_explained, picture_address
from ether_diffusion.wording import printable

MAX_PHOTOS, MAX_PHOTO_BYTES, MAX_TOTAL_BYTES = 200, 64 * 2**20, 2**30  # of one subject
MAX_PIXELS = 50_000_000  # of a picture that is decoded whole; a JPEG of a phone's 108 million is not
SIDE = 256  # longer side of a thumbnail's file, in px
_CAPTIONS = (".txt", ".caption", "metadata.jsonl", "metadata.csv")
_KEPT_SECONDS, _THUMBNAILS = 24 * 3600, "thumbnails"
_FOLDER, _CROP = re.compile(r"[0-9a-f]{16}"), "-crop"
_FILE = re.compile(rf"photo-\d{{3}}({_CROP})?(\.[a-z0-9]{{1,6}})?", re.ASCII)


def read_sent(path: Path, wanted: Wanted = lambda name: True) -> dict[str, bytes]:
    """Return what a visitor sent as one file: itself by its name, or the files in an archive by theirs."""
    data = read_plain_file(path, inside=path.parent, max_bytes=MAX_BYTES)
    return read_zip(data, wanted) if is_archive(data) else {path.name: data}


def thumbnail_png(data: bytes, suffix: str) -> bytes:
    """Return a small PNG of a picture that was uploaded or drawn, decoded under our limits."""
    small = decode_bytes(data, suffix, min_side=1, max_pixels=MAX_PIXELS, target_side=SIDE).rgb
    small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return plain_png(small)


def data_address(path: Path, side: int) -> str | None:
    """Return a picture of ours, `side` px at most, as a data address; None if gone or half written."""
    try:
        status = path.stat()
        return _encoded(path, side, status.st_mtime_ns, status.st_size)
    except OSError:  # Pillow's errors on damaged files are among these
        return None


@lru_cache(maxsize=512)
def _encoded(path: Path, side: int, time: int, size: int) -> str:
    with Image.open(path) as image:
        small = image.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    return picture_address(small, "WEBP", quality=85)


@dataclass(frozen=True)
class Accepted:
    """A photo that can be used: its name for people, escaped, our copy, what is notable, its caption."""

    name: str
    path: Path
    note: str
    caption: str = ""

    @property
    def thumbnail(self) -> Path:
        """Our thumbnail of it."""
        return self.path.parent / _THUMBNAILS / f"{self.path.stem}.png"

    @property
    def kept(self) -> list[str]:
        """What the browser keeps of it: our folder, our file, its name for people, remark and caption."""
        return [self.path.parent.name, self.path.name, self.name, self.note, self.caption]


class Refused(NamedTuple):
    """A file that is not used, by its escaped name, and why."""

    name: str
    reason: str


def take_photos(
    paths: Sequence[Path], folder: Path, earlier: Sequence[Accepted] = ()
) -> tuple[list[Accepted], list[Refused]]:
    """Copy what can be used of photos and zips of photos, but for `earlier` ones, into a new folder."""
    own, accepted, refused = folder / secrets.token_hex(8), list[Accepted](), list[Refused]()
    texts, total = dict[str, bytes](), sum(photo.path.stat().st_size for photo in earlier)
    known = {photo.thumbnail.read_bytes(): photo.name for photo in earlier}
    with disk_explained(folder, "taking the photos"):
        for old in folder.glob("*"):  # that nobody has trained on for a day
            with suppress(OSError):  # another visitor may have
                if time.time() - old.stat().st_mtime > _KEPT_SECONDS:
                    shutil.rmtree(old)
        (own / _THUMBNAILS).mkdir(parents=True, mode=0o700)
        try:
            for name, data in _files(paths):
                if name.endswith(_CAPTIONS) and isinstance(data, bytes):
                    texts[name] = data
                    continue
                try:
                    if isinstance(data, UnusableFileError):
                        raise data
                    _check_room(len(data), len(earlier) + len(accepted) + 1, total + len(data))
                    suffix, number = Path(name).suffix.lower(), len(accepted) + 1
                    kept, small = _checked(name, own / f"photo-{number:03d}{suffix}", data)
                    if small in known:
                        same = f"is the same picture as {known[small]}, which was added before"
                        raise UnusableFileError(same)
                except UnusableFileError as reason:
                    refused.append(Refused(printable(name), str(reason)))
                    continue
                _write_photo(kept, small, data)
                accepted.append(kept)
                total += len(data)
            photos = [*earlier, *accepted]
            for number, first in find_likes([_look(photo) for photo in photos]).items():
                like = f"looks like {photos[first].name}, perhaps turned or saved again, and counts twice"
                if (place := number - len(earlier)) >= 0:
                    notes = filter(None, (accepted[place].note, like))
                    accepted[place] = replace(accepted[place], note="; ".join(notes))
            accepted, orphans = _captioned(accepted, texts, own / "captions")
        except BaseException:
            shutil.rmtree(own, ignore_errors=True)
            raise
        finally:
            give_memory_back()
    return accepted, refused + orphans


def crop_photo(photo: Accepted, side: float, across: float, down: float) -> Accepted:
    """Return a photo with the square alone that is cut from the whole one, or with all of it at a side of 1.

    Side is a share of the shorter side; across and down say where in what is left, from 0 to 1.
    """
    whole = _whole(photo)
    path = whole if side >= 1 else whole.with_name(f"{whole.stem}{_CROP}.png")
    try:
        data = read_plain_file(whole, inside=whole.parent, max_bytes=MAX_PHOTO_BYTES)
        if side < 1:
            decoded = decode_bytes(data, whole.suffix, max_pixels=MAX_PIXELS, target_side=2048)
            width, height = decoded.rgb.size
            px = round(min(width, height) * side)
            left, top = (round((of - px) * at) for of, at in ((width, across), (height, down)))
            image = decoded.rgb if decoded.mask is None else decoded.rgb.copy()
            if decoded.mask is not None:
                image.putalpha(decoded.mask)
            data = plain_png(image.crop((left, top, left + px, top + px)))
        kept, small = _checked(photo.name, path, data)
    except UnusableFileError as reason:
        raise ValueError(f"{photo.name} {reason}") from None
    finally:
        give_memory_back()
    with disk_explained(path.parent, "cropping the photo"):
        _write_photo(kept, small, data)
    return replace(kept, name=photo.name, caption=photo.caption)


def shares_of(photo: Accepted, side: float) -> tuple[float, float]:
    """Return the shares of a whole photo's width and height that a square of this side has."""
    with Image.open(replace(photo, path=_whole(photo)).thumbnail) as image:
        width, height = image.size
    return side * min(width, height) / width, side * min(width, height) / height


def whole_address(photo: Accepted, side: int) -> str | None:
    """Return the whole photo, whatever is cut from it, as a data address."""
    return data_address(replace(photo, path=_whole(photo)).thumbnail, side)


def _whole(photo: Accepted) -> Path:
    stem = photo.path.stem.removesuffix(_CROP)
    return next(path for path in sorted(photo.path.parent.glob(f"{stem}*")) if path.stem == stem)


def _checked(name: str, path: Path, data: bytes) -> tuple[Accepted, bytes]:
    """Return a photo that can be used, to be written to a path, with its thumbnail's bytes."""
    notes = check_photo(Path(name), data, max_pixels=MAX_PIXELS).notes
    path = path if _FILE.fullmatch(path.name) else path.with_suffix("")
    return Accepted(printable(name), path, "; ".join(notes)), thumbnail_png(data, path.suffix)


def _look(photo: Accepted) -> bytes:
    with Image.open(photo.thumbnail) as image:
        return look_at(image.convert("RGB"))[0]


def _write_photo(photo: Accepted, small: bytes, data: bytes) -> None:
    photo.thumbnail.write_bytes(small)
    photo.path.write_bytes(data)


def _captioned(
    photos: Sequence[Accepted], texts: dict[str, bytes], folder: Path
) -> tuple[list[Accepted], list[Refused]]:
    """Give photos the captions that were sent with them; those of no photo are refused."""
    folder.mkdir()
    for name, data in texts.items():
        (folder / name).write_bytes(data)
    found, problems = read_caption_files(folder)
    shutil.rmtree(folder)
    words = {printable(caption.name): " ".join(caption.text.split()) for caption in found}
    names = ((photo.name, str(PurePosixPath(photo.name).with_suffix(""))) for photo in photos)
    own = [next((name for name in either if name in words), "") for either in names]
    captioned = [replace(photo, caption=words.get(name, "")) for photo, name in zip(photos, own, strict=True)]
    refused = [Refused("captions", problem) for problem in problems]
    lone = "has a caption, and no photo of this name was sent with it"
    files = {printable(n): source if source.startswith(n) else n for n, _, source in found}
    return captioned, refused + [Refused(printable(files[name]), lone) for name in words if name not in own]


def _files(paths: Sequence[Path]) -> Iterator[tuple[str, bytes | UnusableFileError]]:
    """Give each file, or why there is none, by its name; archives give what is in them, without folders."""
    for path in paths:
        try:
            for name, data in read_sent(path).items():
                yield PurePosixPath(name).name, data
        except UnusableFileError as reason:
            yield path.name, reason


def _check_room(num_bytes: int, num_photos: int, total: int) -> None:
    problems = {
        f"more than {MAX_PHOTO_BYTES / 2**20:g} MiB; give a smaller file": num_bytes > MAX_PHOTO_BYTES,
        f"more than {MAX_PHOTOS} photos before it; leave some out": num_photos > MAX_PHOTOS,
        f"more than {MAX_TOTAL_BYTES / 2**20:g} MiB with the others; leave some out": total > MAX_TOTAL_BYTES,
    }
    for problem in (words for words, is_one in problems.items() if is_one):
        raise UnusableFileError(f"has {problem}")


def recall_photos(kept: object, folder: Path) -> list[Accepted]:
    """Return the photos that a browser says it added, if they are copies of ours that are still there."""
    found = []
    for each in kept[:MAX_PHOTOS] if isinstance(kept, list) else []:
        if isinstance(each, list) and len(each) in (4, 5) and all(isinstance(word, str) for word in each):
            own, file, *words = each
            name, note = (printable(text, 300) for text in words[:2])
            photo = Accepted(name, folder / own / file, note, " ".join("".join(words[2:]).split()))
            is_ours = _FOLDER.fullmatch(own) and _FILE.fullmatch(file)
            if is_ours and photo.path.is_file() and photo.thumbnail.is_file():
                found.append(photo)
    return found
