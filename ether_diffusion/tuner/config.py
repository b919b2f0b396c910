"""EtherConfig: what an ETHER adapter is, as PEFT stores it in adapter_config.json."""

import re
from dataclasses import dataclass, field
from typing import Literal, get_args

from peft import PeftConfig
from peft.utils import PeftType


def peft_type(name: str) -> PeftType:
    """Return the member of PEFT's `PeftType` of this name, made if PEFT has none.

    PEFT and transformers read `.value` of a method's type, look it up in `PeftType` and in PEFT's mappings.
    An enum is closed, so a new member is entered where `enum` itself enters one: as an attribute, by name and
    by value.
    """
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    setattr(PeftType, name, member)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    PeftType._member_names_.append(name)
    return member


PEFT_TYPE = peft_type("ETHER")

Variant = Literal["ether", "ether_plus"]
Sides = Literal["input", "output", "both"]

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TARGET_PRESETS = {"attention": ATTENTION, "attention_and_feedforward": (*ATTENTION, "ff.net.0.proj")}
"""Named sets of target modules: all attention projections, and with them GEGLU's, as control adapters use."""

_DEFAULT_SIDES: dict[Variant, Sides] = {"ether": "input", "ether_plus": "both"}


def matches_module(pattern: str, module: str) -> bool:
    """Say whether a name or regex means a module of this full name, or the end of it after a dot."""
    return re.match(rf"(.*\.)?({pattern})$", module) is not None


@dataclass
class EtherConfig(PeftConfig):
    """Configuration of an ETHER or ETHER+ adapter (Bini et al. 2024, arXiv:2405.20271).

    Raises:
        ValueError: a field is outside what it can be; the message names the field and the choices.
    """

    variant: Variant = field(
        default="ether",
        metadata={
            "help": "'ether': one reflection per block, a fixed distance from the base. 'ether_plus': the "
            "relaxed I - uuᵀ + vvᵀ, which starts at the base model and is the paper's best."
        },
    )
    num_blocks: int = field(
        default=4,
        metadata={
            "help": "Diagonal blocks per side; must divide the width. Does not change the parameter count."
        },
    )
    sides: Sides | None = field(
        default=None,
        metadata={
            "help": "Which side of W is transformed; default: 'input' for ether, 'both' for ether_plus."
        },
    )
    target_modules: list[str] | set[str] | str | None = field(
        default="attention",
        metadata={
            "help": "Names or a regex of the Linear modules to adapt, 'all-linear', or a preset: 'attention' "
            "(to_q, to_k, to_v, to_out.0) or 'attention_and_feedforward' (and ff.net.0.proj)."
        },
    )
    exclude_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Names or a regex of modules to leave out."}
    )
    num_blocks_pattern: dict[str, int] = field(
        default_factory=dict,
        metadata={
            "help": "Module name or regex -> num_blocks, where it differs, e.g. {'mid_block.*': 8}. "
            "Of several that match a module, the longest holds."
        },
    )
    dropout: float = field(
        default=0.0,
        metadata={
            "help": "Probability of zeroing an input element of an adapted layer in training, as the paper."
        },
    )
    init_weights: bool = field(
        default=True,
        metadata={"help": "True: the paper's start (ETHER+ at the identity). False: u and v independent."},
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the layers to adapt; target_modules must then be a list."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None,
        metadata={"help": "Name of the layer list layers_to_transform counts in, e.g. 'layers'."},
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules to train and save whole."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        if isinstance(self.target_modules, str) and self.target_modules in TARGET_PRESETS:
            self.target_modules = set(TARGET_PRESETS[self.target_modules])
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        self._check_choice("variant", self.variant, get_args(Variant))
        self.sides = self.sides or _DEFAULT_SIDES[self.variant]
        self._check_choice("sides", self.sides, get_args(Sides))
        for name, count in {"num_blocks": self.num_blocks, **self.num_blocks_pattern}.items():
            if not isinstance(count, int) or isinstance(count, bool) or count < 1:
                raise ValueError(f"{name}={count!r} is not a number of blocks; use a whole number from 1")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout={self.dropout!r} is not a probability; use a number from 0 to below 1")
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ValueError("layers_to_transform needs target_modules as a list of names; found a regex")
        if self.layers_pattern and self.layers_to_transform is None:  # PEFT takes an empty one for none
            raise ValueError(
                "layers_pattern says where layers_to_transform counts; give layers_to_transform too"
            )

    @staticmethod
    def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
        if value not in choices:
            raise ValueError(f"{name}={value!r} is not known; use one of {', '.join(map(repr, choices))}")

    def blocks_of(self, module: str) -> int:
        """Return the number of blocks a side of the module of this name has."""
        # by length and not by order: PEFT sorts the patterns when it saves them
        matching = [pattern for pattern in self.num_blocks_pattern if matches_module(pattern, module)]
        return self.num_blocks_pattern[max(sorted(matching), key=len)] if matching else self.num_blocks

    @property
    def has_input_side(self) -> bool:
        """Whether W is transformed on its input side."""
        return self.sides in ("input", "both")

    @property
    def has_output_side(self) -> bool:
        """Whether W is transformed on its output side."""
        return self.sides in ("output", "both")
