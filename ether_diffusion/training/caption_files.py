"""Captions as people keep them: text files beside the photos, metadata.jsonl and metadata.csv."""

import csv
import io
import posixpath
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ether_diffusion.strict_json import Json, parse_json
from ether_diffusion.training.plain_files import NAME_LIMIT, UnusableFileError, read_plain_file
from ether_diffusion.wording import listed, printable

SIDECAR_SUFFIXES = (".txt", ".caption")
TEXT_COLUMNS = ("text", "caption", "prompt")
FILE_COLUMN = "file_name"
MAX_SIDECAR_BYTES = 64 * 2**10
MAX_METADATA_BYTES = 64 * 2**20

_MARKS = (  # UTF-32's mark opens with UTF-16's
    (b"\xef\xbb\xbf", "utf-8"),
    (b"\xff\xfe\x00\x00", "utf-32-le"),
    (b"\x00\x00\xfe\xff", "utf-32-be"),
    (b"\xff\xfe", "utf-16-le"),
    (b"\xfe\xff", "utf-16-be"),
)


@dataclass(frozen=True)
class FoundCaption:
    """A text, the name it belongs to (a photo's, or without suffix a sidecar's), and where it stands."""

    name: str
    text: str
    source: str
    is_sidecar: bool

    @property
    def shown(self) -> str:
        """The source, escaped."""
        return printable(self.source, NAME_LIMIT)


def decode_text(data: bytes) -> str:
    """Decode UTF-8, or what a byte order mark says, with line ends made one newline.

    Raises:
        UnusableFileError: it is something else; the message has the first offending byte's offset.
    """
    mark, encoding = next((pair for pair in _MARKS if data.startswith(pair[0])), (b"", "utf-8"))
    try:
        text = data[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        offset = len(mark) + error.start
        raise UnusableFileError(
            f"is not {encoding.upper()}: byte 0x{data[offset]:02x} at offset {offset}; save it as UTF-8"
        ) from None
    if "\0" in text:
        offset = data.index(b"\0", len(mark))
        raise UnusableFileError(f"is not plain text: byte 0x00 at offset {offset}; save it as UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_caption_files(
    files: Mapping[str, Path], inside: Path | None
) -> tuple[list[FoundCaption], list[str]]:
    """Return all captions among files by their names, and a sentence for each that cannot be read.

    Names have the subfolders that the files lie in; rows name photos from where their file lies.
    """
    found: list[FoundCaption] = []
    problems: list[str] = []
    for name, path in files.items():
        shown = printable(name, NAME_LIMIT)
        parse = _parser(path)
        if parse is None:
            continue
        try:
            found += parse(path, name, inside)
        except UnusableFileError as reason:
            problems.append(f"{shown} {reason}")
        except ValueError as error:
            problems.append(str(error))
    return found, problems


def _parser(path: Path) -> Callable[[Path, str, Path | None], list[FoundCaption]] | None:
    if path.name.startswith("."):
        return None
    if path.suffix.lower() in SIDECAR_SUFFIXES:
        return _read_sidecar
    return {"metadata.jsonl": _read_jsonl, "metadata.csv": _read_csv}.get(path.name.lower())


def _read_sidecar(path: Path, name: str, inside: Path | None) -> list[FoundCaption]:
    data = read_plain_file(path, inside=inside, max_bytes=MAX_SIDECAR_BYTES)
    return [FoundCaption(name.removesuffix(path.suffix), decode_text(data), name, is_sidecar=True)]


def _read_jsonl(path: Path, name: str, inside: Path | None) -> list[FoundCaption]:
    text = decode_text(read_plain_file(path, inside=inside, max_bytes=MAX_METADATA_BYTES))
    rows: list[FoundCaption] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{name} line {number}"
            row = parse_json(line, where)
            if not isinstance(row, dict):
                raise ValueError(f'{where} is no object; write {{"{FILE_COLUMN}": …, "text": …}}')
            rows += _row(row, where, name)
    return rows


def _read_csv(path: Path, name: str, inside: Path | None) -> list[FoundCaption]:
    text = decode_text(read_plain_file(path, inside=inside, max_bytes=MAX_METADATA_BYTES))
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    rows: list[FoundCaption] = []
    try:
        columns = list(reader.fieldnames or [])
        if len(set(columns)) < len(columns):
            raise ValueError(f"{name} line 1 names a column twice; give each its own name")
        for record in reader:
            where = f"{name} line {reader.line_num}"
            if None in record or None in record.values():
                raise ValueError(f"{where} has another number of fields than line 1; quote texts with commas")
            rows += _row(dict(record), where, name)
    except csv.Error as error:
        number = reader.reader.line_num
        raise ValueError(f"{name} line {number} is not valid CSV ({error}); mend it") from None
    return rows


def _row(row: dict[str, Json], where: str, file: str) -> Iterator[FoundCaption]:
    columns = [column for column in TEXT_COLUMNS if column in row]
    if FILE_COLUMN not in row or len(columns) != 1:
        raise ValueError(
            f"{where} has the fields {listed(row) or 'of none'}; "
            f"needed are {FILE_COLUMN} and one of {', '.join(TEXT_COLUMNS)}"
        )
    name, text = row[FILE_COLUMN], row[columns[0]]
    if not isinstance(name, str) or not isinstance(text, str):
        raise ValueError(f"{where} holds something else than text; write both fields in quotes")
    named = posixpath.join(posixpath.dirname(file), name.removeprefix("./"))
    yield FoundCaption(named, text, where, is_sidecar=False)


def match_captions(
    found: list[FoundCaption], photo_names: Sequence[str]
) -> tuple[dict[str, list[FoundCaption]], list[str]]:
    """Return the captions of each photo by its name, and warnings on those of no photo or of several.

    A name in another Unicode normalisation counts where there is no exact one, as zip files change it; so
    does one that is written otherwise, as .\\images\\00.png.
    """
    exact, plain = _photos_by_key(photo_names, str), _photos_by_key(photo_names, _plain)
    by_photo: dict[str, list[FoundCaption]] = {}
    warnings: list[str] = []
    orphans: list[str] = []
    for caption in found:
        kind, name = caption.is_sidecar, caption.name
        owners = exact.get((kind, name)) or plain.get((kind, _plain(name)), [])
        for owner in owners:
            by_photo.setdefault(owner, []).append(caption)
        if not owners:
            orphans.append(caption.source if caption.is_sidecar else f"{caption.name} ({caption.source})")
        if len(owners) > 1:
            warnings.append(f"{caption.shown} is the caption of {len(owners)} photos: {listed(owners)}")
    if orphans:
        warnings.append(f"{len(orphans)} captions belong to no usable photo: {listed(orphans)}")
    return by_photo, warnings


def _photos_by_key(names: Sequence[str], form: Callable[[str], str]) -> dict[tuple[bool, str], list[str]]:
    """Map (is_sidecar, name) to photos: a row names the whole file, a sidecar that or its stem."""
    by_key: dict[tuple[bool, str], list[str]] = {}
    for name in names:
        stem = str(PurePosixPath(name).with_suffix(""))
        for key in {(False, form(name)), (True, form(name)), (True, form(stem))}:
            by_key.setdefault(key, []).append(name)
    return by_key


def _plain(name: str) -> str:
    return posixpath.normpath(unicodedata.normalize("NFC", name).replace("\\", "/"))
