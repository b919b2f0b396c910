"""The methods whose adapters are read and written: what the files of each may hold, and nothing else."""

import json
import math
import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal, NamedTuple, cast

import torch
from peft import BOFTConfig, DeloraConfig, HRAConfig, IA3Config, LoraConfig, OFTConfig, PeftConfig
from pydantic import Field, create_model
from torch import Tensor

from ether_diffusion.adapters.tensor_file import Shape, finite
from ether_diffusion.strict_json import Json, StrictModel, parse_json, validate
from ether_diffusion.tuner import EtherConfig
from ether_diffusion.wording import listed, printable

SAFE_EXPONENT = 30
"""Blocks whose largest entry is within 2^-30 and 2^30 keep their norm."""
_NAME = r"^[A-Za-z0-9_-]{1,64}(\.[A-Za-z0-9_-]{1,64}){0,31}$"
_QUIET = ("Failed to load the CUDA", "Setting boft_n_butterfly", "The symmetric", "Already found")

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
    """What an adapter_config.json of every other method says; all that no field names is as PEFT has it.

    `target_modules` are names of modules or their ends, never a pattern.
    """

    peft_type: str
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    inference_mode: bool = False
    target_modules: Annotated[list[_Name], Field(min_length=1, max_length=4096)]


class Method(NamedTuple):
    """A method of PEFT's as training here configures it.

    fields are the settings that say how an adapter is made, and what its file may say of each. tensors are
    the sizes of a module's tensors by the ends of their names: a number, a setting, the width of the Linear,
    `in` or `out`, or this by a setting; `pairs-` are the n (n - 1) / 2 of that many. has_strengths says
    whether W' - W can be multiplied by a number.
    """

    title: str
    config: type[PeftConfig]
    fields: Mapping[str, Any]
    tensors: str
    has_strengths: bool = False


