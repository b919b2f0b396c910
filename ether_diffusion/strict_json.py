"""JSON from strangers: bounded, without duplicate keys, NaN, infinities or deep nesting; read into models."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast, dataclass_transform

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass
from pydantic_core import CoreSchema, ErrorDetails, core_schema

from ether_diffusion.wording import printable

MAX_DEPTH = 8
MAX_DIGITS = 20

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]
T = TypeVar("T")


class StrictModel(BaseModel):
    """What a JSON file holds: frozen, nothing converted, no key unknown, every number finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


@dataclass_transform(frozen_default=True, field_specifiers=(Field,))
def checked(*, kw_only: bool = False) -> Callable[[type[T]], type[T]]:
    """Make a frozen dataclass whose fields are checked as a StrictModel's, also by `dataclasses.replace`.

    What does not fit is a ValueError of one sentence.
    """
    config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)

    def decorate(cls: type[T]) -> type[T]:
        made: Any = pydantic_dataclass(cls, frozen=True, kw_only=kw_only, config=config)
        check = made.__init__

        def create(self: Any, *values: Any, **named: Any) -> None:
            try:
                check(self, *values, **named)
            except ValidationError as error:
                raise ValueError(_sentence(error, named)) from None

        made.__init__ = create
        return cast(type[T], made)

    return decorate


@dataclass(frozen=True)
class Within:
    """Bounds of a number, both of them allowed: an annotation of a field that pydantic checks.

    `meaning` stands behind them in the sentence: a unit, or what the numbers mean. `multiple` divides it.
    """

    least: float
    most: float
    meaning: str = ""
    multiple: int | None = None

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def holds(self, value: float) -> bool:
        """Say whether a number is within."""
        return self.least <= value <= self.most and not (self.multiple and value % self.multiple)

    def check(self, value: float) -> float:
        """Return a number that is within; another is a ValueError."""
        if not self.holds(value):
            what = f"a multiple of {self.multiple} " if self.multiple else ""
            raise ValueError(f"must be {what}from {self.least} to {self.most}{self.meaning}; found {value}")
        return value


def read_json(text: str | bytes, model: type[T], where: str) -> T:
    """Parse JSON strictly into a type that pydantic knows; `where` opens the messages.

    Raises:
        ValueError: as in `parse_json`; or what the first wrong key holds, and what it should.
    """
    return validate(parse_json(text, where), model, where)


def validate(value: Json, model: type[T], where: str) -> T:
    """Return parsed JSON as a type that pydantic knows; else a ValueError of the first wrong key."""
    try:
        return TypeAdapter(model).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        raise ValueError(f"{where}: {_sentence(error, value)}") from None


def _sentence(refusal: ValidationError, value: object) -> str:
    """Say what is wrong with the first wrong key of a value, whatever of several types it could have been."""
    errors = [(_keys(error, value), error) for error in refusal.errors(include_url=False)]
    first = errors[0][0]
    keys = max((found for found, _ in errors if found[: len(first)] == first), key=len)
    same = [error for found, error in errors if found == keys]
    name, error = printable(".".join(keys)), same[0]
    if error["type"] == "value_error":
        return f"{name} {error['ctx']['error']}".strip()
    name = name or "it"
    if error["type"] == "missing":
        return f"{name} is missing; save it again"
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"{name} is not a key that is known; take it out, or use the version that wrote it"
    needed = " or ".join(dict.fromkeys(e["msg"].partition("should ")[2] or e["msg"] for e in same))
    return f"{name} is {printable(json.dumps(error['input'], default=str))}; it should {needed}"


def _keys(error: ErrorDetails, value: object) -> tuple[str, ...]:
    """Return the keys that lead to an error: pydantic puts types of a union between them."""
    keys, path = list[str](), error["loc"]
    for place, part in enumerate(path):
        is_index = isinstance(part, int) and isinstance(value, list | tuple) and part < len(value)
        is_there = is_index or (isinstance(value, Mapping) and part in value)
        if is_there or place == 0 or (error["type"] == "missing" and place == len(path) - 1):
            keys.append(str(part))
            value = value[part] if is_there else None  # type: ignore[index]  # as was just asked
    return tuple(keys)


def parse_json(text: str | bytes, where: str) -> Json:
    """Parse JSON strictly; `where` opens the messages.

    Raises:
        ValueError: not JSON, a key given twice, a number that is not finite, nesting over MAX_DEPTH.
    """
    try:
        value: Json = json.loads(
            text,
            object_pairs_hook=_without_duplicates,
            parse_constant=_number,
            parse_float=_number,
            parse_int=_whole,
        )
        json.dumps(value, ensure_ascii=False).encode()
        if _depth(value) > MAX_DEPTH:
            raise RecursionError
    except RecursionError:
        raise ValueError(f"{where} is nested too deeply; at most {MAX_DEPTH} levels are read") from None
    except UnicodeEncodeError:
        raise ValueError(f"{where} holds half of a surrogate pair, which is no text; save it again") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{where} is not valid JSON ({printable(error)}); fetch or save it again") from None
    except _JsonError as refusal:
        raise ValueError(f"{where} {refusal}") from None
    return value


class _JsonError(Exception):
    """What a hook found; `parse_json` says where."""


def _without_duplicates(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    seen = dict(pairs)
    if len(seen) < len(pairs):
        twice = next(key for number, (key, _) in enumerate(pairs) if key in dict(pairs[:number]))
        raise _JsonError(f"gives the key {printable(twice)} twice; a key may stand once")
    return seen


def _number(digits: str) -> float:
    number = float(digits)  # NaN and Infinity, too
    if not math.isfinite(number):
        raise _JsonError(f"holds {printable(digits, 20)}, which is out of range; use a finite number")
    return number


def _whole(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise _JsonError(f"holds a number of {len(digits)} digits; use at most {MAX_DIGITS}")
    return int(digits)


def _depth(value: Json) -> int:
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_depth, children), default=0)
