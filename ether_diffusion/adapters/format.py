"""What an adapter holds, as values: tensors by part, what it says of itself, its base's fingerprint."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from peft import PeftConfig
from pydantic import ConfigDict, Field
from torch import Tensor

from ether_diffusion.adapters.methods import modules_of, title_of
from ether_diffusion.adapters.tensor_file import Shape
from ether_diffusion.reflections import Transform, Vectors
from ether_diffusion.strict_json import Json, parse_json, validate
from ether_diffusion.tuner.quantized import norm_of
from ether_diffusion.wording import listed, printable

if TYPE_CHECKING:
    from ether_diffusion.adapters.control_encoder import ControlEncoder

CONFIG_NAME, TENSORS_NAME = "adapter_config.json", "adapter_model.safetensors"
CONTROL_CONFIG_NAME, ENCODER_NAME = "control_config.json", "control_encoder.safetensors"
CARD_NAME, PICKLE_NAME = "README.md", "adapter_model.bin"
EXPORT_NAME = "pytorch_lora_weights.safetensors"
"""The LoRA file that diffusers prefers over every other file of a folder."""

FORMAT_VERSION, PREFIX = 1, "ether."
"""Of our entries in the header of a file of tensors."""
FLOAT32_TOLERANCE = 1e-6
"""Relative; norms are stored with nine digits and summed in float64."""

Fact = str | int | float | bool
Component = str
"""A component's name in its pipeline; the denoiser is "unet" whatever it is called there."""
BaseMatch = Literal["same", "other weights", "other architecture"]
_CLOSED = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


@dataclass(frozen=True)
class BaseFingerprint:
    """What tells an adapter's base from another architecture and from other weights, without a copy.

    Attributes:
        architecture: hash over the adapted modules' names and weight shapes.
        norms: Frobenius norm of each adapted base weight, in the order of the sorted names.
        rounding: relative shift of a norm that the base's dtype explains by itself; 0 for float32.
    """

    __pydantic_config__ = _CLOSED

    architecture: Annotated[str, Field(pattern="^[A-Za-z0-9]{1,64}$")]
    norms: tuple[Annotated[float, Field(ge=0)], ...]
    rounding: Annotated[float, Field(ge=0, le=0.1)] = 0.0

    @property
    def id(self) -> str:
        """A short name to print. Bases that compare as the same may differ in it, after the dash."""
        rounded = ",".join(f"{norm:.3g}" for norm in self.norms)
        return f"{self.architecture}-{hashlib.sha256(rounded.encode()).hexdigest()[:6]}"

    def compare(self, other: "BaseFingerprint") -> BaseMatch:
        """Say whether two bases are the same up to the rounding of their dtypes."""
        if self.architecture != other.architecture or len(self.norms) != len(other.norms):
            return "other architecture"
        tolerance = FLOAT32_TOLERANCE + max(self.rounding, other.rounding)
        pairs = zip(self.norms, other.norms, strict=True)
        same = all(math.isclose(mine, theirs, rel_tol=tolerance) for mine, theirs in pairs)
        return "same" if same else "other weights"


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

    __pydantic_config__ = _CLOSED

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

    def projections(self) -> dict[str, Transform]:
        """Return what ETHER does to each adapted module, by sorted name."""

        def side(name: str, label: str) -> Vectors | None:
            u = self.tensors.get(f"{name}.ether_{label}_u")
            return None if u is None else Vectors(u, self.tensors.get(f"{name}.ether_{label}_v"))

        return {name: Transform(side(name, "input"), side(name, "output")) for name in self.modules()}


@dataclass(frozen=True)
class Adapter:
    """An adapter of any method: one part for each component that it changes, the denoiser's first.

    `config`, `tensors`, `metadata` and `projections` are those of the first part. A control adapter has an
    encoder, which may stand without parts; `name` is where it was read from, for people.
    """

    parts: Mapping[Component, AdapterPart]
    encoder: "ControlEncoder | None" = None
    name: str = "the adapter"

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

    def projections(self) -> dict[str, Transform]:
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


def fingerprint(weights: Mapping[str, Tensor]) -> BaseFingerprint | None:
    """Return the fingerprint of the base weights (out, in) by module name; None on the meta device."""
    if any(weight.is_meta for weight in weights.values()):
        return None
    shapes, norms, rounding = [], [], 0.0
    for name in sorted(weights):
        weight, kind = weights[name].detach(), torch.finfo(weights[name].dtype)
        shapes.append((name, list(weight.shape)))
        norms.append(norm_of(weight))
        # Rounding moves each of N entries by up to eps / 2 of itself, independently: the norm then moves by
        # about 0.35 eps / √N for normally distributed entries. Measured 0.3 to 0.5; 4 is for heavy tails.
        rounding = max(rounding, 0.0 if kind.bits >= 32 else 4 * kind.eps / math.sqrt(weight.numel()))
    architecture = hashlib.sha256(json.dumps(shapes).encode()).hexdigest()[:12]
    return BaseFingerprint(architecture, tuple(norms), float(f"{rounding:.3g}"))


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


def check_version(version: Json, where: str, newest: int = FORMAT_VERSION) -> None:
    """Refuse a format that a newer release wrote."""
    if isinstance(version, int) and version > newest and not isinstance(version, bool):
        found = f"format {version}, and {newest} is read"
        raise ValueError(f"{where} was made by a newer release ({found}); upgrade ether-diffusion")


def parse_metadata(header: Mapping[str, str], where: str) -> AdapterMetadata:
    """Return what the header's `ether.*` entries say; the defaults for a file that plain PEFT wrote."""
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
    """Return the header's entries: "format" as safetensors' users write it, and ours as JSON."""
    wrong = [name for name, fact in metadata.training.items() if not is_fact(fact)]
    if wrong:
        raise ValueError(f"training facts must be text, finite numbers or flags; {listed(wrong)} is not")
    entries = asdict(metadata).items()
    return {"format": "pt"} | {f"{PREFIX}{n}": json.dumps(v, separators=(",", ":")) for n, v in entries}


def is_fact(value: object) -> bool:
    """Say whether a value is text, a finite number, or true or false."""
    return isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value))
