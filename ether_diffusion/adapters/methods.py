"""The methods whose adapters are read and written: what the files of each may hold, and nothing else."""

import json
import math
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal, cast

import torch
from peft import BOFTConfig, DeloraConfig, HRAConfig, LoraConfig, OFTConfig, PeftConfig
from pydantic import Field
from torch import Tensor

from ether_diffusion.adapters.tensor_file import Shape, finite
from ether_diffusion.strict_json import Json, StrictModel, parse_json, validate
from ether_diffusion.tuner import EtherConfig
from ether_diffusion.wording import listed, printable

Settings = Mapping[str, Any]

SAFE_EXPONENT = 30
"""Blocks whose largest entry is within 2^-30 and 2^30 keep their norm."""
_NAME = r"^[A-Za-z0-9_-]{1,64}(\.[A-Za-z0-9_-]{1,64}){0,31}$"

_Name = Annotated[str, Field(pattern=_NAME)]
_Rank = Annotated[int, Field(ge=1, le=4096)]
_Blocks = Annotated[int, Field(ge=1, le=65536)]
_Dropout = Annotated[int | float, Field(ge=0, lt=1)]
_Factor = Annotated[int | float, Field(gt=0, le=1e6)]
_Names = str | list[str] | None


class _EtherFile(StrictModel):
    """adapter_config.json of ETHER; a regex in it is never evaluated, a class in it never imported."""

    peft_type: str
    task_type: str | None = None
    auto_mapping: dict[str, str | None] | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    variant: str = "ether"
    num_blocks: _Blocks = 4
    sides: str | None = None
    target_modules: _Names = "attention"
    exclude_modules: _Names = None
    num_blocks_pattern: dict[str, _Blocks] = Field(default_factory=dict)
    dropout: float = 0.0
    init_weights: bool = True
    layers_to_transform: int | list[int] | None = None
    layers_pattern: _Names = None
    modules_to_save: list[str] | None = None


class _File(StrictModel):
    """What an adapter_config.json of every other method says; all that no field names is as PEFT has it."""

    peft_type: str
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    inference_mode: bool = False
    target_modules: Annotated[list[_Name], Field(min_length=1, max_length=4096)]
    """Names of modules or their ends, never a pattern."""


class _LoraFile(_File):
    r: _Rank
    lora_alpha: _Factor
    lora_dropout: _Dropout
    init_lora_weights: Literal[
        True, False, "gaussian"
    ]  # how values began says nothing of those that are stored


class _OftFile(_File):
    r: _Blocks
    oft_block_size: Literal[0]
    module_dropout: _Dropout


class _HraFile(_File):
    r: _Rank


class _DeloraFile(_File):
    r: _Rank
    delora_lambda: _Factor
    module_dropout: _Dropout


class _BoftFile(_File):
    boft_block_num: _Blocks
    boft_block_size: Literal[0]
    boft_dropout: _Dropout


@dataclass(frozen=True)
class Method:
    """A method of PEFT's as training here configures it.

    Attributes:
        file: what its adapter_config.json may say.
        settings: the fields of it that describe its form.
        shapes: from settings and a Linear's widths (in, out) to its tensors' shapes by their names' ends.
        widths: from such shapes back to the widths; 0 where they do not tell.
        has_strengths: whether W' - W can be multiplied by a number.
    """

    title: str
    config: type[PeftConfig]
    file: type[StrictModel]
    shapes: Callable[[Settings, int, int], dict[str, Shape]]
    widths: Callable[[Mapping[str, Shape]], tuple[int, int]]
    has_strengths: bool = False

    @property
    def settings(self) -> tuple[str, ...]:
        """The names of the fields that say how an adapter is made."""
        if self.config is EtherConfig:
            return "variant", "num_blocks", "sides"
        return tuple(name for name in self.file.model_fields if name not in _File.model_fields)


