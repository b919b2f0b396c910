"""From captions as people keep them to prompts: one for every photo, dropping nobody's words in silence.

A photo's caption is its text file (`a.txt`, `a.caption` or `a.jpg.txt` for `a.jpg`), its row in
metadata.jsonl or metadata.csv, or its cell of a data set. Several that say the same are fine; where they
differ, it is an error. A photo without one gets the words of its folder, where that is called like
`10_sks dog`, or else the instance prompt. Then the template is filled: `{caption}` by any of these, and
`{token}`, also inside captions, by the trigger word.
"""

import csv
import hashlib
import io
import posixpath
import re
import unicodedata
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pydantic import ConfigDict, model_validator

from ether_diffusion.strict_json import Json, StrictModel, read_json, validate
from ether_diffusion.training.photos import Photo
from ether_diffusion.training.plain_files import NAME_LIMIT, UnusableFileError, find_files, read_plain_file
from ether_diffusion.wording import listed, printable

MAX_CHARACTERS = 10_000
TEXT_COLUMNS = ("text", "caption", "prompt")
FILE_COLUMN = "file_name"
MAX_TEXT_BYTES, MAX_METADATA_BYTES = 64 * 2**10, 64 * 2**20

_MARKS = (  # UTF-32's mark opens with UTF-16's
    (b"\xef\xbb\xbf", "utf-8"),
    (b"\xff\xfe\x00\x00", "utf-32-le"),
    (b"\x00\x00\xfe\xff", "utf-32-be"),
    (b"\xff\xfe", "utf-16-le"),
    (b"\xfe\xff", "utf-16-be"),
)
_JOINERS = "\u200c\u200d"
"""Invisible, and right in Persian, Indic scripts and emoji."""


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


# captions as they are found


@dataclass(frozen=True)
class FoundCaption:
    """A text, and where it stands; `name` is its photo's, or its text file's without suffix."""

    name: str
    text: str
    source: str
    is_text_file: bool = False


class CaptionRow(StrictModel):
    """A row of metadata.jsonl or metadata.csv, as the `datasets` library writes them; the rest is ignored."""

    model_config = ConfigDict(extra="ignore")

    file_name: str
    text: str = ""
    caption: str = ""
    prompt: str = ""

    @model_validator(mode="before")
    @classmethod
    def _check_fields(cls, row: object) -> object:
        if isinstance(row, dict) and (FILE_COLUMN not in row or len(row.keys() & set(TEXT_COLUMNS)) != 1):
            needed = f"{FILE_COLUMN} and one of {', '.join(TEXT_COLUMNS)}"
            raise ValueError(f"has the fields {listed(row) or 'of none'}; needed are {needed}")
        return row


def read_caption_files(
    folder: str | Path, *, follow_symlinks: bool = False, without: Collection[Path] = ()
) -> tuple[list[FoundCaption], list[str]]:
    """Return all captions in a folder and below, and a sentence for each file that cannot be read.

    Rows name photos from where their file lies. Folders `without` are left out.
    """
    inside = None if follow_symlinks else Path(folder)
    found: list[FoundCaption] = []
    problems: list[str] = []
    files = find_files(folder, "the captions", without=without, follow_symlinks=follow_symlinks).files
    for name, path in files.items():
        kind, shown = path.name.lower(), printable(name, NAME_LIMIT)
        is_text_file = path.suffix.lower() in (".txt", ".caption") and not kind.startswith(".")
        if not is_text_file and kind not in ("metadata.jsonl", "metadata.csv"):
            continue
        try:
            limit = MAX_TEXT_BYTES if is_text_file else MAX_METADATA_BYTES
            text = decode_text(read_plain_file(path, inside=inside, max_bytes=limit))
            if is_text_file:
                found.append(FoundCaption(name.removesuffix(path.suffix), text, name, is_text_file=True))
                continue
            for where, row in (_json_rows if kind.endswith("l") else _csv_rows)(text, shown):
                photo = posixpath.join(posixpath.dirname(name), row.file_name.removeprefix("./"))
                found.append(FoundCaption(photo, row.text or row.caption or row.prompt, where))
        except UnusableFileError as reason:
            problems.append(f"{shown} {reason}")
        except ValueError as error:
            problems.append(str(error))
    return found, problems


