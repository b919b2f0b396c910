"""From captions to prompts: one for every photo, by rules that drop nobody's words in silence.

A photo's caption is its sidecar (`a.txt`, `a.caption` or `a.jpg.txt` for `a.jpg`) or its row in
metadata.jsonl or metadata.csv. Several that say the same are fine; where they differ, it is an error. A photo
without one gets the words of its folder, where that is called like `10_sks dog`, or else the instance prompt.
Then the template is filled: `{caption}` by any of these, and `{token}`, also inside captions, by the trigger
word.
"""

import hashlib
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ether_diffusion.training.caption_files import FoundCaption, match_captions, read_caption_files
from ether_diffusion.training.photos import Photo, name_repeats
from ether_diffusion.training.plain_files import NAME_LIMIT, walk_files
from ether_diffusion.wording import listed, printable

MAX_CHARACTERS = 10_000
_JOINERS = "\u200c\u200d"
"""Invisible, and right in Persian, Indic scripts and emoji."""


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
        return {f"prompt of {_shown(caption.photo)}": _sha256(caption.prompt) for caption in self.captions}


@dataclass(frozen=True)
class Filling:
    """How a caption becomes a prompt. In captions, braces other than those of `{token}` are plain text."""

    instance_prompt: str | None
    token: str | None
    template: str

    def check(self) -> None:
        """Raise ValueError where a text is empty, too long, or asks for what there is not."""
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

    def problems(self, caption: str, source: str) -> list[str]:
        """Return why a caption makes no prompt, in sentences that name its source."""
        prompt = self.fill(caption)
        if not caption and "{caption}" in self.template:
            return [f"{source} has no caption, and there is no instance prompt; write either"]
        if self.token is None and "{token}" in prompt:
            return [f"{source} asks for {{token}}, and none is given; give the trigger word as token"]
        if len(prompt) > MAX_CHARACTERS:
            return [f"{source} makes a prompt of {len(prompt)} characters; at most {MAX_CHARACTERS} are read"]
        return []

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
    filling = Filling(instance_prompt, token, template)
    filling.check()
    files = walk_files(folder, "the captions", without=without, follow_symlinks=follow_symlinks).files
    found, problems = read_caption_files(files, None if follow_symlinks else Path(folder))
    where = printable(folder, NAME_LIMIT)
    return caption_photos(found, photos, filling, problems=problems, where=where)


def caption_photos(
    found: Sequence[FoundCaption],
    photos: Sequence[Photo],
    filling: Filling,
    *,
    problems: Sequence[str],
    where: str,
) -> Captions:
    """Make each photo's prompt of the captions found in `where`; `problems` are those of finding them.

    Raises:
        ValueError: texts that contradict each other, are missing or too long; all are listed.
    """
    problems = list(problems)
    by_photo, warnings = match_captions(list(found), [photo.name for photo in photos])
    captions: list[Caption] = []
    for photo in photos:
        texts = {_one_line(caption.text): caption for caption in by_photo.get(photo.name, [])}
        texts.pop("", None)
        if len(texts) > 1:
            problems.append(_conflict(photo, texts))
            continue
        named = name_repeats(photo.name)
        fallback = (filling.instance_prompt or "", None) if named is None else (named[1], named[2])
        text, source = next(((text, own.source) for text, own in texts.items()), fallback)
        problems += filling.problems(text, printable(source or photo.name, NAME_LIMIT))
        captions.append(Caption(photo, filling.fill(text), source))
    if problems:
        reasons = ";\n  ".join(problems)
        raise ValueError(f"captions in {where} cannot be used:\n  {reasons}")
    num_fallbacks = sum(caption.source is None for caption in captions)
    remarks = (*warnings, *_remarks_on_files(found), *_remarks(captions, filling, has_files=bool(found)))
    return Captions(tuple(captions), num_fallbacks, remarks)


def _conflict(photo: Photo, texts: dict[str, FoundCaption]) -> str:
    sides = " and ".join(f'"{printable(text)}" in {caption.shown}' for text, caption in texts.items())
    return f"{_shown(photo)} has different captions, {sides}; keep one"


def _remarks_on_files(found: Sequence[FoundCaption]) -> Iterator[str]:
    empty = [caption.source for caption in found if not caption.text.strip()]
    if empty:
        yield f"{listed(empty)}: empty; the instance prompt stands in"
    several = [caption.source for caption in found if "\n" in caption.text.strip()]
    if several:
        yield f"{listed(several)}: of several lines, which are read as one caption"


def _remarks(captions: list[Caption], filling: Filling, *, has_files: bool) -> Iterator[str]:
    yield from _remarks_on_folders(captions, filling)
    own = [caption for caption in captions if caption.source is not None]
    missing = [caption.photo.name for caption in captions if caption.source is None]
    if missing and (own or has_files):
        share = f"{len(missing)} of {len(captions)} photos"
        yield f"{share} have no caption and get the instance prompt: {listed(missing)}"
    if own and "{caption}" not in filling.template:
        yield f"the template has no {{caption}}, so that the captions of {len(own)} photos are not used"
    lacking = [caption.photo.name for caption in captions if filling.lacks_token(caption.prompt)]
    if lacking:
        share = f"{len(lacking)} of {len(captions)} prompts"
        yield f'the trigger word "{printable(filling.token)}" is absent from {share}: {listed(lacking)}'
    for prompt in dict.fromkeys(caption.prompt for caption in captions):
        if any(not (c.isprintable() or c in _JOINERS) for c in prompt):
            yield f'a prompt has characters that cannot be seen: "{printable(prompt)}"'


def _remarks_on_folders(captions: list[Caption], filling: Filling) -> Iterator[str]:
    by_folder: dict[tuple[int, str, str], list[Caption]] = {}
    for caption in captions:
        named = name_repeats(caption.photo.name)
        if named is not None:
            by_folder.setdefault(named, []).append(caption)
    for (repeats, words, folder), inside in by_folder.items():
        found = f"{printable(folder)}, as its name says: {len(inside)} photos, {repeats} times an epoch each"
        missing = [caption.photo.name for caption in inside if caption.source == folder]
        if missing:
            instead = "" if filling.instance_prompt is None else " instead of the instance prompt"
            found += f'; {len(missing)} without a caption get "{printable(words)}"{instead}'
        yield found


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _shown(photo: Photo) -> str:
    return printable(photo.name, NAME_LIMIT)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
