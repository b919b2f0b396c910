"""The methods beside ETHER whose adapters are read: what PEFT's files of each may hold, and nothing else."""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from peft import BOFTConfig, DeloraConfig, HRAConfig, LoraConfig, OFTConfig, PeftConfig

from ether_diffusion.adapters.config_schema import MAX_BLOCKS, check_unknown
from ether_diffusion.strict_json import Json, is_number, is_whole, parse_json
from ether_diffusion.wording import listed, printable

Shape = tuple[int, ...]
Settings = Mapping[str, Json]

MAX_RANK = 4096
MAX_TARGETS = 4096
MAX_FACTOR = 1e6
_TARGET = re.compile(r"[A-Za-z0-9_-]{1,64}(?:\.[A-Za-z0-9_-]{1,64}){0,31}")


def _is_from_one(most: int) -> Callable[[Json], bool]:
    return lambda value: is_whole(value) and 1 <= cast(int, value) <= most


_RANK = f"a whole number from 1 to {MAX_RANK}", _is_from_one(MAX_RANK)
_BLOCKS = f"a whole number from 1 to {MAX_BLOCKS}", _is_from_one(MAX_BLOCKS)
_ZERO = "0", lambda value: is_whole(value) and value == 0
_DROPOUT = "a number from 0 to below 1", lambda value: is_number(value) and 0 <= cast(float, value) < 1
_FACTOR = (
    f"a number above 0, at most {MAX_FACTOR:g}",
    lambda value: is_number(value) and 0 < cast(float, value) <= MAX_FACTOR,
)
_INITIAL = 'true, false or "gaussian"', lambda value: isinstance(value, bool) or value == "gaussian"
"""How values began says nothing of those that are stored."""


@dataclass(frozen=True)
class Method:
    """A method of PEFT's as training here configures it.

    Attributes:
        settings: what its configuration may set, what each must be, and how that is checked; everything
            else must be as PEFT has it by itself.
        shapes: from settings and a Linear's widths (in, out) to its tensors' shapes by name.
        widths: from such shapes back to the widths; 0 where they do not tell.
        blocks: the setting that must divide the input width.
        has_strengths: whether W' - W can be multiplied by a number.
    """

    title: str
    config: type[PeftConfig]
    settings: Mapping[str, tuple[str, Callable[[Json], bool]]]
    shapes: Callable[[Settings, int, int], dict[str, Shape]]
    widths: Callable[[Mapping[str, Shape]], tuple[int, int]]
    blocks: str | None = None
    has_strengths: bool = False

    def tensor_names(self) -> tuple[str, ...]:
        """Return the names that a module's tensors have after its own."""
        ones: dict[str, Json] = dict.fromkeys(self.settings, 1)
        return tuple(self.shapes(ones, 1, 1))


def _number(settings: Settings, name: str) -> int:
    return cast(int, settings[name])


def _lora_shapes(settings: Settings, width_in: int, width_out: int) -> dict[str, Shape]:
    rank = _number(settings, "r")
    return {"lora_A.weight": (rank, width_in), "lora_B.weight": (width_out, rank)}


def _delora_shapes(settings: Settings, width_in: int, width_out: int) -> dict[str, Shape]:
    rank = _number(settings, "r")
    return {
        "delora_A": (rank, width_in),
        "delora_B": (width_out, rank),
        "delora_lambda": (1,),
        "delora_w_norm": (width_in,),
    }


