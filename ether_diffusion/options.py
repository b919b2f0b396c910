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

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
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


Text = Annotated[str, AfterValidator(_as_text)]
PathText = Annotated[Path, BeforeValidator(_as_path)]
Texts = Annotated[tuple[Text, ...], BeforeValidator(_as_tuple)]
Words = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]
Numbers = Annotated[tuple[float, ...], BeforeValidator(_as_tuple)]
Wholes = Annotated[tuple[int, ...], BeforeValidator(_as_tuple)]
"""Several of them; a list, or of texts one, is taken too."""


Count = Annotated[int, Field(ge=1)]
WholeNumber = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0.0)]
NotNegative = Annotated[float, Field(ge=0.0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveShare = Annotated[float, Field(gt=0.0, le=1.0)]
ShareBelowOne = Annotated[float, Field(ge=0.0, lt=1.0)]


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
        one = _WORDS[self.base]
        return f"a list of {one.removeprefix('a ')}s" if self.is_many else one


@dataclass(frozen=True)
class Declared:
    """All that is declared of an option.

    `needs` are what it has no effect without, with commas between: "name" for any value of another option,
    "one or other" for any of either, "no name" for none, "name=this|that" for one of these. Given, it takes
    the place of the option `instead_of` where a lower layer gave that, and sets those that it `implies`.
    `theirs` is the default of diffusers' script where ours is another. It is `free` where a run goes on with
    another value, as what is trained is the same. On a command line it may be positional, or repeated for
    each of its values.
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


def option(default: T, help: str | None = None, **more: Any) -> T:
    """Declare an option: its default, its help unless that stands below it, and more of `Declared`."""
    made: T = Field(default, description=help, json_schema_extra=more)
    return made


def needed(help: str, **more: Any) -> Any:
    """Declare an option that has no default."""
    return Field(description=help, json_schema_extra=more)


class Options(BaseModel):
    """Base of the models whose fields are options.

    Raises:
        OptionsError: values that cannot be used; all are listed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, defer_build=True)

    title: ClassVar[str] = ""
    """Of the options' group in a help."""
    needs: ClassVar[str] = ""
    """What each of the options has no effect without, beside what it needs itself."""
    free: ClassVar[bool] = False
    """Whether a run goes on with other values of them."""

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise OptionsError(tuple(_sentences(type(self), error))) from None

    @model_validator(mode="after")
    def _are_consistent(self) -> Self:
        problems = list(self.contradictions())
        if problems:
            raise OptionsError(problems)
        return self

    def contradictions(self) -> Iterator[str]:
        """Say which options, each fine by itself, exclude or lack each other."""
        yield from ()

    def replace(self, **changes: Any) -> Self:
        """Return the same options with some changed.

        Raises:
            OptionsError: the changed ones cannot be used.
        """
        return type(self)(**(vars(self) | changes))


@cache
def declared(options: type[Options]) -> Mapping[str, Declared]:
    """Return what is declared of each option of a model, by its name."""
    found = {}
    for name, info in options.model_fields.items():
        extra = info.json_schema_extra or {}
        assert isinstance(extra, dict)
        more: dict[str, Any] = {"free": options.free, **extra}
        more["needs"] = ", ".join(filter(None, (options.needs, more.get("needs"))))
        more["is_required"] = info.is_required()
        below = _texts_below_fields(options.__module__)
        words = info.description or below.get((options.__name__, name), "")
        found[name] = Declared(kind_of(info.annotation), info.default, words, **more)
    return found


@cache
def _texts_below_fields(module: str) -> dict[tuple[str, str], str]:
    """Return the text below each field of each class; pydantic's own way reads a module once a class.

    Where only compiled files are installed there is none.
    """
    found: dict[tuple[str, str], str] = {}
    try:
        source = inspect.getsource(sys.modules[module])
    except OSError:
        return found
    for made in ast.parse(source).body:
        if not isinstance(made, ast.ClassDef):
            continue
        for pair in pairwise(made.body):
            match pair:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(words))):
                    found[made.name, name] = " ".join(words.split())
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
        cause = each.get("ctx", {}).get("error")
        if isinstance(cause, OptionsError):
            yield from cause.problems
            continue
        name = str(each["loc"][0])
        if name in said:
            continue
        said.add(name)
        if name not in options.model_fields:
            yield f"{name} is not an option; take it out"
            continue
        info = options.model_fields[name]
        is_unknown = each["type"] == "literal_error" and isinstance(each["input"], str)
        fault = cause or _FAULTS.get(each["type"], "is not known" if is_unknown else "does not fit")
        yield f"{name}={shown(each['input'])} {fault}; use {kind_of(info.annotation).words}{_range(info)}"


def _range(info: FieldInfo) -> str:
    parts = [info, *(part for hint in get_args(info.annotation) for part in get_args(hint)[1:])]
    bounds = [bound for part in parts if isinstance(part, FieldInfo) for bound in part.metadata]
    found = {name: getattr(bound, name) for bound in bounds for name in _RANGE if hasattr(bound, name)}
    return "".join(
        f" {word} {found[name]:g}" if isinstance(found[name], float) else f" {word} {found[name]}"
        for name, word in _RANGE.items()
        if name in found
    )
