"""Options: fields of frozen dataclasses, each with a help line and bounds, and one check for all of them."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Literal, Protocol, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")

MAX_CHARACTERS = 10_000
"""Of a text: beyond every prompt and path, and short of what would be slow to read."""
_SHOWN = 120
_KINDS: dict[type, tuple[str, str]] = {
    bool: ("true or false", "true or false"),
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("text", "texts"),
    Path: ("a path", "paths"),
}


class Dataclass(Protocol):
    """Any dataclass whose fields carry a help line in their metadata."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]


class OptionsError(ValueError):
    """Options that cannot be used; `problems` holds one sentence for each."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


def option(
    default: T,
    help: str,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    multiple_of: int | None = None,
) -> T:
    """Return a field with its help line and what its value may be; bounds hold for numbers that are given."""
    bounds = {"least": least, "above": above, "most": most, "below": below, "multiple_of": multiple_of}
    return field(default=default, metadata={"help": help, **bounds})


@dataclass(frozen=True)
class Kind:
    """What a value can be: a `base`, or one of `choices`; None, or several of them, where it says so."""

    base: type
    choices: tuple[str, ...] = ()
    is_optional: bool = False
    is_many: bool = False

    @property
    def words(self) -> str:
        """What to give, in words."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        one, several = _KINDS[self.base]
        return f"a list of {several}" if self.is_many else one

    def convert(self, value: object) -> object:
        """Return a value of a file or of a command line as the field holds it; what does not fit stays."""
        if self.is_many:
            items = value if isinstance(value, list | tuple) else [value]
            return tuple(Kind(self.base, self.choices).convert(item) for item in items)
        if self.base is Path and isinstance(value, str) and value:
            return Path(value)
        if self.base is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value) if abs(value) < 2**1023 else math.inf
        return value

    def fits(self, value: object) -> bool:
        """Say whether a value is of this kind; bounds are another matter."""
        if value is None:
            return self.is_optional
        if self.is_many:
            one = Kind(self.base, self.choices)
            return isinstance(value, tuple) and all(one.fits(item) for item in value)
        if self.choices:
            return value in self.choices
        if isinstance(value, bool):
            return self.base is bool
        return isinstance(value, int | float if self.base is float else self.base)


def kinds_of(config_type: type[Dataclass]) -> dict[str, Kind]:
    """Return the kind of each field of a dataclass, by its name."""
    hints = get_type_hints(config_type)
    return {each.name: _kind(hints[each.name]) for each in fields(config_type)}


def find_problems(config: Dataclass) -> Iterator[str]:
    """Say of each field of a dataclass what is wrong with its value, and what to give."""
    for name, kind in kinds_of(type(config)).items():
        value = getattr(config, name)
        bounds = config.__dataclass_fields__[name].metadata
        fault = _fault(kind, value, bounds)
        if fault:
            yield f"{name}={shown(value)} {fault}; use {kind.words}{_range(bounds)}"


def shown(value: object) -> str:
    """Return a value as a message shows it: escaped, and cut where it is long."""
    text = repr(str(value) if isinstance(value, Path) else value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _kind(hint: Any) -> Kind:
    if get_origin(hint) in (Union, UnionType):
        one = _kind(next(part for part in get_args(hint) if part is not type(None)))
        return Kind(one.base, one.choices, is_optional=True, is_many=one.is_many)
    if get_origin(hint) is Literal:
        return Kind(str, get_args(hint))
    if get_origin(hint) is tuple:
        one = _kind(get_args(hint)[0])
        return Kind(one.base, one.choices, is_many=True)
    assert hint in _KINDS, f"{hint} is not the type of an option"
    return Kind(hint)


def _fault(kind: Kind, value: object, bounds: Any) -> str | None:
    if not kind.fits(value):
        return "is not known" if kind.choices and isinstance(value, str) else "does not fit"
    if isinstance(value, float) and not math.isfinite(value):
        return "is not finite"
    if isinstance(value, int | float) and not isinstance(value, bool) and not _is_within(value, bounds):
        return "is out of range"
    for text in value if isinstance(value, tuple) else (value,):
        if isinstance(text, str | Path):
            fault = _text_fault(str(text))
            if fault:
                return fault
    return None


def _text_fault(text: str) -> str | None:
    if not text.strip():
        return "is empty"
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        return "holds bytes that are not text"
    if len(text) > MAX_CHARACTERS:
        return f"is longer than {MAX_CHARACTERS} characters"
    return None


def _is_within(value: float, bounds: Any) -> bool:
    return not (
        (bounds.get("least") is not None and value < bounds["least"])
        or (bounds.get("above") is not None and value <= bounds["above"])
        or (bounds.get("most") is not None and value > bounds["most"])
        or (bounds.get("below") is not None and value >= bounds["below"])
        or (bounds.get("multiple_of") is not None and value % bounds["multiple_of"])
    )


def _range(bounds: Any) -> str:
    words = {"least": "from", "above": "above", "most": "to", "below": "to below"}
    words |= {"multiple_of": "divisible by"}
    given = [
        f" {word} {_short(bounds[name])}" for name, word in words.items() if bounds.get(name) is not None
    ]
    return "".join(given)


def _short(bound: float) -> str:
    return f"{bound:g}" if isinstance(bound, float) else str(bound)
