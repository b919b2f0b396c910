"""What an adapter holds, as values: configuration and tensors by part, and what it says of itself."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import TYPE_CHECKING, Annotated

import torch
from peft import PeftConfig
from pydantic import ConfigDict, Field
from torch import Tensor

from ether_diffusion.adapters.fingerprint import BaseFingerprint
from ether_diffusion.adapters.methods import modules_of, title_of
from ether_diffusion.adapters.tensor_file import Shape
from ether_diffusion.reflections import Vectors
from ether_diffusion.strict_json import Json, is_whole, parse_json, validate
from ether_diffusion.wording import listed, printable

if TYPE_CHECKING:
    from ether_diffusion.adapters.control_encoder import ControlEncoder

CONFIG_NAME, TENSORS_NAME = "adapter_config.json", "adapter_model.safetensors"
CONTROL_CONFIG_NAME, ENCODER_NAME = "control_config.json", "control_encoder.safetensors"
CARD_NAME = "README.md"
EXPORT_NAME = "pytorch_lora_weights.safetensors"
"""The LoRA file that diffusers prefers over every other file of a folder."""
PICKLE_NAME = "adapter_model.bin"

FORMAT_VERSION = 1
PREFIX = "ether."
"""Of our entries in the header of a file of tensors."""

Fact = str | int | float | bool
Component = str
"""A component's name in its pipeline; the denoiser is "unet" whatever it is called there."""


@dataclass(frozen=True)
class AdapterMetadata:
    """What an adapter says of itself beside its numbers.

    Attributes:
        format_version: of the `ether.*` entries in the file's header.
        base_model: name or path of the base model, for people.
        base_fingerprint: of the adapted base weights; None in files that plain PEFT wrote.
        trigger: the prompt that calls the subject, e.g. "a photo of sks dog".
        training: flat facts of the training, e.g. {"steps": 800, "learning_rate": 6e-3}.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    format_version: Annotated[int, Field(ge=1)] = FORMAT_VERSION
    base_model: str | None = None
    base_fingerprint: BaseFingerprint | None = None
    trigger: str | None = None
    training: Mapping[str, Fact] = field(default_factory=dict)


@dataclass(frozen=True)
class AdapterPart:
    """What one model takes: tensors are named as in the model, `down_blocks.0….to_q.ether_input_u`."""

    config: PeftConfig
    tensors: dict[str, Tensor]
    metadata: AdapterMetadata = field(default_factory=AdapterMetadata)

    def modules(self) -> dict[str, dict[str, Shape]]:
        """Return the shapes of each adapted module's tensors by their ends, by sorted name."""
        shapes = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}
        return dict(sorted(modules_of(self.config, shapes)[0].items()))

    def projections(self) -> dict[str, tuple[Vectors | None, Vectors | None]]:
        """Return ETHER's raw vectors of each adapted module's input and output side, by sorted name."""

        def side(name: str, label: str) -> Vectors | None:
            u = self.tensors.get(f"{name}.ether_{label}_u")
            return None if u is None else Vectors(u, self.tensors.get(f"{name}.ether_{label}_v"))

        return {name: (side(name, "input"), side(name, "output")) for name in self.modules()}


@dataclass(frozen=True)
class Adapter:
    """An adapter of any method: one part for each component that it changes, the denoiser's first.

    `config`, `tensors`, `metadata` and `projections` are those of the first part.
    """

    parts: Mapping[Component, AdapterPart]
    encoder: "ControlEncoder | None" = None
    """Of a control adapter; it may stand without parts."""
    name: str = "the adapter"
    """Where it was read from, for people."""

    @property
    def first(self) -> AdapterPart:
        """The part of the denoiser, or of the first component where that has none."""
        return next(iter(self.parts.values()))

    @property
    def config(self) -> PeftConfig:
        return self.first.config

    @property
    def tensors(self) -> dict[str, Tensor]:
        return self.first.tensors

    @property
    def metadata(self) -> AdapterMetadata:
        return self.first.metadata if self.parts else AdapterMetadata()

    def projections(self) -> dict[str, tuple[Vectors | None, Vectors | None]]:
        return self.first.projections()

    @property
    def method(self) -> str:
        """The method's name for people: "ETHER+", "LoRA"."""
        return title_of(self.config) if self.parts else "control encoder alone"

    @property
    def num_parameters(self) -> int:
        """Numbers in all parts and the encoder."""
        held = [tensor for part in self.parts.values() for tensor in part.tensors.values()]
        held += [] if self.encoder is None else self.encoder.parameters()
        return sum(tensor.numel() for tensor in held)

    @cached_property
    def hashes(self) -> Mapping[Component, str]:
        """The content hash of each part."""
        return {component: content_hash(part.tensors) for component, part in self.parts.items()}


def content_hash(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 that names an adapter by its numbers, as float32, by sorted name; 64 digits.

    Saving an adapter again, with another trigger or base name, does not change it.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().to("cpu", torch.float32).contiguous()
        digest.update(json.dumps([name, list(tensor.shape)]).encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def check_version(version: Json, where: str) -> None:
    """Refuse a format that a newer release wrote.

    Raises:
        ValueError: as said.
    """
    if is_whole(version) and version > FORMAT_VERSION:  # type: ignore[operator]  # it is a whole number
        raise ValueError(
            f"{where} was made by a newer release (format {version}; this one reads up to {FORMAT_VERSION}); "
            "upgrade ether-diffusion"
        )


def parse_metadata(header: Mapping[str, str], where: str) -> AdapterMetadata:
    """Return what the header's `ether.*` entries say; the defaults for a file that plain PEFT wrote.

    Raises:
        ValueError: an entry is malformed or unknown, or a newer release made the file.
    """
    entries: dict[str, Json] = {
        name.removeprefix(PREFIX): parse_json(text, f"the metadata entry {printable(name)} of {where}")
        for name, text in header.items()
        if name.startswith(PREFIX)
    }
    if not entries:
        return AdapterMetadata()
    check_version(entries.setdefault("format_version", None), where)
    return validate(entries, AdapterMetadata, f"the metadata of {where}")


def metadata_header(metadata: AdapterMetadata) -> dict[str, str]:
    """Return the header's entries: "format" as safetensors' users write it, and ours as JSON.

    Raises:
        ValueError: a training fact is not flat, or not a finite number.
    """
    wrong = [name for name, fact in metadata.training.items() if not _is_fact(fact)]
    if wrong:
        raise ValueError(f"training facts must be text, finite numbers or flags; {listed(wrong)} is not")
    entries = {each.name: getattr(metadata, each.name) for each in fields(metadata)}
    entries["training"] = dict(metadata.training)
    base = entries.pop("base_fingerprint")
    entries["base_fingerprint"] = None if base is None else asdict(base)
    compact = {f"{PREFIX}{name}": json.dumps(value, separators=(",", ":")) for name, value in entries.items()}
    return {"format": "pt"} | compact


def _is_fact(fact: object) -> bool:
    return isinstance(fact, str | bool | int) or (isinstance(fact, float) and math.isfinite(fact))