_LORA = {"r": _Rank, "lora_alpha": _Factor, "lora_dropout": _Dropout}
_LORA["init_lora_weights"] = Literal[True, False, "gaussian"]  # says nothing of the values that are stored
_OFT = {"r": _Blocks, "oft_block_size": Literal[0], "module_dropout": _Dropout}
_DELORA = {"r": _Rank, "delora_lambda": _Factor, "module_dropout": _Dropout}
_BOFT = {"boft_block_num": _Blocks, "boft_block_size": Literal[0], "boft_dropout": _Dropout}
_OF_DELORA = "delora_A=r,in delora_B=out,r delora_lambda=1 delora_w_norm=in"
_OF_BOFT = "boft_R=1,boft_block_num,in/boft_block_num,in/boft_block_num boft_s=out,1"
METHODS: Mapping[str, Method] = {
    "ETHER": Method("ETHER", EtherConfig, dict.fromkeys(("variant", "num_blocks", "sides")), "", True),
    "LORA": Method("LoRA", LoraConfig, _LORA, "lora_A.weight=r,in lora_B.weight=out,r", True),
    "OFT": Method("OFT", OFTConfig, _OFT, "oft_R.weight=r,pairs-in/r"),
    "HRA": Method("HRA", HRAConfig, {"r": _Rank}, "hra_u=in,r"),
    "DELORA": Method("DeLoRA", DeloraConfig, _DELORA, _OF_DELORA, True),
    "BOFT": Method("BOFT", BOFTConfig, _BOFT, _OF_BOFT),
    "IA3": Method("IA3", IA3Config, {"feedforward_modules": list[_Name]}, "ia3_l=1,in"),  # of inputs alone
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
    return {name: getattr(config, name) for name in method_of(config).fields}


def is_plain(pattern: str) -> bool:
    """Say whether a pattern is a dotted name rather than a regex."""
    return pattern.replace(".", "").replace("_", "").isalnum()


def is_target(module: str, targets: Collection[str]) -> bool:
    """Say whether a module is among targets, each its name or the end of it after a dot."""
    words = module.split(".")
    return any(".".join(words[start:]) in targets for start in range(len(words)))


def parse_config(data: bytes, where: str, *, only_ether: bool = False) -> PeftConfig:
    """Return the configuration in adapter_config.json."""
    found = parse_json(data, where)
    if not isinstance(found, dict):
        raise ValueError(f"{where} is not a JSON object; save the adapter again")
    name = found.get("peft_type")
    if only_ether and isinstance(name, str) and name.upper() != "ETHER":
        reader = "pipe.load_lora_weights or peft.PeftModel" if name == "LORA" else "peft.PeftModel"
        raise ValueError(f"{where} is of the method {printable(name, 40)}, not ETHER; use {reader}")
    return config_from(found, where)


def config_from(found: Mapping[str, Json], where: str) -> PeftConfig:
    """Return the configuration of JSON values, as `parse_config`; a class that it names is only a name."""
    name = found.get("peft_type")
    method = METHODS.get(name.upper()) if isinstance(name, str) else None
    if method is None:
        titles = listed((known.title for known in METHODS.values()), 9)
        raise ValueError(f"{where} is of the method {printable(name, 40)}; {titles} are read")
    is_ether = method.config is EtherConfig
    model: type[StrictModel] = _EtherFile
    defaults: dict[str, Json] = {}
    if not is_ether:
        defaults = json.loads(json.dumps(method.config().to_dict(), default=list))
        fields: Any = {name: (kind, ...) for name, kind in method.fields.items()}
        model = create_model("_File", __base__=_File, **fields)
    known = model.model_fields.keys()
    unknown = {key: value for key, value in found.items() if key not in defaults.keys() | known}
    telling = [key for key, value in unknown.items() if value not in (None, False, [], {}, "")]
    if telling:
        raise ValueError(f"{where} sets {listed(telling)}, which this release does not know; upgrade it")
    if unknown:
        said = f"{where} has the unknown entries {listed(unknown)}; they are empty, so ignored"
        warnings.warn(said, stacklevel=2)
    others = sorted(defaults.keys() & found.keys() - known - {"init_weights"})
    changed = [f"{key}={json.dumps(found[key])}" for key in others if found[key] != defaults[key]]
    if changed:
        raise ValueError(
            f"{where} sets {listed(changed)}, which is not read; use peft.PeftModel for such a {method.title}"
        )
    stated = {key: defaults[key] for key in method.fields if key in defaults}
    own = validate(stated | {key: found[key] for key in known if key in found}, model, where)
    dropped = {"peft_type"} | (set() if is_ether else {"peft_version"})
    arguments = own.model_dump(exclude_unset=True, exclude=dropped)
    try:
        with quiet():
            return method.config(**arguments | ({} if is_ether else {"inference_mode": True}))
    except ValueError as error:
        raise ValueError(f"{where}: {printable(error, 400)}") from None


def config_json(config: PeftConfig) -> dict[str, Json]:
    """Return what adapter_config.json says of a configuration."""
    values = cast(dict[str, Any], config.to_dict())
    return {name: sorted(value) if isinstance(value, set) else value for name, value in values.items()}


def modules_of(
    config: PeftConfig, shapes: Mapping[str, Shape]
) -> tuple[dict[str, dict[str, Shape]], list[str]]:
    """Return shapes of tensors by module and by the ends of their names, and the names that are others'."""
    modules: dict[str, dict[str, Shape]] = {}
    strange = []
    for name, shape in shapes.items():
        end = next((end for end in _tensors_of(config) if name.endswith(f".{end}")), "")
        module = name.removesuffix(f".{end}")
        if end and re.fullmatch(_NAME, module):
            modules.setdefault(module, {})[end] = shape
        else:
            strange.append(name)
    return modules, strange


def check_layout(config: PeftConfig, shapes: Mapping[str, Shape], where: str) -> dict[str, dict[str, Shape]]:
    """Check that tensors of these names and shapes are those of a configuration; see `modules_of`."""
    modules, strange = modules_of(config, shapes)
    settings = printable(", ".join(f"{n}={value!r}" for n, value in settings_of(config).items()), 200)
    form = f"{title_of(config)} with {settings}"
    if strange or not modules:
        raise ValueError(f"{where} holds tensors that are not those of {form} ({listed(strange) or 'none'})")
    ends, targets = _tensors_of(config), config.target_modules
    missing = [f"{module}.{end}" for module, found in modules.items() for end in ends if end not in found]
    if missing:
        raise ValueError(f"{where} lacks {listed(missing)} of {form}; fetch or save it again")
    for module, found in modules.items():
        if not isinstance(config, EtherConfig) and not is_target(module, targets or ()):
            raise ValueError(f"{where} holds {module}, which the configuration does not target")
        if widths_of(config, module, found) is None:
            here = printable(", ".join(f"{end} {shape}" for end, shape in sorted(found.items())), 200)
            raise ValueError(f"{where}: {module} has {here}, no {form}; the two files do not belong together")
    return modules


def widths_of(config: PeftConfig, module: str, found: Mapping[str, Shape]) -> tuple[int, int] | None:
    """Return the widths (in, out) of a Linear whose module holds these shapes, 0 where they do not tell.

    None is where there is no such Linear.
    """
    sizes = [(found[end], sizes) for end, sizes in _tensors_of(config).items()]
    for form in _forms_of(config, module):
        widths: dict[str, int] = {}
        pairs = [pair for shape, names in sizes for pair in zip(shape, names, strict=False)]
        is_like = all(len(shape) == len(names) for shape, names in sizes)
        if is_like and all(n >= 1 and _is_size(n, size, form, widths) for n, size in pairs):
            return widths.get("in", 0), widths.get("out", 0)
    return None


def _is_size(number: int, size: str, form: Mapping[str, Any], widths: dict[str, int]) -> bool:
    """Say whether a number is a size, see `Method`; the first that tells of a width decides on it."""
    if size == "1" or size in form:
        return bool(number == form.get(size, 1))
    pairs, _, size = size.rpartition("-")
    side, _, divisor = size.partition("/")
    many = (1 + math.isqrt(1 + 8 * number)) // 2 if pairs else number
    width = many * form[divisor] if divisor else many
    is_whole = not pairs or many * (many - 1) // 2 == number
    return bool(is_whole and widths.setdefault(side, width) == width)


def _tensors_of(config: PeftConfig) -> Mapping[str, Sequence[str]]:
    """Return the sizes of the tensors of each module: those of a method, of ETHER's variant and sides."""
    if isinstance(config, EtherConfig):
        sides, letters = {"input": "in", "output": "out"}, "u" if config.variant == "ether" else "uv"
        chosen = sides if config.sides == "both" else [str(config.sides)]
        return {f"ether_{s}_{x}": ("num_blocks", f"{sides[s]}/num_blocks") for s in chosen for x in letters}
    pairs = [tensor.split("=") for tensor in method_of(config).tensors.split()]
    return {end: sizes.split(",") for end, sizes in pairs}


def _forms_of(config: PeftConfig, module: str) -> list[dict[str, Any]]:
    """Return the settings that a module may have: of ETHER, its number of blocks may be one of several.

    A pattern with regex operators is never evaluated: from a stranger it may take forever. Its number of
    blocks is allowed everywhere instead, and the tensors say where it holds.
    """
    settings = settings_of(config)
    if not isinstance(config, EtherConfig):
        return [settings]
    patterns, allowed = config.num_blocks_pattern, {config.num_blocks, *config.num_blocks_pattern.values()}
    if all(map(is_plain, patterns)):
        named = {blocks for name, blocks in patterns.items() if f".{module}".endswith(f".{name}")}
        allowed = named or {config.num_blocks}
    return [settings | {"num_blocks": blocks} for blocks in sorted(allowed)]


def usable_values(config: PeftConfig, tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Return tensors in float32, by sorted name; their layout was checked.

    Of ETHER only directions matter: a block whose norm float32 could not square is scaled by a power of two,
    which leaves its direction exactly as it is.
    """
    ordered = {name: tensors[name] for name in sorted(tensors)}
    if isinstance(config, EtherConfig):
        finite(ordered, where)  # before float64 is narrowed, whose blocks may be of any norm
        return {name: _with_safe_norms(tensor, name, where) for name, tensor in ordered.items()}
    usable = finite({name: tensor.float() for name, tensor in ordered.items()}, where)
    for name, tensor in usable.items():
        if name.endswith(".hra_u"):
            _check_directions((torch.linalg.vector_norm(tensor, dim=0) == 0), name, where)
    return usable


def _with_safe_norms(tensor: Tensor, name: str, where: str) -> Tensor:
    wide = tensor.double()
    largest = wide.abs().amax(dim=1, keepdim=True)
    _check_directions((largest < torch.finfo(torch.float64).tiny).flatten(), name, where)
    exponent = torch.frexp(largest).exponent
    fits = (exponent > -SAFE_EXPONENT) & (exponent < SAFE_EXPONENT)
    return (wide * 2.0 ** torch.where(fits, 0, -exponent).double()).float()


def _check_directions(is_zero: Tensor, name: str, where: str) -> None:
    if is_zero.any():
        place = f"block {int(is_zero.nonzero()[0])} of {printable(name)}"
        raise ValueError(f"{where}: {place} is zero and has no direction; use another save")


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what PEFT says of kernels, initial values and second adapters to itself: none of it is amiss."""
    with warnings.catch_warnings():
        for message in _QUIET:
            warnings.filterwarnings("ignore", message=message)
        yield