def _ether_shapes(settings: Settings, width_in: int, width_out: int) -> dict[str, Shape]:
    widths = {"input": width_in, "output": width_out}
    sides = ("input", "output") if settings["sides"] == "both" else (settings["sides"],)
    letters = ("u",) if settings["variant"] == "ether" else ("u", "v")
    blocks = settings["num_blocks"]
    return {f"ether_{s}_{letter}": (blocks, widths[s] // blocks) for s in sides for letter in letters}


def _ether_widths(found: Mapping[str, Shape]) -> tuple[int, int]:
    return math.prod(found.get("ether_input_u", (0,))), math.prod(found.get("ether_output_u", (0,)))


def _oft_shapes(settings: Settings, width_in: int, width_out: int) -> dict[str, Shape]:
    side = width_in // settings["r"]
    return {"oft_R.weight": (settings["r"], side * (side - 1) // 2)}  # a skew-symmetric block's upper half


def _oft_widths(found: Mapping[str, Shape]) -> tuple[int, int]:
    blocks, half = found["oft_R.weight"]
    return blocks * (1 + math.isqrt(1 + 8 * half)) // 2, 0


def _boft_shapes(settings: Settings, width_in: int, width_out: int) -> dict[str, Shape]:
    side = width_in // settings["boft_block_num"]
    return {"boft_R": (1, settings["boft_block_num"], side, side), "boft_s": (width_out, 1)}


METHODS: Mapping[str, Method] = {
    "ETHER": Method(
        "ETHER",
        EtherConfig,
        _EtherFile,
        _ether_shapes,
        _ether_widths,
        has_strengths=True,
    ),
    "LORA": Method(
        "LoRA",
        LoraConfig,
        _LoraFile,
        lambda s, i, o: {"lora_A.weight": (s["r"], i), "lora_B.weight": (o, s["r"])},
        lambda found: (found["lora_A.weight"][1], found["lora_B.weight"][0]),
        has_strengths=True,
    ),
    "OFT": Method("OFT", OFTConfig, _OftFile, _oft_shapes, _oft_widths),
    "HRA": Method(
        "HRA",
        HRAConfig,
        _HraFile,
        lambda s, i, o: {"hra_u": (i, s["r"])},
        lambda found: (found["hra_u"][0], 0),
    ),
    "DELORA": Method(
        "DeLoRA",
        DeloraConfig,
        _DeloraFile,
        lambda s, i, o: {
            "delora_A": (s["r"], i),
            "delora_B": (o, s["r"]),
            "delora_lambda": (1,),
            "delora_w_norm": (i,),
        },
        lambda found: (found["delora_A"][1], found["delora_B"][0]),
        has_strengths=True,
    ),
    "BOFT": Method(
        "BOFT",
        BOFTConfig,
        _BoftFile,
        _boft_shapes,
        lambda found: (found["boft_R"][1] * found["boft_R"][2], found["boft_s"][0]),
    ),
}
"""By PEFT's name for the method."""


def name_of(config: PeftConfig) -> str:
    """Return PEFT's name for a configuration's method: "ETHER", "LORA"."""
    return str(getattr(config.peft_type, "value", config.peft_type))


def method_of(config: PeftConfig) -> Method:
    """Return the method of a configuration that was read."""
    return METHODS[name_of(config)]


def title_of(config: PeftConfig) -> str:
    """Return the method's name for people: "ETHER+", "LoRA"."""
    is_plus = isinstance(config, EtherConfig) and config.variant == "ether_plus"
    return method_of(config).title + ("+" if is_plus else "")


def settings_of(config: PeftConfig) -> dict[str, Any]:
    """Return what says the form of an adapter, e.g. {"r": 4, "lora_alpha": 4, …}."""
    return {name: getattr(config, name) for name in method_of(config).settings}


def forms_of(config: PeftConfig, module: str) -> list[dict[str, Any]]:
    """Return the settings that a module may have: of ETHER, its number of blocks may be one of several.

    A pattern with regex operators is never evaluated: from a stranger it may take forever. Its number of
    blocks is allowed everywhere instead, and the tensors say where it holds.
    """
    settings = settings_of(config)
    if not isinstance(config, EtherConfig):
        return [settings]
    patterns = config.num_blocks_pattern
    if all(map(is_plain, patterns)):
        named = {blocks for name, blocks in patterns.items() if f".{module}".endswith(f".{name}")}
        allowed = named or {config.num_blocks}
    else:
        allowed = {config.num_blocks, *patterns.values()}
    return [settings | {"num_blocks": blocks} for blocks in sorted(allowed)]


def is_plain(pattern: str) -> bool:
    """Say whether a pattern is a dotted name rather than a regex."""
    return pattern.replace(".", "").replace("_", "").isalnum()


def is_target(module: str, targets: Collection[str]) -> bool:
    """Say whether a module is among targets, each its name or the end of it after a dot."""
    words = module.split(".")
    return any(".".join(words[start:]) in targets for start in range(len(words)))


def parse_config(data: bytes, where: str, *, only_ether: bool = False) -> PeftConfig:
    """Return the configuration in adapter_config.json.

    Raises:
        ValueError: it is malformed, of a method that is not read, or sets what training here does not.
    """
    found = parse_json(data, where)
    if not isinstance(found, dict):
        raise ValueError(f"{where} is not a JSON object; save the adapter again")
    name = found.get("peft_type")
    if only_ether and isinstance(name, str) and name.upper() != "ETHER":
        rank, title = found.get("r"), printable(name, 40)
        kind = f"an adapter of the method {title}; use peft.PeftModel.from_pretrained"
        if name == "LORA":
            of = f" of rank {rank}" if isinstance(rank, int) else ""
            kind = f"a LoRA{of}; use pipe.load_lora_weights or peft.PeftModel.from_pretrained"
        raise ValueError(f"{where} is not of an ETHER adapter: this is {kind}")
    return config_from(found, where)


def config_from(found: Mapping[str, Json], where: str) -> PeftConfig:
    """Return the configuration of JSON values; classes that it names (auto_mapping) are dropped.

    Raises:
        ValueError: as `parse_config`.
    """
    name = found.get("peft_type")
    if not isinstance(name, str):
        raise ValueError(f'{where} does not say "peft_type": "ETHER"; it is not an adapter of this kind')
    method = METHODS.get(name.upper())
    if method is None:
        raise ValueError(
            f"{where} is of the method {printable(name, 40)}; "
            f"{listed((known.title for known in METHODS.values()), 9)} are read"
        )
    defaults = _defaults(method.config) if method.config is not EtherConfig else {}
    known = method.file.model_fields.keys()
    _check_unknown({k: v for k, v in found.items() if k not in defaults.keys() | known}, where, method.title)
    changed = [
        key
        for key in sorted(defaults.keys() & found.keys() - known - {"init_weights"})
        if found[key] != defaults[key]
    ]
    if changed:
        raise ValueError(
            f"{where} sets {listed(f'{key}={json.dumps(found[key])}' for key in changed)}, which training "
            f"here does not and is not read; use peft.PeftModel.from_pretrained for such a {method.title}"
        )
    stated = {key: found[key] for key in known if key in found}
    stated = {key: defaults[key] for key in method.settings if key in defaults} | stated
    arguments = validate(stated, method.file, where).model_dump(
        exclude_unset=True, exclude={"peft_type", "auto_mapping"}
    )
    if method.config is not EtherConfig:
        arguments |= {"inference_mode": True}
        arguments.pop("peft_version", None)
    try:
        with quiet():
            return method.config(**arguments)
    except ValueError as error:
        raise ValueError(f"{where}: {printable(error, 400)}") from None


def config_json(config: PeftConfig) -> dict[str, Json]:
    """Return what adapter_config.json says of a configuration."""
    values: dict[str, Any] = config.to_dict()
    return {name: sorted(value) if isinstance(value, set) else value for name, value in values.items()}


def _check_unknown(unknown: Mapping[str, Json], where: str, method: str) -> None:
    """Refuse entries that no release here knows, unless they are empty: these are ignored with a warning."""
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


def _defaults(config: type[PeftConfig]) -> dict[str, Json]:
    """Return what JSON holds of a configuration that nothing was said to."""
    return cast(dict[str, Json], json.loads(json.dumps(config().to_dict(), default=list)))


def modules_of(
    config: PeftConfig, shapes: Mapping[str, Shape]
) -> tuple[dict[str, dict[str, Shape]], list[str]]:
    """Return shapes of tensors by module and by the ends of their names, and the names that are others'."""
    ends = tuple(method_of(config).shapes(settings_of(config), 1, 1))
    modules: dict[str, dict[str, Shape]] = {}
    strange = []
    for name, shape in shapes.items():
        end = next((end for end in ends if name.endswith(f".{end}")), None)
        module = name if end is None else name.removesuffix(f".{end}")
        if end is None or not re.match(_NAME, module) or module.endswith("\n"):
            strange.append(name)
        else:
            modules.setdefault(module, {})[end] = shape
    return modules, strange


def check_layout(config: PeftConfig, shapes: Mapping[str, Shape], where: str) -> dict[str, dict[str, Shape]]:
    """Check that tensors of these names and shapes are those of a configuration; see `modules_of`.

    Raises:
        ValueError: they are not.
    """
    title, settings = title_of(config), settings_of(config)
    modules, strange = modules_of(config, shapes)
    if strange:
        raise ValueError(
            f"{where} holds tensors that are not those of {title} with {_shown(settings)} "
            f"({listed(strange)}); save the adapter again, without other weights"
        )
    if not modules:
        raise ValueError(f"{where} holds no tensors; save the adapter again")
    ends = method_of(config).shapes(settings, 1, 1)
    missing = [f"{m}.{end}" for m, found in modules.items() for end in ends if end not in found]
    if missing:
        raise ValueError(
            f"{where} lacks {listed(missing)}, which {_shown(settings)} needs; fetch or save it again"
        )
    if not isinstance(config, EtherConfig):
        untargeted = [module for module in modules if not is_target(module, config.target_modules)]
        if untargeted:
            raise ValueError(
                f"{where} holds tensors of {listed(untargeted)}, which the configuration does not target; "
                "the two files do not belong together"
            )
    for module, found in modules.items():
        if not _is_possible(config, module, found):
            shapes_here = ", ".join(f"{end} {shape}" for end, shape in sorted(found.items()))
            raise ValueError(
                f"{where}: {module} has {printable(shapes_here, 200)}, which no {title} of "
                f"{_shown(forms_of(config, module)[0])} has; the two files do not belong together"
            )
    return modules


def _is_possible(config: PeftConfig, module: str, found: Mapping[str, Shape]) -> bool:
    """Say whether there are widths of a Linear for which the configuration gives these shapes."""
    method = method_of(config)
    dimensions = {end: len(shape) for end, shape in method.shapes(settings_of(config), 1, 1).items()}
    return all(len(shape) == dimensions[end] and min(shape) >= 1 for end, shape in found.items()) and any(
        method.shapes(form, *method.widths(found)) == found for form in forms_of(config, module)
    )


def _shown(settings: Settings) -> str:
    return printable(", ".join(f"{name}={value!r}" for name, value in settings.items()), 200)


def usable_values(config: PeftConfig, tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Return tensors in float32, by sorted name; their layout was checked.

    Of ETHER only directions matter: a block whose norm float32 could not square is scaled by a power of two,
    which leaves its direction exactly as it is.

    Raises:
        ValueError: a number is not finite, or a reflection's vector has no direction.
    """
    ordered = {name: tensors[name] for name in sorted(tensors)}
    if isinstance(config, EtherConfig):
        finite(ordered, where)  # before float64 is narrowed, whose blocks may be of any norm
        return {name: _with_safe_norms(tensor, name, where) for name, tensor in ordered.items()}
    usable = finite({name: tensor.float() for name, tensor in ordered.items()}, where)
    for name, tensor in usable.items():
        if name.endswith(".hra_u") and bool((torch.linalg.vector_norm(tensor, dim=0) == 0).any()):
            raise ValueError(f"{where}: a vector of {name} is zero and has no direction; use another save")
    return usable


def _with_safe_norms(tensor: Tensor, name: str, where: str) -> Tensor:
    wide = tensor.double()
    largest = wide.abs().amax(dim=1, keepdim=True)
    is_zero = largest < torch.finfo(torch.float64).tiny
    if is_zero.any():
        block = int(is_zero.flatten().nonzero()[0])
        raise ValueError(
            f"{where}: block {block} of {printable(name)} is zero and has no direction; use another save"
        )
    exponent = torch.frexp(largest).exponent
    fits = (exponent > -SAFE_EXPONENT) & (exponent < SAFE_EXPONENT)
    return (wide * 2.0 ** torch.where(fits, 0, -exponent).double()).float()


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what PEFT says of kernels, initial values and second adapters to itself: none of it is amiss."""
    with warnings.catch_warnings():
        for message in (
            "Failed to load the CUDA",
            "Setting boft_n_butterfly",
            "The symmetric",
            "Already found",
        ):
            warnings.filterwarnings("ignore", message=message)
        yield
