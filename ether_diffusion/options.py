"""Options: frozen models whose fields are declared once, and checked all together."""

import ast
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, Union, get_args, get_origin

import pydantic
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

T = TypeVar("T")

MAX_CHARACTERS = 10_000
"""Of a text: beyond every prompt and path, and short of what would be slow to read."""
_SHOWN = 120
_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}
_RANGE = {"ge": "from", "gt": "above", "le": "to", "lt": "to below", "multiple_of": "divisible by"}
_OUT_OF_RANGE = ("greater_than", "greater_than_equal", "less_than", "less_than_equal", "multiple_of")
_FAULTS = dict.fromkeys(_OUT_OF_RANGE, "is out of range") | {"finite_number": "is not finite"}


class OptionsError(ValueError):
    """Options that cannot be used; `problems` holds one sentence for each."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


def _as_text(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty")
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("holds bytes that are not text")
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"is longer than {MAX_CHARACTERS} characters")
    return text


def _as_path(value: object) -> object:
    return Path(_as_text(value)) if isinstance(value, str) else value


def _as_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else (value,) if isinstance(value, str) else value


Text = Annotated[str, pydantic.AfterValidator(_as_text)]
PathText = Annotated[Path, BeforeValidator(_as_path)]
Texts = Annotated[tuple[Text, ...], BeforeValidator(_as_tuple)]
Words = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]
Numbers = Annotated[tuple[float, ...], BeforeValidator(_as_tuple)]
Wholes = Annotated[tuple[int, ...], BeforeValidator(_as_tuple)]
"""Several of them; a list, or of texts one, is taken too."""
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0.0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


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
        one = f"one of {', '.join(self.choices)}" if self.choices else _WORDS[self.base]
        return f"a list of {one.removeprefix('a ')}s" if self.is_many else one

    def read(self, text: str) -> object:
        """Return what a text says as such a value, or as one of several; else a ValueError."""
        word = text.lower()
        if word in self.choices:
            return word
        if word == "none" and self.is_optional and (self.choices or self.base in (int, float)):
            return None
        try:
            if self.choices or (not text and self.base is Path):
                raise ValueError(text)
            return {"on": True, "off": False}[word] if self.base is bool else self.base(text)
        except (ValueError, KeyError):
            raise ValueError(f"{shown(text)} does not fit; use {self.words}") from None


@dataclass(frozen=True)
class Declared:
    """All that is declared of an option.

    `needs` are what it has no effect without, with commas between: "name" for any value of another option,
    "one or other" for any of either, "no name" for none, "name=this|that" for one of these. Given, it takes
    the place of the option `instead_of` where a lower layer gave that, and sets those that it `implies`.
    `theirs` is the default of diffusers' script where ours is another. It is `free` where a run goes on with
    another value, as what is trained is the same. On a command line it may be positional, or repeated for
    each of its values, or spread: several values of one are as many runs. Forms call it by its `label`, or
    its name in words.
    """

    kind: Kind
    default: Any
    help: str
    needs: str = ""
    instead_of: str | None = None
    implies: Mapping[str, bool] = field(default_factory=dict)
    theirs: object = None
    free: bool = False
    is_required: bool = False
    is_positional: bool = False
    is_repeated: bool = False
    label: str = ""
    is_spread: bool = False


def option(default: T, help: str | None = None, **more: Any) -> T:
    """Declare an option: its default, its help unless that stands below it, and more of `Declared`."""
    made: T = Field(default, description=help, json_schema_extra=more)
    return made


def needed(help: str, **more: Any) -> Any:
    """Declare an option that has no default."""
    return Field(description=help, json_schema_extra=more)


class Options(BaseModel):
    """Base of the models whose fields are options; values that cannot be used are one OptionsError.

    A class's head may give its `group`, the title of its options in a help, and what `Declared` calls `needs`
    and `free`, of them all.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, defer_build=True)

    title: ClassVar[str] = ""
    needs: ClassVar[str] = ""
    free: ClassVar[bool] = False

    def __init_subclass__(cls, *, group: str = "", needs: str = "", free: bool = False) -> None:
        super().__init_subclass__()
        cls.title, cls.needs, cls.free = group or cls.title, needs or cls.needs, free or cls.free

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise OptionsError(tuple(_sentences(type(self), error))) from None

    @pydantic.model_validator(mode="after")
    def _are_consistent(self) -> Self:
        if problems := list(self._contradictions()):
            raise OptionsError(problems)
        return self

    def _contradictions(self) -> Iterator[str]:
        """Say which options, each fine by itself, exclude or lack each other."""
        yield from ()

    def replace(self, **changes: Any) -> Self:
        """Return the same options with some changed."""
        return type(self)(**(vars(self) | changes))


