"""JSON from strangers: bounded, without duplicate keys, NaN, infinities or deep nesting; read into models."""

import json
import math
from collections.abc import Mapping
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from ether_diffusion.wording import printable

MAX_DEPTH = 8
MAX_DIGITS = 20

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]


T = TypeVar("T")


class StrictModel(BaseModel):
    """What a JSON file holds: frozen, nothing converted, no key unknown, every number finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def read_json(text: str | bytes, model: type[T], where: str) -> T:
    """Parse JSON strictly into a type that pydantic knows; `where` opens the messages.

    Raises:
        ValueError: as in `parse_json`; or what the first wrong key holds, and what it should.
    """
    return validate(parse_json(text, where), model, where)


def validate(value: Json, model: type[T], where: str) -> T:
    """Return parsed JSON as a type that pydantic knows; `where` opens the messages.

    Raises:
        ValueError: the first wrong key, what it holds, and what it should.
    """
    try:
        return TypeAdapter(model).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ValueError(f"{where}: {_sentence(first)}") from None


def _sentence(error: Mapping[str, Any]) -> str:
    name = printable(".".join(str(part) for part in error["loc"])) or "it"
    if error["type"] == "missing":
        return f"{name} is missing; save it again"
    if error["type"] == "extra_forbidden":
        return f"{name} is not a key that is known; take it out, or use the version that wrote it"
    if error["type"] == "value_error":
        return f"{name} {error['ctx']['error']}"
    needed = error["msg"].removeprefix("Input should be ")
    return f"{name} is {printable(json.dumps(error['input']))}; it should be {needed}"


def parse_json(text: str | bytes, where: str) -> Json:
    """Parse JSON strictly; `where` opens the messages.

    Raises:
        ValueError: not JSON, a key given twice, a number that is not finite, nesting over MAX_DEPTH.
    """
    try:
        value: Json = json.loads(
            text,
            object_pairs_hook=_without_duplicates,
            parse_constant=_no_constant,
            parse_float=_finite,
            parse_int=_whole,
        )
        json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError(f"{where} is nested too deeply; at most {MAX_DEPTH} levels are read") from None
    except UnicodeEncodeError:
        raise ValueError(f"{where} holds half of a surrogate pair, which is no text; save it again") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{where} is not valid JSON ({printable(error)}); fetch or save it again") from None
    except _JsonError as refusal:
        raise ValueError(f"{where} {refusal}") from None
    if _depth(value) > MAX_DEPTH:
        raise ValueError(f"{where} is nested too deeply; at most {MAX_DEPTH} levels are read")
    return value


def is_whole(value: Json) -> bool:
    """Say whether a value is a whole number; true and false are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Json) -> bool:
    """Say whether a value is a number; true and false are not."""
    return is_whole(value) or isinstance(value, float)


class _JsonError(Exception):
    """What a hook found; `parse_json` says where."""


def _without_duplicates(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    seen: dict[str, Json] = {}
    for key, value in pairs:
        if key in seen:
            raise _JsonError(f"gives the key {printable(key)} twice; a key may stand once")
        seen[key] = value
    return seen


def _no_constant(name: str) -> NoReturn:
    raise _JsonError(f"holds {name}, which is not a JSON number; use a finite one")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise _JsonError(f"holds {printable(digits, 20)}, which is out of range; use a finite number")
    return number


def _whole(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise _JsonError(f"holds a number of {len(digits)} digits; use at most {MAX_DIGITS}")
    return int(digits)


def _depth(value: Json) -> int:
    depth, level = 0, [value]
    while level:
        depth += 1
        children: list[Json] = []
        for item in level:
            children += item.values() if isinstance(item, dict) else item if isinstance(item, list) else []
        level = children
    return depth
