"""What people type into a field of a page, or scripts send: a number, or a list as 0, 0.5, 1 or 0-3.

Every reader raises a ValueError that names the field and what was found in it.
"""

import math
import re

from ether_diffusion.wording import printable

MAX_NUMBERS = 400
"""In one field: as many as a grid has cells."""
MAX_TEXT = 4000
"""Characters."""
_MAX_DIGITS = 24
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)", re.ASCII)
_RANGE = re.compile(r"(\d+)\s*(?:-|–|…|\.\.\.?)\s*(\d+)", re.ASCII)


def read_number(value: object, field: str) -> float:
    """Return the number of a field."""
    text = str(value).strip() if isinstance(value, int | float | str) and not isinstance(value, bool) else ""
    try:
        number = float(text) if len(text) <= _MAX_DIGITS else math.inf
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise _wrong(value, field, "a number")
    return number


def read_whole(value: object, field: str) -> int:
    """Return the whole number of a field."""
    number = read_number(value, field)
    if number != int(number):
        raise _wrong(value, field, "a whole number")
    return int(number)


def read_optional(value: object, field: str) -> int | None:
    """Return the whole number of a field that may be empty; pages send 0 for one that was never touched."""
    return None if value in (None, "") else read_whole(value, field) or None


def read_text(value: object, field: str) -> str:
    """Return the text of a field that may be empty."""
    if not isinstance(value, str | None):
        raise _wrong(value, field, "text")
    return value or ""


def read_switch(value: object, field: str) -> bool:
    """Return whether a field is ticked."""
    if not isinstance(value, bool):
        raise _wrong(value, field, "true or false")
    return value


def _wrong(value: object, field: str, needed: str) -> ValueError:
    found = "nothing" if value in (None, "") else printable(value, 40)
    return ValueError(f"{field} must be {needed}; found {found}")


def read_strengths(text: str) -> tuple[float, ...]:
    """Return the strengths in a text, in its order."""
    words = _words(text, "strengths")
    for word in words:
        if not _NUMBER.fullmatch(word):
            raise ValueError(
                f"{printable(word, 40)} is no strength; write numbers with commas between them, as 0.5, 1"
            )
    return tuple(float(word) for word in words)


def read_seeds(text: str) -> tuple[int, ...]:
    """Return the seeds in a text, in its order; 0-3 is 0, 1, 2, 3."""
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
    return [word for word in re.split(r"[,;\s]+", text) if word]