def _oft_shapes(settings: Settings, width_in: int, width_out: int) -> dict[str, Shape]:
    blocks = _number(settings, "r")
    side = width_in // blocks
    return {"oft_R.weight": (blocks, side * (side - 1) // 2)}  # a skew-symmetric block's upper half


def _boft_shapes(settings: Settings, width_in: int, width_out: int) -> dict[str, Shape]:
    blocks = _number(settings, "boft_block_num")
    side = width_in // blocks
    return {"boft_R": (1, blocks, side, side), "boft_s": (width_out, 1)}


METHODS: Mapping[str, Method] = {
    "LORA": Method(
        "LoRA",
        LoraConfig,
        {"r": _RANK, "lora_alpha": _FACTOR, "lora_dropout": _DROPOUT, "init_lora_weights": _INITIAL},
        _lora_shapes,
        lambda found: (found["lora_A.weight"][1], found["lora_B.weight"][0]),
        has_strengths=True,
    ),
    "OFT": Method(
        "OFT",
        OFTConfig,
        {"r": _BLOCKS, "oft_block_size": _ZERO, "module_dropout": _DROPOUT},
        _oft_shapes,
        lambda found: (_oft_width(found["oft_R.weight"]), 0),
        blocks="r",
    ),
    "HRA": Method(
        "HRA",
        HRAConfig,
        {"r": _RANK},
        lambda settings, width_in, width_out: {"hra_u": (width_in, _number(settings, "r"))},
        lambda found: (found["hra_u"][0], 0),
    ),
    "DELORA": Method(
        "DeLoRA",
        DeloraConfig,
        {"r": _RANK, "delora_lambda": _FACTOR, "module_dropout": _DROPOUT},
        _delora_shapes,
        lambda found: (found["delora_A"][1], found["delora_B"][0]),
        has_strengths=True,
    ),
    "BOFT": Method(
        "BOFT",
        BOFTConfig,
        {"boft_block_num": _BLOCKS, "boft_block_size": _ZERO, "boft_dropout": _DROPOUT},
        _boft_shapes,
        lambda found: (found["boft_R"][1] * found["boft_R"][2], found["boft_s"][0]),
        blocks="boft_block_num",
    ),
}
"""By PEFT's name for the method."""


@dataclass(frozen=True)
class MethodConfig:
    """What an adapter_config.json of another method says; `targets` are names of modules or their ends."""

    method: Method
    settings: Settings
    targets: tuple[str, ...]
    base_model: str | None

    def to_peft(self) -> PeftConfig:
        """Return PEFT's own configuration, of an adapter that is not trained further."""
        arguments: Any = {**self.settings, "target_modules": list(self.targets), "inference_mode": True}
        return self.method.config(**arguments)


def parse_method_config(data: bytes, where: str) -> MethodConfig | None:
    """Return another method's configuration; None of ETHER's, or of what says no method.

    Raises:
        ValueError: it is of a method that is not read, or sets anything else than training here does.
    """
    found = parse_json(data, where)
    name = found.get("peft_type") if isinstance(found, dict) else None
    if not isinstance(found, dict) or not isinstance(name, str) or name.upper() == "ETHER":
        return None
    method = METHODS.get(name.upper())
    if method is None:
        raise ValueError(
            f"{where} is of the method {printable(name, 40)}; ETHER, "
            f"{listed((known.title for known in METHODS.values()), 9)} are read"
        )
    defaults = _defaults(method.config)
    common = {"peft_type", "peft_version", "base_model_name_or_path", "inference_mode", "target_modules"}
    check_unknown(
        {key: value for key, value in found.items() if key not in defaults.keys() | common},
        where,
        method.title,
    )
    settings = {key: found.get(key, defaults[key]) for key in method.settings}
    for key, value in settings.items():
        needed, is_valid = method.settings[key]
        if not is_valid(value):
            raise ValueError(f"{where}: {key} is {printable(json.dumps(value))}; it must be {needed}")
    fixed = defaults.keys() - method.settings.keys() - common - {"init_weights"}
    changed = [key for key in sorted(fixed & found.keys()) if found[key] != defaults[key]]
    if changed:
        raise ValueError(
            f"{where} sets {listed(f'{key}={json.dumps(found[key])}' for key in changed)}, which training "
            f"here does not and is not read; use peft.PeftModel.from_pretrained for such a {method.title}"
        )
    base_model = found.get("base_model_name_or_path")
    if not isinstance(base_model, str | None):
        raise ValueError(f"{where}: base_model_name_or_path is no text; save the adapter again")
    return MethodConfig(method, settings, _targets(found.get("target_modules"), where), base_model)


def _targets(found: Json, where: str) -> tuple[str, ...]:
    names = [name for name in found if isinstance(name, str)] if isinstance(found, list) else []
    is_list = isinstance(found, list) and 0 < len(names) == len(found) <= MAX_TARGETS
    if not is_list or not all(map(_TARGET.fullmatch, names)):
        raise ValueError(
            f"{where}: target_modules is {printable(json.dumps(found))}; it must be a list of names of "
            "modules, not a pattern"
        )
    return tuple(sorted(set(names)))


def _defaults(config: type[PeftConfig]) -> dict[str, Json]:
    """Return what JSON holds of a configuration that nothing was said to."""
    values: dict[str, Json] = json.loads(json.dumps(config().to_dict(), default=list))
    return values


def _oft_width(shape: Shape) -> int:
    blocks, half = shape
    return blocks * (1 + math.isqrt(1 + 8 * half)) // 2
