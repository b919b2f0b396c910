"""From captions as people keep them to prompts: one for every photo, dropping nobody's words in silence.

A photo's caption is its text file (`a.txt`, `a.caption` or `a.jpg.txt` for `a.jpg`), its row in
metadata.jsonl or metadata.csv, or its cell of a data set. Several that say the same are fine; where they
differ, it is an error. A photo without one gets the words of its folder, where that is called like
`10_sks dog`, or else the instance prompt. Then the template is filled: `{caption}` by any of these, and
`{token}`, also inside captions, by the trigger word.
"""

import csv
import io
import posixpath
import re
import unicodedata
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Protocol

from pydantic import ConfigDict, model_validator

from ether_diffusion.strict_json import Json, StrictModel, read_json, validate
from ether_diffusion.training.config import DataConfig
from ether_diffusion.training.photos import Findings, Photo
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
_UNBOUNDED = 100_000
"""transformers gives a tokenizer that names no limit a limit of about 1e30."""
_WHOLE_LANGUAGE = 30_000
"""Byte-pair vocabularies stand in the order of merging, common words first; in those learned from a smaller
world, rank says little."""
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

    @property
    def words(self) -> str:
        """The caption, under whichever name."""
        return self.text or self.caption or self.prompt

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
            for where, row in (json_rows if kind.endswith("l") else _csv_rows)(text, shown):
                photo = posixpath.join(posixpath.dirname(name), row.file_name.removeprefix("./"))
                found.append(FoundCaption(photo, row.words, where))
        except UnusableFileError as reason:
            problems.append(f"{shown} {reason}")
        except ValueError as error:
            problems.append(str(error))
    return found, problems


def json_rows(text: str, file: str) -> Iterator[tuple[str, CaptionRow]]:
    """Give the rows of metadata.jsonl, each with where it stands; a line that is none raises a ValueError."""
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
    found: Sequence[FoundCaption], photo_names: Sequence[str], warnings: list[str]
) -> dict[str, list[FoundCaption]]:
    """Return the captions of each photo by its name, and warn of those of no photo or of several.

    A name in another Unicode normalisation counts where there is no exact one, as zip files change it; so
    does one that is written otherwise, as .\\images\\00.png.
    """
    exact, plain = _photos_by_key(photo_names, str), _photos_by_key(photo_names, _plain)
    by_photo: dict[str, list[FoundCaption]] = {}
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
    return by_photo


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


def caption_photos(
    photos: Sequence[Photo],
    found: Sequence[FoundCaption],
    problems: Sequence[str],
    data: DataConfig,
    findings: Findings,
    *,
    where: str,
) -> list[Photo]:
    """Give each photo the prompt that its caption makes; `problems` are those of finding them in `where`.

    In captions, braces other than those of `{token}` are plain text.

    Raises:
        ValueError: texts that contradict each other, are missing or too long; all are listed.
    """
    problems = list(problems)
    by_photo = _match(found, [photo.name for photo in photos], findings.warnings)
    captioned: list[Photo] = []
    sources: list[str | None] = []
    for photo in photos:
        texts = {" ".join(each.text.split()): each.source for each in by_photo.get(photo.name, [])}
        texts.pop("", None)
        if len(texts) > 1:
            sides = (f'"{printable(text)}" in {printable(file, NAME_LIMIT)}' for text, file in texts.items())
            problems.append(f"{photo.shown} has different captions, {' and '.join(sides)}; keep one")
            continue
        named = photo.named_repeats
        fallback = (data.instance_prompt or "", None) if named is None else (named[1], named[2])
        text, source = next(iter(texts.items()), fallback)
        prompt = data.caption_template.replace("{caption}", text)
        prompt = prompt if data.token is None else prompt.replace("{token}", data.token)
        shown = printable(source or photo.name, NAME_LIMIT)
        if not text and "{caption}" in data.caption_template:
            problems.append(f"{shown} has no caption, and there is no instance prompt; write either")
        elif data.token is None and "{token}" in prompt:
            problems.append(f"{shown} asks for {{token}}, and none is given; give the trigger word as token")
        elif len(prompt) > MAX_CHARACTERS:
            long = f"{len(prompt)} characters; at most {MAX_CHARACTERS} are read"
            problems.append(f"{shown} makes a prompt of {long}")
        captioned.append(replace(photo, prompt=prompt))
        sources.append(source)
    if problems:
        reasons = ";\n  ".join(problems)
        raise ValueError(f"captions in {where} cannot be used:\n  {reasons}")
    findings.warnings += _remarks(captioned, sources, found, data)
    return captioned


