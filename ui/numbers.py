"""Lists of numbers as people type them into a field of a page: 0, 0.5, 1 or 0-3."""

import re

from ether_diffusion.adapter_file.wording import printable

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)", re.ASCII)
_RANGE = re.compile(r"(\d+)\s*(?:-|–|…|\.\.\.?)\s*(\d+)", re.ASCII)
_SEPARATORS = re.compile(r"[,;\s]+")
MAX_NUMBERS = 400
"""In one field: as many as a grid has cells."""
MAX_TEXT = 4000
"""Characters."""


def read_strengths(text: str) -> tuple[float, ...]:
    """Return the strengths in a text, in its order.

    Raises:
        ValueError: something in it is no number, or there are too many.
    """
    words = _words(text, "strengths")
    wrong = [word for word in words if not _NUMBER.fullmatch(word)]
    if wrong:
        raise ValueError(
            f"{printable(wrong[0], 40)} is no strength; write numbers with commas between them, as 0.5, 1"
        )
    return tuple(float(word) for word in words)


def read_seeds(text: str) -> tuple[int, ...]:
    """Return the seeds in a text, in its order; 0-3 is 0, 1, 2, 3.

    Raises:
        ValueError: something in it is no whole number or range, or there are too many.
    """
    seeds: list[int] = []
    for word in _words(_RANGE.sub(r"\1-\2", text), "seeds"):
        ends = _RANGE.fullmatch(word)
        if ends is None and not (word.isascii() and word.isdigit()):
            raise ValueError(
                f"{printable(word, 40)} is no seed; write whole numbers with commas between them, or a "
                "range, as 0-3"
            )
        first, last = (int(end) for end in (ends.groups() if ends else (word, word)))
        if not 0 <= last - first < MAX_NUMBERS - len(seeds):
            raise ValueError(
                f"{printable(word, 40)} are too many seeds or none; up to {MAX_NUMBERS} are drawn, the "
                "smaller end first"
            )
        seeds += range(first, last + 1)
    return tuple(seeds)


def read_lines(text: str) -> tuple[str, ...]:
    """Return the lines of a text that hold something."""
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def _words(text: str, what: str) -> list[str]:
    if len(text) > MAX_TEXT:
        raise ValueError(f"the {what} have {len(text)} characters; up to {MAX_TEXT} are read")
    return [word for word in _SEPARATORS.split(text) if word]
