"""JSON from strangers: bounded, without duplicate keys, NaN, infinities or deep nesting."""

import json
import math
from typing import NoReturn

from ether_diffusion.adapter_file.wording import printable

MAX_DEPTH = 8
MAX_DIGITS = 20

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]


def parse_json(text: str | bytes, where: str) -> Json:
    """Parse JSON strictly; `where` opens the messages.

    Raises:
        ValueError: not JSON, a key given twice, a number that is not finite, nesting over MAX_DEPTH.
    """

    def no_duplicates(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
        seen: dict[str, Json] = {}
        for key, value in pairs:
            if key in seen:
                raise ValueError(f"{where} gives the key {printable(key)} twice; a key may stand once")
            seen[key] = value
        return seen

    def no_constant(name: str) -> NoReturn:
        raise ValueError(f"{where} holds {name}, which is not a JSON number; use a finite one")

    def finite(digits: str) -> float:
        number = float(digits)
        if not math.isfinite(number):
            raise ValueError(
                f"{where} holds {printable(digits, 20)}, which is out of range; use a finite number"
            )
        return number

    def whole(digits: str) -> int:
        if len(digits) > MAX_DIGITS:
            raise ValueError(f"{where} holds a number of {len(digits)} digits; use at most {MAX_DIGITS}")
        return int(digits)

    try:
        value: Json = json.loads(
            text,
            object_pairs_hook=no_duplicates,
            parse_constant=no_constant,
            parse_float=finite,
            parse_int=whole,
        )
    except RecursionError:
        raise ValueError(f"{where} is nested too deeply; at most {MAX_DEPTH} levels are read") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{where} is not valid JSON ({printable(error)}); fetch or save it again") from None
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where} holds half of a surrogate pair, which is no text; save it again") from None
    if _depth(value) > MAX_DEPTH:
        raise ValueError(f"{where} is nested too deeply; at most {MAX_DEPTH} levels are read")
    return value


def _depth(value: Json) -> int:
    depth, level = 0, [value]
    while level:
        depth += 1
        children: list[Json] = []
        for item in level:
            children += item.values() if isinstance(item, dict) else item if isinstance(item, list) else []
        level = children
    return depth