@cache
def declared(options: type[Options]) -> Mapping[str, Declared]:
    """Return what is declared of each option of a model, by its name."""
    found = {}
    for name, info in options.model_fields.items():
        extra = info.json_schema_extra or {}
        assert isinstance(extra, dict)
        more: dict[str, Any] = {"free": options.free, **extra, "is_required": info.is_required()}
        more["needs"] = ", ".join(filter(None, (options.needs, more.get("needs"))))
        more["label"] = more.get("label") or name.capitalize().replace("_", " ")
        words = info.description or _texts_below_fields(options.__module__).get((options.__name__, name), "")
        found[name] = Declared(kind_of(info.annotation), info.default, words, **more)
    return found


@cache
def _texts_below_fields(module: str) -> dict[tuple[str, str], str]:
    """Return the text below each field of each class; pydantic's own way reads a module once a class.

    Where only compiled files are installed there is none.
    """
    try:
        classes = ast.parse(inspect.getsource(sys.modules[module])).body
    except OSError:
        return {}
    found: dict[tuple[str, str], str] = {}
    for made in classes:
        for pair in pairwise(made.body if isinstance(made, ast.ClassDef) else ()):
            match made, pair:
                case (
                    ast.ClassDef(name=owner),
                    (ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(words)))),
                ):
                    found[owner, name] = " ".join(words.split())
    return found


def kind_of(hint: Any) -> Kind:
    """Return the kind of an option's type."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        one = kind_of(next(part for part in arguments if part is not type(None)))
        return Kind(one.base, one.choices, is_optional=True, is_many=one.is_many)
    if origin is Literal:
        return Kind(str, arguments)
    if origin in (tuple, Annotated):
        one = kind_of(arguments[0])
        return Kind(one.base, one.choices, is_many=one.is_many or origin is tuple)
    assert hint in _WORDS, f"{hint} is not the type of an option"
    return Kind(hint)


def shown(value: object) -> str:
    """Return a value as a message shows it: escaped, and cut where it is long."""
    text = repr(str(value) if isinstance(value, Path) else value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _sentences(options: type[Options], error: ValidationError) -> Iterator[str]:
    said = set()
    for each in error.errors(include_url=False):
        cause, kind = each.get("ctx", {}).get("error"), each["type"]
        if isinstance(cause, OptionsError):
            yield from cause.problems
            continue
        name = str(each["loc"][0])
        if name not in options.model_fields:
            yield f"{name} is not an option; take it out"
        elif name not in said:
            info = options.model_fields[name]
            fault = _FAULTS.get(
                kind, "is out of range" if kind.endswith(("_than", "_equal")) else "does not fit"
            )
            if kind == "literal_error" and isinstance(each["input"], str):
                fault = "is not known"
            needed = f"{kind_of(info.annotation).words}{_range(info)}"
            yield f"{name}={shown(each['input'])} {cause or fault}; use {needed}"
        said.add(name)


def _range(info: FieldInfo) -> str:
    parts = [info, *(part for hint in get_args(info.annotation) for part in get_args(hint)[1:])]
    bounds = [bound for part in parts if isinstance(part, FieldInfo) for bound in part.metadata]
    found = {name: getattr(bound, name) for bound in bounds for name in _RANGE if hasattr(bound, name)}
    numbers = {name: f"{each:g}" if isinstance(each, float) else each for name, each in found.items()}
    return "".join(f" {word} {numbers[name]}" for name, word in _RANGE.items() if name in numbers)
