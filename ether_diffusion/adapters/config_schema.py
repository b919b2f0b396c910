"""What adapter_config.json may hold: a closed schema, checked before use."""

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, cast

from ether_diffusion.adapters.foreign import foreign_method
from ether_diffusion.strict_json import Json, is_number, is_whole, parse_json
from ether_diffusion.tuner import EtherConfig
from ether_diffusion.wording import listed, printable

MAX_CONFIG_BYTES = 2**20
MAX_BLOCKS = 65536

_Check = Callable[[Json], bool]


def _is_text(value: Json) -> bool:
    return isinstance(value, str)


def _is_list_of(check: _Check) -> _Check:
    return lambda value: isinstance(value, list) and all(map(check, value))


def _is_mapping_to(check: _Check) -> _Check:
    return lambda value: isinstance(value, dict) and all(map(check, value.values()))


def _any_of(*checks: _Check) -> _Check:
    return lambda value: any(check(value) for check in checks)


def _is_null(value: Json) -> bool:
    return value is None


def _is_flag(value: Json) -> bool:
    return isinstance(value, bool)


def _is_block_count(value: Json) -> bool:
    return is_whole(value) and 1 <= cast(int, value) <= MAX_BLOCKS


_TEXT_OR_NULL = "text or null", _any_of(_is_text, _is_null)
_NAMES = "a name, a list of names or null", _any_of(_is_text, _is_list_of(_is_text), _is_null)
_CONFIG_SCHEMA: dict[str, tuple[str, _Check]] = {
    "peft_type": ("ETHER", _is_text),
    "task_type": _TEXT_OR_NULL,
    "auto_mapping": ("names by key, or null", _any_of(_is_mapping_to(_any_of(_is_text, _is_null)), _is_null)),
    "peft_version": _TEXT_OR_NULL,
    "base_model_name_or_path": _TEXT_OR_NULL,
    "revision": _TEXT_OR_NULL,
    "inference_mode": ("true or false", _is_flag),
    "variant": ("text", _is_text),
    "num_blocks": (f"a whole number from 1 to {MAX_BLOCKS}", _is_block_count),
    "sides": _TEXT_OR_NULL,
    "target_modules": _NAMES,
    "exclude_modules": _NAMES,
    "num_blocks_pattern": (
        f"whole numbers from 1 to {MAX_BLOCKS} by module name",
        _is_mapping_to(_is_block_count),
    ),
    "dropout": ("a number from 0 to below 1", is_number),
    "init_weights": ("true or false", _is_flag),
    "layers_to_transform": (
        "a whole number, a list of them or null",
        _any_of(is_whole, _is_list_of(is_whole), _is_null),
    ),
    "layers_pattern": _NAMES,
    "modules_to_save": ("a list of names or null", _any_of(_is_list_of(_is_text), _is_null)),
}


def parse_config(data: bytes, where: str) -> EtherConfig:
    """Return the configuration; classes that it names (auto_mapping) are dropped, never imported.

    Raises:
        ValueError: another method's, malformed, or with a field that is unknown or out of range.
    """
    if len(data) > MAX_CONFIG_BYTES:
        raise ValueError(f"{where} has {len(data)} bytes; a configuration has at most {MAX_CONFIG_BYTES}")
    found = parse_json(data, where)
    if not isinstance(found, dict):
        raise ValueError(f"{where} is not a JSON object; save the adapter again")
    method = found.get("peft_type")
    if not isinstance(method, str) or method.upper() != "ETHER":
        if isinstance(method, str):
            rank = found.get("r")
            kind = foreign_method(printable(method, 40), rank if isinstance(rank, int) else None)
            raise ValueError(f"{where} is not of an ETHER adapter: {kind}")
        raise ValueError(f'{where} does not say "peft_type": "ETHER"; it is not an adapter of this kind')
    known = {name: value for name, value in found.items() if name in _CONFIG_SCHEMA}
    check_unknown({name: value for name, value in found.items() if name not in _CONFIG_SCHEMA}, where)
    for name, value in known.items():
        needed, is_valid = _CONFIG_SCHEMA[name]
        if not is_valid(value):
            raise ValueError(f"{where}: {name} is {printable(json.dumps(value))}; it must be {needed}")
    arguments: Any = {
        name: value for name, value in known.items() if name not in ("peft_type", "auto_mapping")
    }
    try:
        return EtherConfig(**arguments)
    except ValueError as error:
        raise ValueError(f"{where}: {printable(error, 400)}") from None


def config_bytes(config: EtherConfig) -> bytes:
    """Return adapter_config.json: the same configuration gives the same bytes."""
    stored = {
        name: sorted(value) if isinstance(value, set) else value for name, value in asdict(config).items()
    }
    return (json.dumps(stored, indent=2, sort_keys=True) + "\n").encode()


def check_unknown(unknown: Mapping[str, Json], where: str, method: str = "ETHER") -> None:
    """Refuse entries that no release here knows, unless they are empty: these are ignored with a warning.

    Raises:
        ValueError: as said.
    """
    telling = [name for name, value in unknown.items() if value not in (None, False, [], {}, "")]
    if telling:
        raise ValueError(
            f"{where} sets {listed(telling)}, which this release does not know; upgrade ether-diffusion, "
            f"or remove the entry if it is not meant for {method}"
        )
    if unknown:
        warnings.warn(
            f"{where} has the unknown entries {listed(unknown)}; they are empty, so ignored", stacklevel=2
        )