def _json_rows(text: str, file: str) -> Iterator[tuple[str, CaptionRow]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{file} line {number}"
            yield where, read_json(line, CaptionRow, where)


def _csv_rows(text: str, file: str) -> Iterator[tuple[str, CaptionRow]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        columns = list(reader.fieldnames or [])
        if len(set(columns)) < len(columns):
            raise ValueError(f"{file} line 1 names a column twice; give each its own name")
        for record in reader:
            where = f"{file} line {reader.line_num}"
            if None in record or None in record.values():
                raise ValueError(f"{where} has another number of fields than line 1; quote texts with commas")
            row: dict[str, Json] = dict(record)
            yield where, validate(row, CaptionRow, where)
    except csv.Error as error:
        number = reader.reader.line_num
        raise ValueError(f"{file} line {number} is not valid CSV ({error}); mend it") from None


def _match(
    found: Sequence[FoundCaption], photo_names: Sequence[str]
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
        kind, name = caption.is_text_file, caption.name
        owners = exact.get((kind, name)) or plain.get((kind, _plain(name)), [])
        for owner in owners:
            by_photo.setdefault(owner, []).append(caption)
        if not owners:
            orphans.append(caption.source if kind else f"{name} ({caption.source})")
        if len(owners) > 1:
            source = printable(caption.source, NAME_LIMIT)
            warnings.append(f"{source} is the caption of {len(owners)} photos: {listed(owners)}")
    if orphans:
        warnings.append(f"{len(orphans)} captions belong to no usable photo: {listed(orphans)}")
    return by_photo, warnings


def _photos_by_key(names: Sequence[str], form: Callable[[str], str]) -> dict[tuple[bool, str], list[str]]:
    """Map (is_text_file, name) to photos: a row names the whole file, a text file that or its stem."""
    by_key: dict[tuple[bool, str], list[str]] = {}
    for name in names:
        stem = str(PurePosixPath(name).with_suffix(""))
        for key in {(False, form(name)), (True, form(name)), (True, form(stem))}:
            by_key.setdefault(key, []).append(name)
    return by_key


def _plain(name: str) -> str:
    return posixpath.normpath(unicodedata.normalize("NFC", name).replace("\\", "/"))


# from captions to prompts


@dataclass(frozen=True)
class Caption:
    """What a photo is trained with; `source` is a file, a line of one, or the folder whose name it is.

    It is None for the instance prompt.
    """

    photo: Photo
    prompt: str
    source: str | None


@dataclass(frozen=True)
class Captions:
    """One caption per photo, in the photos' order; `num_fallbacks` of them are the instance prompt."""

    captions: tuple[Caption, ...]
    num_fallbacks: int
    warnings: tuple[str, ...]

    def fingerprint(self) -> dict[str, str]:
        """Return the SHA-256 of each prompt by its photo's file, fit for JSON and `compare_fingerprints`."""
        return {
            f"prompt of {each.photo.shown}": hashlib.sha256(
                each.prompt.encode("utf-8", "surrogatepass")
            ).hexdigest()
            for each in self.captions
        }


@dataclass(frozen=True)
class PromptRules:
    """How a caption becomes a prompt. In captions, braces other than those of `{token}` are plain text.

    Raises:
        ValueError: a text is empty, too long, or asks for what there is not.
    """

    instance_prompt: str | None
    token: str | None
    template: str

    def __post_init__(self) -> None:
        texts = {"instance prompt": self.instance_prompt, "token": self.token, "template": self.template}
        for name, text in texts.items():
            if text is not None and not text.strip():
                raise ValueError(f"the {name} is empty; leave it out or write one")
            if text is not None and len(text) > MAX_CHARACTERS:
                raise ValueError(f"the {name} has {len(text)} characters; at most {MAX_CHARACTERS} are read")
        unknown = set(re.findall(r"\{\w*\}", self.template)) - {"{token}", "{caption}"}
        if unknown:
            raise ValueError(f"the template has {listed(sorted(unknown))}; use {{token}} and {{caption}}")

    def fill(self, caption: str) -> str:
        """Return the prompt."""
        prompt = self.template.replace("{caption}", caption)
        return prompt if self.token is None else prompt.replace("{token}", self.token)

    def problems(self, caption: str, source: str) -> Iterator[str]:
        """Say why a caption makes no prompt, in a sentence that names its source."""
        prompt = self.fill(caption)
        if not caption and "{caption}" in self.template:
            yield f"{source} has no caption, and there is no instance prompt; write either"
        elif self.token is None and "{token}" in prompt:
            yield f"{source} asks for {{token}}, and none is given; give the trigger word as token"
        elif len(prompt) > MAX_CHARACTERS:
            yield f"{source} makes a prompt of {len(prompt)} characters; at most {MAX_CHARACTERS} are read"

    def lacks_token(self, prompt: str) -> bool:
        """Say whether the trigger word is not in a prompt."""
        if self.token is None:
            return False
        return re.search(rf"(?<!\w){re.escape(self.token)}(?!\w)", prompt, re.IGNORECASE) is None


def read_captions(
    folder: str | Path,
    photos: Sequence[Photo],
    *,
    instance_prompt: str | None = None,
    token: str | None = None,
    template: str = "{caption}",
    follow_symlinks: bool = False,
    without: Collection[Path] = (),
) -> Captions:
    """Find each photo's caption in the folder or below and make its prompt; nothing is written.

    Folders `without` are left out.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: texts that cannot be read, contradict each other, are missing or too long; all are listed.
    """
    rules = PromptRules(instance_prompt, token, template)
    found, problems = read_caption_files(folder, follow_symlinks=follow_symlinks, without=without)
    return caption_photos(found, photos, rules, problems=problems, where=printable(folder, NAME_LIMIT))


def caption_photos(
    found: Sequence[FoundCaption],
    photos: Sequence[Photo],
    rules: PromptRules,
    *,
    problems: Sequence[str] = (),
    where: str,
) -> Captions:
    """Make each photo's prompt of the captions found in `where`; `problems` are those of finding them.

    Raises:
        ValueError: texts that contradict each other, are missing or too long; all are listed.
    """
    problems = list(problems)
    by_photo, warnings = _match(found, [photo.name for photo in photos])
    captions: list[Caption] = []
    for photo in photos:
        texts = {" ".join(each.text.split()): each.source for each in by_photo.get(photo.name, [])}
        texts.pop("", None)
        if len(texts) > 1:
            sides = (f'"{printable(text)}" in {printable(file, NAME_LIMIT)}' for text, file in texts.items())
            problems.append(f"{photo.shown} has different captions, {' and '.join(sides)}; keep one")
            continue
        named = photo.named_repeats
        fallback = (rules.instance_prompt or "", None) if named is None else (named[1], named[2])
        text, source = next(iter(texts.items()), fallback)
        problems += rules.problems(text, printable(source or photo.name, NAME_LIMIT))
        captions.append(Caption(photo, rules.fill(text), source))
    if problems:
        reasons = ";\n  ".join(problems)
        raise ValueError(f"captions in {where} cannot be used:\n  {reasons}")
    remarks = (*warnings, *_remarks_on_files(found), *_remarks(captions, rules, has_files=bool(found)))
    return Captions(tuple(captions), sum(each.source is None for each in captions), remarks)


def _remarks_on_files(found: Sequence[FoundCaption]) -> Iterator[str]:
    empty = [caption.source for caption in found if not caption.text.strip()]
    if empty:
        yield f"{listed(empty)}: empty; the instance prompt stands in"
    several = [caption.source for caption in found if "\n" in caption.text.strip()]
    if several:
        yield f"{listed(several)}: of several lines, which are read as one caption"


def _remarks(captions: Sequence[Caption], rules: PromptRules, *, has_files: bool) -> Iterator[str]:
    yield from _remarks_on_folders(captions, rules)
    own = [caption for caption in captions if caption.source is not None]
    missing = [caption.photo.name for caption in captions if caption.source is None]
    if missing and (own or has_files):
        share = f"{len(missing)} of {len(captions)} photos"
        yield f"{share} have no caption and get the instance prompt: {listed(missing)}"
    if own and "{caption}" not in rules.template:
        yield f"the template has no {{caption}}, so that the captions of {len(own)} photos are not used"
    lacking = [caption.photo.name for caption in captions if rules.lacks_token(caption.prompt)]
    if lacking:
        share = f"{len(lacking)} of {len(captions)} prompts"
        yield f'the trigger word "{printable(rules.token)}" is absent from {share}: {listed(lacking)}'
    for prompt in dict.fromkeys(caption.prompt for caption in captions):
        if any(not (c.isprintable() or c in _JOINERS) for c in prompt):
            yield f'a prompt has characters that cannot be seen: "{printable(prompt)}"'


def _remarks_on_folders(captions: Sequence[Caption], rules: PromptRules) -> Iterator[str]:
    for named in dict.fromkeys(each.photo.named_repeats for each in captions):
        if named is None:
            continue
        repeats, words, folder = named
        inside = [each for each in captions if each.photo.named_repeats == named]
        found = f"{printable(folder)}, as its name says: {len(inside)} photos, {repeats} times an epoch each"
        missing = sum(caption.source == folder for caption in inside)
        if missing:
            instead = "" if rules.instance_prompt is None else " instead of the instance prompt"
            found += f'; {missing} without a caption get "{printable(words)}"{instead}'
        yield found
