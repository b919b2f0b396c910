"""What an adapter file holds, as values: configuration, tensors, and what is known about its base."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from ether_diffusion.adapters.fingerprint import BaseFingerprint
from ether_diffusion.reflections import Vectors
from ether_diffusion.tuner import EtherConfig

FORMAT_VERSION = 1

Fact = str | int | float | bool


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

    format_version: int = FORMAT_VERSION
    base_model: str | None = None
    base_fingerprint: BaseFingerprint | None = None
    trigger: str | None = None
    training: Mapping[str, Fact] = field(default_factory=dict)


@dataclass(frozen=True)
class Adapter:
    """One adapter: tensors are named as in the model, `down_blocks.0….to_q.ether_input_u`."""

    config: EtherConfig
    tensors: dict[str, Tensor]
    metadata: AdapterMetadata = field(default_factory=AdapterMetadata)

    def projections(self) -> dict[str, tuple[Vectors | None, Vectors | None]]:
        """Return the raw vectors of each adapted module's input and output side, by sorted name."""

        def side(name: str, label: str) -> Vectors | None:
            u = self.tensors.get(f"{name}.ether_{label}_u")
            return None if u is None else Vectors(u, self.tensors.get(f"{name}.ether_{label}_v"))

        names = sorted({key.rpartition(".")[0] for key in self.tensors})
        return {name: (side(name, "input"), side(name, "output")) for name in names}


def vector_names(config: EtherConfig) -> tuple[str, ...]:
    """Return the names of the vectors that a module has under `config`, e.g. ("ether_input_u",)."""
    sides = [
        side for side, has in (("input", config.has_input_side), ("output", config.has_output_side)) if has
    ]
    letters = ("u",) if config.variant == "ether" else ("u", "v")
    return tuple(f"ether_{side}_{letter}" for side in sides for letter in letters)
