"""What a prompt's signs mean: weights as A1111's web UI has them, alternatives, and wildcards from files."""

import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from ether_diffusion.wording import printable

MAX_WEIGHT, MAX_TEXT, MAX_FILE_BYTES, MAX_CHOICES = 10.0, 10_000, 2**20, 200
"""Of a word; characters of a drawn prompt; bytes of a file of wildcards; and what is chosen in one prompt."""
_STEP = 1.1
_SIGN = re.compile(
    r"\\(?P<plain>[()\[\]\\])|(?P<opens>[(\[])|:\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)|(?P<closes>[)\]])"
    r"|[^\\()\[\]:]+|."
    , re.DOTALL,
)  # fmt: skip
_CHANGING = re.compile(r"\[[^\[\]]*(?:\||:\s*[\d.]+\s*)\]|\[[^\[\]|]*\|[^\[\]]*\]")
_NAME = r"[A-Za-z0-9]+(?:[_./-][A-Za-z0-9]+)*"
_CHOICE = re.compile(rf"\{{(?P<either>[^{{}}|]*(?:\|[^{{}}|]*)+)\}}|__(?P<name>{_NAME})__")

Fragments = Sequence[tuple[str, float]]
"""A prompt's parts with what each is weighed by."""


def weighted_fragments(prompt: str) -> Fragments:
    """Read (word:1.3), (word) for 1.1, [word] for 1 / 1.1, also nested; a backslash takes a bracket as text.

    Brackets that are not closed are text.

    Raises:
        ValueError: a weight is none, or the prompt is to change between steps, as in [cat:dog:0.5].
    """
    if changing := _CHANGING.search(prompt):
        said = f"{printable(changing[0], 60)} changes the prompt between steps, which is not done here"
        raise ValueError(f"{said}; choose one, or write \\[ for a bracket that is text")
    found: list[tuple[str, float]] = []
    opened: list[tuple[str, int]] = []
    for sign in _SIGN.finditer(prompt):
        kind = "[" if sign["closes"] == "]" else "(" if sign["closes"] or sign["weight"] else ""
        if kind and opened and opened[-1][0] == kind:
            _, place = opened.pop()
            factor = float(sign["weight"]) if sign["weight"] else _STEP if kind == "(" else 1 / _STEP
            if not 0 <= factor <= MAX_WEIGHT:
                raise ValueError(
                    f"a weight is from 0 to {MAX_WEIGHT:g}; found {printable(sign['weight'], 40)}"
                )
            found[place:] = [(text, weight * factor) for text, weight in found[place + 1 :]]
            continue
        if sign["opens"]:
            opened.append((sign["opens"], len(found)))
        found.append((sign["plain"] or sign[0], 1.0))
    return list(_joined(found)) or [("", 1.0)]


def _joined(fragments: Fragments) -> Iterator[tuple[str, float]]:
    text, weight = "", 1.0
    for each, own in fragments:
        if text and own != weight:
            yield text, weight
            text = ""
        text, weight = text + each, own
    if text:
        yield text, weight


def plain_text(prompt: str) -> str:
    """Return a prompt as the text encoder reads it, without weights."""
    return "".join(text for text, _ in weighted_fragments(prompt))


def check_unweighted(prompt: str, who: str) -> None:
    """Refuse a weight that was written for a base without any; brackets alone are text there."""
    if found := re.search(r"\([^()]*:\s*[\d.]+\s*\)", prompt):
        raise ValueError(f"{who} reads prompts as sentences, without weights; take {found[0]} out of it")


class Wildcards:
    """Draws prompts from templates: one of {red|blue}, and a line of animal.txt in a folder for __animal__.

    What is chosen depends on the seed alone.
    """

    def __init__(self, folder: Path | None = None) -> None:
        if folder is not None and not folder.is_dir():
            raise ValueError(
                f"there is no folder {printable(folder, 300)} of wildcards; name one with .txt files"
            )
        self.folder = folder

    def names(self) -> list[str]:
        """Return the wildcards there are."""
        files = [] if self.folder is None else sorted(self.folder.rglob("*.txt"))
        names = [file.relative_to(self.folder or file).with_suffix("").as_posix() for file in files]
        return [name for name in names if re.fullmatch(_NAME, name)]

    def draw(self, template: str, seed: int) -> str:
        """Return the prompt of a seed.

        Raises:
            ValueError: there is no such wildcard, it holds nothing, or they hold one another without end.
        """
        prompt = template
        for number in range(MAX_CHOICES):
            choice = _CHOICE.search(prompt)
            if choice is None:
                return prompt
            options = self._lines(choice["name"]) if choice["name"] else choice["either"].split("|")
            digest = hashlib.sha256(f"{seed} {number} {template}".encode()).digest()
            chosen = options[int.from_bytes(digest[:8]) % len(options)].strip()
            prompt = prompt[: choice.start()] + chosen + prompt[choice.end() :]
            if len(prompt) > MAX_TEXT:
                break
        raise ValueError(
            f"the wildcards of {printable(template, 60)} hold one another without end; mend them"
        )

    def _lines(self, name: str) -> list[str]:
        if self.folder is None:
            needed = f"make one with {name}.txt in it, or take it out"
            raise ValueError(f"there is no folder of wildcards for __{name}__; {needed}")
        file = self.folder / f"{name}.txt"
        is_inside = file.resolve().is_relative_to(self.folder.resolve())
        if not is_inside or not file.is_file():
            there = ", ".join(self.names()[:20]) or "none"
            raise ValueError(f"there is no wildcard __{name}__; those there are: {there}")
        with file.open("rb") as opened:
            data = opened.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise ValueError(f"{file.name} is over {MAX_FILE_BYTES >> 20} MiB; split it")
        try:
            lines = [line.strip() for line in data.decode("utf-8-sig").splitlines()]
        except UnicodeDecodeError:
            raise ValueError(f"{file.name} is no UTF-8 text; save it as that") from None
        found = [line for line in lines if line and not line.startswith("#")]
        if not found:
            raise ValueError(f"{file.name} holds nothing; write one choice on each line")
        return found
