"""From captions as people keep them to prompts: one for every photo, dropping nobody's words in silence.

A photo's caption is its text file (`a.txt`, `a.caption` or `a.jpg.txt` for `a.jpg`), its row in
metadata.jsonl or metadata.csv, or its cell of a data set. Several that say the same are fine; where they
differ, it is an error. A photo without one gets the words of its folder, where that is called like
`10_sks dog`, or else the instance prompt. Then the template is filled: `{caption}` by any of these, and
`{token}`, also inside captions, by the trigger word.
"""

import codecs
import csv
import io
import posixpath
import re
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, NamedTuple

from ether_diffusion.strict_json import Json, parse_json
from ether_diffusion.training.config import DataConfig
from ether_diffusion.training.photos import Photo
from ether_diffusion.training.plain_files import NAME_LIMIT, UnusableFileError, find_files, read_plain_file
from ether_diffusion.wording import listed, printable

if TYPE_CHECKING:
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase as Tokenizer

MAX_CHARACTERS = 10_000
TEXT_COLUMNS = ("text", "caption", "prompt")
MAX_TEXT_BYTES, MAX_METADATA_BYTES = 64 * 2**10, 64 * 2**20
_MARKS = {  # UTF-32's mark opens with UTF-16's
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_UNBOUNDED = 100_000  # transformers gives a tokenizer that names no limit a limit of about 1e30
_WHOLE_LANGUAGE = 30_000  # byte-pair vocabularies have common words first; in smaller ones rank says little
_JOINERS = "\u200c\u200d"  # invisible, and right in Persian, Indic scripts and emoji


def decode_text(data: bytes) -> str:
    """Decode UTF-8, or what a byte order mark says, with line ends made one newline.

    An UnusableFileError says that it is something else, with the first offending byte's offset.
    """
    encoding = next((found for mark, found in _MARKS.items() if data.startswith(mark)), "utf-8-sig")
    try:
        text = data.decode(encoding)
        offset = data.index(b"\0") if "\0" in text else None
    except UnicodeDecodeError as error:
        offset = error.start + len(data) - len(error.object)  # without the mark
    if offset is not None:
        name = encoding.removesuffix("-sig").upper()
        raise UnusableFileError(
            f"is not {name}: byte 0x{data[offset]:02x} at offset {offset}; save it as UTF-8"
        )
    return text.replace("\r\n", "\n").replace("\r", "\n")


class FoundCaption(NamedTuple):
    """A text, and where it stands; `name` is its photo's, or its text file's without suffix."""

    name: str
    text: str
    source: str


def read_caption_files(
    folder: str | Path, *, follow_symlinks: bool = False, without: Collection[Path] = ()
) -> tuple[list[FoundCaption], list[str]]:
    """Return all captions in a folder and below, and a sentence for each file that cannot be read.

    Rows name photos from where their file lies. Folders `without` are left out.
    """
    inside, found, problems = None if follow_symlinks else Path(folder), list[FoundCaption](), list[str]()
    files, _ = find_files(folder, "the captions", without=without, follow_symlinks=follow_symlinks)
    for name, path in files.items():
        kind, shown = path.name.lower(), printable(name, NAME_LIMIT)
        rows = {"metadata.jsonl": json_rows, "metadata.csv": _csv_rows}.get(kind)
        if rows is None and (kind.startswith(".") or not kind.endswith((".txt", ".caption"))):
            continue
        try:
            limit = MAX_METADATA_BYTES if rows else MAX_TEXT_BYTES
            text = decode_text(read_plain_file(path, inside=inside, max_bytes=limit))
            if rows is None:
                found.append(FoundCaption(name.removesuffix(path.suffix), text, name))
                continue
            for where, file_name, words in rows(text, shown):
                photo = posixpath.join(posixpath.dirname(name), file_name.removeprefix("./"))
                found.append(FoundCaption(photo, words, where))
        except UnusableFileError as reason:
            problems.append(f"{shown} {reason}")
        except ValueError as error:
            problems.append(str(error))
    return found, problems


Rows = Iterator[tuple[str, str, str]]
"""Where each row of a file stands, the photo that it names, and its caption."""


def json_rows(text: str, file: str) -> Rows:
    """Give the rows of metadata.jsonl; a line that is none raises a ValueError."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{file} line {number}"
            yield _row(parse_json(line, where), where)


def _csv_rows(text: str, file: str) -> Rows:
    reader = csv.reader(io.StringIO(text), strict=True)
    try:
        columns = next(reader, [])
        for fields in filter(None, reader):
            is_whole = len(fields) == len(columns) == len(set(columns))
            row: Json = dict(zip(columns, fields, strict=True)) if is_whole else [*fields]
            yield _row(row, f"{file} line {reader.line_num}")
    except csv.Error as error:
        raise ValueError(f"{file} line {reader.line_num} is not valid CSV ({error}); mend it") from None


def _row(row: Json, where: str) -> tuple[str, str, str]:
    fields = row if isinstance(row, dict) else {}
    name, texts = fields.get("file_name"), [fields[each] for each in TEXT_COLUMNS if each in fields]
    if isinstance(name, str) and len(texts) == 1 and isinstance(texts[0], str):
        return where, name, texts[0]
    needed = f"file_name and one of {', '.join(TEXT_COLUMNS)}, both texts, and a field for each column"
    raise ValueError(f"{where} needs {needed}; found {printable(row)}")


def _match(
    found: Sequence[FoundCaption], photos: Sequence[Photo], warnings: list[str]
) -> dict[str, list[FoundCaption]]:
    """Return the captions of each photo by its name, and warn of those of no photo or of several.

    They name the photo's file, or it without suffix. A name in another Unicode normalisation counts where
    there is no exact one, as zip files change it; so does one written otherwise, as .\\images\\00.png.
    """
    exact, plain = defaultdict[str, set[str]](set), defaultdict[str, set[str]](set)
    for photo in photos:
        for name in (photo.name, str(PurePosixPath(photo.name).with_suffix(""))):
            exact[name].add(photo.name)
            plain[_plain(name)].add(photo.name)
    by_photo, orphans = defaultdict[str, list[FoundCaption]](list), list[str]()
    for caption in found:
        name, _, source = caption
        owners = sorted(exact.get(name) or plain.get(_plain(name)) or ())
        for owner in owners:
            by_photo[owner].append(caption)
        if not owners:
            orphans.append(source if source.startswith(name) else f"{name} ({source})")
        if len(owners) > 1:
            warnings.append(f"{printable(source)} is the caption of {len(owners)} photos: {listed(owners)}")
    if orphans:
        warnings.append(f"{len(orphans)} captions belong to no usable photo: {listed(orphans)}")
    return by_photo


def _plain(name: str) -> str:
    return posixpath.normpath(unicodedata.normalize("NFC", name).replace("\\", "/"))


def caption_photos(
    photos: Sequence[Photo],
    found: Sequence[FoundCaption],
    data: DataConfig,
    problems: list[str],
    warnings: list[str],
) -> list[Photo]:
    """Give each photo the prompt that its caption makes.

    Texts that contradict each other, are missing or too long are problems. In captions, braces other than
    those of `{token}` are plain text.
    """
    by_photo = _match(found, photos, warnings)
    captioned: list[tuple[Photo, str | None]] = []  # with where the caption stands
    for photo in photos:
        texts = {" ".join(each.text.split()): each.source for each in by_photo[photo.name]}
        texts.pop("", None)
        if len(texts) > 1:
            sides = (f'"{printable(text)}" in {printable(file, NAME_LIMIT)}' for text, file in texts.items())
            problems.append(f"{photo.shown} has different captions, {' and '.join(sides)}; keep one")
        fallback = (
            (data.instance_prompt or "", None) if photo.named_repeats is None else photo.named_repeats[1:]
        )
        text, source = next(iter(texts.items()), fallback)
        prompt = data.caption_template.replace("{caption}", text)
        prompt = prompt if data.token is None else prompt.replace("{token}", data.token)
        shown = printable(source or photo.name, NAME_LIMIT)
        if not text and "{caption}" in data.caption_template:
            problems.append(f"{shown} has no caption, and there is no instance prompt; write either")
        elif data.token is None and "{token}" in prompt:
            problems.append(f"{shown} asks for {{token}}, and none is given; give the trigger word as token")
        elif len(prompt) > MAX_CHARACTERS:
            problems.append(
                f"{shown} makes a prompt of {len(prompt)} characters; at most {MAX_CHARACTERS} are read"
            )
        captioned.append((replace(photo, prompt=prompt), source))
    warnings += _remarks(captioned, found, data)
    return [photo for photo, _ in captioned]


def _remarks(
    photos: Sequence[tuple[Photo, str | None]], found: Sequence[FoundCaption], data: DataConfig
) -> Iterator[str]:
    several = [caption.source for caption in found if "\n" in caption.text.strip()]
    if several:
        yield f"{listed(several)}: of several lines, which are read as one caption"
    of_folders = defaultdict[tuple[int, str, str], list[str | None]](list)
    for photo, source in photos:
        if photo.named_repeats is not None:
            of_folders[photo.named_repeats].append(source)
    for (repeats, words, folder), inside in of_folders.items():
        said = f"{printable(folder)}, as its name says: {len(inside)} photos, {repeats} times an epoch each"
        instead = f'{inside.count(folder)} without a caption get "{printable(words)}"'
        yield f"{said}; {instead} instead of the instance prompt" if folder in inside else said
    missing = [photo.name for photo, source in photos if source is None]
    num_own = len(photos) - len(missing)
    if missing and (num_own or found):
        share = f"{len(missing)} of {len(photos)} photos"
        yield f"{share} have no caption and get the instance prompt: {listed(missing)}"
    if num_own and "{caption}" not in data.caption_template:
        yield f"the template has no {{caption}}, so that the captions of {num_own} photos are not used"
    word = re.compile(rf"(?<!\w){re.escape(data.token or '')}(?!\w)", re.IGNORECASE)
    lacking = [photo.name for photo, _ in photos if data.token and not word.search(photo.prompt)]
    if lacking:
        share = f"{len(lacking)} of {len(photos)} prompts"
        yield f'the trigger word "{printable(data.token)}" is absent from {share}: {listed(lacking)}'
    for prompt in dict.fromkeys(photo.prompt for photo, _ in photos):
        if any(not (c.isprintable() or c in _JOINERS) for c in prompt):
            yield f'a prompt has characters that cannot be seen: "{printable(prompt)}"'


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


def find_cut(prompt: str, tokenizer: "Tokenizer") -> PromptCut | None:
    """Return where a prompt is cut, None where all of it is read.

    Counts include the tokens that mark start and end, as the text encoder's limit does (77 for CLIP).
    """
    token_ids, limit = tokenizer.encode(prompt, verbose=False), tokenizer.model_max_length
    if limit > _UNBOUNDED or len(token_ids) <= limit:
        return None
    halves = token_ids[1 : limit - 1], token_ids[limit - 1 : -1]
    kept, lost = (tokenizer.decode(part).strip() for part in halves)
    return PromptCut(kept, lost, len(token_ids), limit)


def doubt_token(token: str, tokenizer: "Tokenizer", *, max_tokens: int = 3) -> str | None:
    """Return a warning where a trigger word is long in tokens, or a word that already means something.

    Common is a single token in the first half of a vocabulary of a whole language, as CLIP's.
    """
    token_ids, shown = tokenizer.encode(token, verbose=False)[1:-1], printable(token)
    if len(token_ids) > max_tokens:
        return f'the trigger word "{shown}" is read as {len(token_ids)} tokens; use a shorter one'
    vocab_size = tokenizer.vocab_size
    if len(token_ids) == 1 and vocab_size > _WHOLE_LANGUAGE and token_ids[0] < vocab_size // 2:
        return f'the trigger word "{shown}" is common, and its meaning will change; use a rare one like sks'
    return None