def _remarks(
    photos: Sequence[Photo], sources: Sequence[str | None], found: Sequence[FoundCaption], data: DataConfig
) -> Iterator[str]:
    empty = [caption.source for caption in found if not caption.text.strip()]
    if empty:
        yield f"{listed(empty)}: empty; the instance prompt stands in"
    several = [caption.source for caption in found if "\n" in caption.text.strip()]
    if several:
        yield f"{listed(several)}: of several lines, which are read as one caption"
    for named in dict.fromkeys(photo.named_repeats for photo in photos):
        if named is None:
            continue
        repeats, words, folder = named
        inside = [
            source for photo, source in zip(photos, sources, strict=True) if photo.named_repeats == named
        ]
        said = f"{printable(folder)}, as its name says: {len(inside)} photos, {repeats} times an epoch each"
        if folder in inside:
            instead = "" if data.instance_prompt is None else " instead of the instance prompt"
            said += f'; {inside.count(folder)} without a caption get "{printable(words)}"{instead}'
        yield said
    missing = [photo.name for photo, source in zip(photos, sources, strict=True) if source is None]
    num_own = len(photos) - len(missing)
    if missing and (num_own or found):
        share = f"{len(missing)} of {len(photos)} photos"
        yield f"{share} have no caption and get the instance prompt: {listed(missing)}"
    if num_own and "{caption}" not in data.caption_template:
        yield f"the template has no {{caption}}, so that the captions of {num_own} photos are not used"
    word = re.compile(rf"(?<!\w){re.escape(data.token or '')}(?!\w)", re.IGNORECASE)
    lacking = [photo.name for photo in photos if data.token and not word.search(photo.prompt)]
    if lacking:
        share = f"{len(lacking)} of {len(photos)} prompts"
        yield f'the trigger word "{printable(data.token)}" is absent from {share}: {listed(lacking)}'
    for prompt in dict.fromkeys(photo.prompt for photo in photos):
        if any(not (c.isprintable() or c in _JOINERS) for c in prompt):
            yield f'a prompt has characters that cannot be seen: "{printable(prompt)}"'


# from prompts to tokens


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    model_max_length: int

    @property
    def vocab_size(self) -> int: ...

    def encode(self, text: str, *, verbose: bool) -> list[int]: ...

    def decode(self, token_ids: list[int]) -> str: ...


@dataclass(frozen=True)
class PromptCut:
    """A prompt too long for its text encoder; kept and lost are its halves as the tokenizer spells them."""

    kept: str
    lost: str
    num_tokens: int
    max_tokens: int

    def __str__(self) -> str:
        """One sentence that shows the cut."""
        return (
            f"the prompt has {self.num_tokens} tokens and {self.max_tokens} are read: "
            f'"…{printable(self.kept[-60:])}" ✂ "{printable(self.lost)}" is lost; write it shorter'
        )


def find_cut(prompt: str, tokenizer: Tokenizer) -> PromptCut | None:
    """Return where a prompt is cut, None where all of it is read.

    Counts include the tokens that mark start and end, as the text encoder's limit does (77 for CLIP).
    """
    token_ids, limit = tokenizer.encode(prompt, verbose=False), tokenizer.model_max_length
    if limit > _UNBOUNDED or len(token_ids) <= limit:
        return None
    kept, lost = (
        tokenizer.decode(part).strip() for part in (token_ids[1 : limit - 1], token_ids[limit - 1 : -1])
    )
    return PromptCut(kept, lost, len(token_ids), limit)


def doubt_token(token: str, tokenizer: Tokenizer, *, max_tokens: int = 3) -> str | None:
    """Return a warning where a trigger word is long in tokens, or a word that already means something.

    Common is a single token in the first half of a vocabulary of a whole language, as CLIP's.
    """
    token_ids = tokenizer.encode(token, verbose=False)[1:-1]
    shown = printable(token)
    if len(token_ids) > max_tokens:
        return f'the trigger word "{shown}" is read as {len(token_ids)} tokens; use a shorter one'
    vocab_size = tokenizer.vocab_size
    if len(token_ids) == 1 and vocab_size > _WHOLE_LANGUAGE and token_ids[0] < vocab_size // 2:
        return f'the trigger word "{shown}" is common, and its meaning will change; use a rare one like sks'
    return None
