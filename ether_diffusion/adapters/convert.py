"""Convert checkpoints of the authors' language-model code to PEFT adapters, where both compute the same map.

The authors' code (github.com/mwbini/ether, built on lit-gpt) names its vectors `ether_R` and `ether_R2` to
`ether_R4`. On the output side it is the paper's block diagonal. On the input side it reshapes W (out, in) to
(num_blocks, out, in / num_blocks) without moving axes, so that block b meets all input chunks of the b-th
group of output rows: the paper's map at num_blocks = 1 only, and a map of rank num_blocks² otherwise.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor

from ether_diffusion.adapters import AdapterMetadata, AdapterPart, write_adapter
from ether_diffusion.tuner import EtherConfig
from ether_diffusion.tuner.config import Sides, Variant

Architecture = Literal["llama", "phi"]
Side = Literal["input", "output"]
Placement = dict[Side, tuple[Tensor, Tensor | None]]
"""u and v by the side that they transform."""
Value = TypeVar("Value")

_TRANSFORMERS_NAMES: dict[Architecture, dict[str, str]] = {
    "llama": {
        "attn.attn.q": "self_attn.q_proj",
        "attn.attn.k": "self_attn.k_proj",
        "attn.attn.v": "self_attn.v_proj",
        "attn.proj": "self_attn.o_proj",
        "mlp.fc_1": "mlp.gate_proj",
        "mlp.fc_2": "mlp.up_proj",
        "mlp.proj": "mlp.down_proj",
    },
    "phi": {
        "attn.attn.q": "self_attn.q_proj",
        "attn.attn.k": "self_attn.k_proj",
        "attn.attn.v": "self_attn.v_proj",
        "attn.proj": "self_attn.dense",
        "mlp.fc": "mlp.fc1",
        "mlp.proj": "mlp.fc2",
    },
}
_KEY = re.compile(r"(?:transformer\.h\.(\d+)\.([\w.]+)|(lm_head))\.ether_R([234]?)([qkv]?)")


@dataclass(frozen=True, eq=False)
class OfficialModule:
    """One adapted projection of an official checkpoint.

    Attributes:
        layer: index of the transformer block; None for the language-model head.
        part: name inside the block, "attn.proj"; the fused projection's parts end in ".q", ".k" or ".v".
        vectors: R, R2, R3, R4 (num_blocks, width / num_blocks) by their number, 1 to 4.
    """

    layer: int | None
    part: str
    vectors: dict[int, Tensor]

    @property
    def name(self) -> str:
        return self.part if self.layer is None else f"transformer.h.{self.layer}.{self.part}"

    @property
    def num_blocks(self) -> int:
        return len(self.vectors[1])

    @property
    def is_fused(self) -> bool:
        return self.part in ("attn.attn.q", "attn.attn.k", "attn.attn.v")

    @property
    def variant(self) -> Variant:
        return "ether_plus" if 2 in self.vectors else "ether"

    def sides(self, model_width: int) -> Placement:
        """Return u and v by the side that the official code applies them to."""
        first = (self.vectors[1], self.vectors.get(2))
        second = (self.vectors[3], self.vectors[4]) if 3 in self.vectors else None
        if (
            second is not None
        ):  # Htype "etherplusHH": q, k and v transform their output first, others their input
            return {"output": first, "input": second} if self.is_fused else {"input": first, "output": second}
        # flip_side moves the MLP's last projection to its narrower output; only its width shows it
        is_flipped = self.part == "mlp.proj" and first[0].numel() == model_width
        return {"output" if self.is_fused or is_flipped else "input": first}


def convert_checkpoint(
    checkpoint: str | Path,
    folder: str | Path,
    *,
    architecture: Architecture,
    side: Side | None = None,
    base_model: str | None = None,
) -> Path:
    """Write the ETHER vectors of an official checkpoint as an adapter for the transformers model it adapts.

    Name in `architecture` whose module names to use: "llama" (also Mistral and Gemma) or "phi". A checkpoint
    of mixed one-sided projections gives one adapter per `side`; they change different modules, so that both
    together are the original.

    Raises:
        FileNotFoundError: the checkpoint is not there.
        ValueError: it is no such checkpoint, or computes another map than the paper's.
    """
    if architecture not in get_args(Architecture):
        raise ValueError(
            f"architecture={architecture!r} is not known; use one of {', '.join(_TRANSFORMERS_NAMES)}"
        )
    modules = read_official(Path(checkpoint))
    write_adapter(
        folder, official_adapter(modules, architecture=architecture, side=side, base_model=base_model)
    )
    return Path(folder)


def read_official(checkpoint: Path) -> list[OfficialModule]:
    """Read the modules of an official checkpoint, `lit_model_ether_finetuned.pth`, as tensors only.

    Raises:
        FileNotFoundError: the checkpoint is not there.
        ValueError: it is no such checkpoint.
    """
    if not checkpoint.is_file():
        raise FileNotFoundError(
            f"{checkpoint} is not a file; name the lit_model_ether_finetuned.pth of a training"
        )
    try:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except Exception as error:  # broken and hostile files raise anything, from KeyError to UnpicklingError
        raise ValueError(
            f"{checkpoint} is not a torch checkpoint of tensors alone; it is not opened"
        ) from error
    state = state.get("model", state) if isinstance(state, dict) else {}
    found: dict[tuple[int | None, str], dict[int, Tensor]] = {}
    for key, tensor in state.items():
        match = _KEY.fullmatch(str(key))
        if match is None or not isinstance(tensor, Tensor):
            raise ValueError(
                f"{checkpoint} holds {str(key)[:120]!r}, which is no vector of ETHER; a checkpoint "
                "of the authors' training holds nothing else"
            )
        layer, part, head, number, letter = match.groups()
        place = (None if head else int(layer), head or (f"{part}.{letter}" if letter else part))
        found.setdefault(place, {})[int(number or 1)] = _vectors(str(key), tensor)
    if not found:
        raise ValueError(
            f"{checkpoint} holds no vectors of ETHER; name a checkpoint of the authors' training"
        )
    modules = [OfficialModule(layer, part, vectors) for (layer, part), vectors in found.items()]
    for module in modules:
        if set(module.vectors) not in ({1}, {1, 2}, {1, 2, 3, 4}):
            raise ValueError(
                f"{module.name} in {checkpoint} has some of its vectors only; the file is not whole"
            )
    return modules


def _vectors(key: str, tensor: Tensor) -> Tensor:
    rows = tensor[0] if tensor.dim() == 3 and len(tensor) == 1 else tensor  # q, k and v: (1, n, d / n)
    if rows.dim() != 2 or not rows.is_floating_point():
        raise ValueError(
            f"{key} has the shape {tuple(tensor.shape)}, where ETHER has (num_blocks, width / num_blocks); "
            "checkpoints with Htype oft are not ETHER and cannot be converted"
        )
    return rows.float()


def official_adapter(
    modules: list[OfficialModule],
    *,
    architecture: Architecture,
    side: Side | None = None,
    base_model: str | None = None,
) -> AdapterPart:
    """Return the adapter that computes what the official modules compute.

    Raises:
        ValueError: one of them computes something else than the paper's block diagonal, or they differ in
            what one adapter has only once.
    """
    placed = _placed(modules, side)
    for module, sides in placed:
        if "input" in sides and module.num_blocks > 1:
            raise ValueError(
                f"{module.name} is transformed on its input side in {module.num_blocks} blocks, which the"
                " authors' code applies to groups of output rows instead of chunks of the input: that is not"
                " the paper's map, but one of rank num_blocks², which no adapter computes; num_blocks=1 is"
                " converted"
            )
    tensors: dict[str, Tensor] = {}
    for module, sides in placed:
        name = _transformers_name(module, architecture)
        for label, (u, v) in sides.items():
            tensors[f"{name}.ether_{label}_u"] = u.contiguous()
            if v is not None:
                tensors[f"{name}.ether_{label}_v"] = v.contiguous()
    config = EtherConfig(
        variant=_only({module.variant for module, _ in placed}, "variants"),
        num_blocks=_only({module.num_blocks for module, _ in placed}, "numbers of blocks"),
        sides=_only(
            {_sides(sides) for _, sides in placed}, "sides", "convert one with side (--side) at a time"
        ),
        target_modules=sorted({name.rpartition(".")[0] for name in tensors}),
        base_model_name_or_path=base_model,
    )
    metadata = AdapterMetadata(base_model=base_model, training={"converted_from": "mwbini/ether"})
    return AdapterPart(config, tensors, metadata)


def _placed(modules: list[OfficialModule], side: Side | None) -> list[tuple[OfficialModule, Placement]]:
    # every part but these has the model's width where the first vectors act
    widths = {
        m.vectors[1].numel() for m in modules if m.part not in ("attn.attn.k", "attn.attn.v", "mlp.proj")
    }
    if not widths and any(module.part == "mlp.proj" for module in modules):
        raise ValueError(
            "the checkpoint adapts mlp.proj alone, and does not show on which side; nothing converted"
        )
    placed = [(module, module.sides(max(widths, default=0))) for module in modules]
    if side is None:
        return placed
    if any(len(sides) == 2 for _, sides in placed):
        raise ValueError(f"side={side!r} would drop half of a two-sided checkpoint; leave it out")
    chosen = [(module, sides) for module, sides in placed if side in sides]
    if not chosen:
        raise ValueError(f"no projection of the checkpoint is transformed on its {side} side")
    return chosen


def _sides(placement: Placement) -> Sides:
    return "both" if len(placement) == 2 else next(iter(placement))


def _only(values: set[Value], what: str, advice: str = "no training of the authors writes that") -> Value:
    if len(values) > 1:
        listed = ", ".join(sorted(map(str, values)))
        raise ValueError(f"the checkpoint mixes {what} ({listed}), and an adapter has one; {advice}")
    return next(iter(values))


def _transformers_name(module: OfficialModule, architecture: Architecture) -> str:
    if module.layer is None:
        return module.part
    name = _TRANSFORMERS_NAMES[architecture].get(module.part)
    if name is None:
        known = ", ".join(_TRANSFORMERS_NAMES[architecture])
        raise ValueError(f"{module.name} has no place in architecture={architecture!r}, which has {known}")
    return f"model.layers.{module.layer}.{name}"
