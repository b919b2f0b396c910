"""Convert checkpoints of the authors' language-model code to PEFT adapters, where both compute the same map.

The authors' code (github.com/mwbini/ether, built on lit-gpt) names its vectors `ether_R` and `ether_R2` to
`ether_R4`. On the output side it is the paper's block diagonal. On the input side it reshapes W (out, in) to
(num_blocks, out, in / num_blocks) without moving axes, so that block b meets all input chunks of the b-th
group of output rows: the paper's map at num_blocks = 1 only, and a map of rank num_blocks² otherwise.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor

from ether_diffusion.adapters import AdapterMetadata, AdapterPart, write_adapter
from ether_diffusion.tuner import EtherConfig
from ether_diffusion.tuner.config import Sides

Architecture = Literal["llama", "phi"]
Side = Literal["input", "output"]
Value = TypeVar("Value")

_FUSED = {f"attn.attn.{letter}": f"self_attn.{letter}_proj" for letter in "qkv"}
_LLAMA = {"attn.proj": "self_attn.o_proj", "mlp.fc_1": "mlp.gate_proj", "mlp.fc_2": "mlp.up_proj"}
_NAMES: dict[str, dict[str, str]] = {
    "llama": {**_FUSED, **_LLAMA, "mlp.proj": "mlp.down_proj"},
    "phi": {**_FUSED, "attn.proj": "self_attn.dense", "mlp.fc": "mlp.fc1", "mlp.proj": "mlp.fc2"},
}
"""transformers' names of the projections in a block by the authors'."""
_KEY = re.compile(r"(?:(transformer\.h\.\d+)\.([\w.]+)|(lm_head))\.ether_R([234]?)([qkv]?)")

Vectors = dict[int, Tensor]
"""R, R2, R3, R4 (num_blocks, width / num_blocks) of a projection, by their number from 1."""
Place = tuple[str, str]
"""The prefix of a block, "transformer.h.0" or "", and a projection in it; the fused one's end in a letter."""


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
        raise ValueError(f"architecture={architecture!r} is not known; use one of {', '.join(_NAMES)}")
    placed = _placed(_read_official(Path(checkpoint)), side)
    tensors: dict[str, Tensor] = {}
    for (block, part), sides in placed.items():
        shown = ".".join(filter(None, (block, part)))
        if "input" in sides and len(sides["input"][0]) > 1:
            raise ValueError(
                f"{shown} is transformed on its input side in {len(sides['input'][0])} blocks, which the "
                "authors' code applies to groups of output rows: not the paper's map, but one of rank "
                "num_blocks², which no adapter computes; num_blocks=1 is converted"
            )
        if block and part not in _NAMES[architecture]:
            known = ", ".join(_NAMES[architecture])
            raise ValueError(f"{shown} has no place in architecture={architecture!r}, which has {known}")
        name = f"model.layers.{block.rpartition('.')[2]}.{_NAMES[architecture][part]}" if block else part
        for label, vectors in sides.items():
            for letter, vector in zip("uv", vectors, strict=False):
                tensors[f"{name}.ether_{label}_{letter}"] = vector.contiguous()
    found = [vectors for sides in placed.values() for vectors in sides.values()]
    where: set[Sides | None] = {"both" if len(sides) == 2 else next(iter(sides)) for sides in placed.values()}
    config = EtherConfig(
        variant=_only({"ether" if len(vectors) == 1 else "ether_plus" for vectors in found}, "variants"),
        num_blocks=_only({len(vectors[0]) for vectors in found}, "numbers of blocks"),
        sides=_only(where, "sides"),
        target_modules=sorted({name.rpartition(".")[0] for name in tensors}),
        base_model_name_or_path=base_model,
    )
    metadata = AdapterMetadata(base_model=base_model, training={"converted_from": "mwbini/ether"})
    write_adapter(folder, AdapterPart(config, tensors, metadata))
    return Path(folder)


def _read_official(checkpoint: Path) -> dict[Place, Vectors]:
    """Read the vectors of an official checkpoint, `lit_model_ether_finetuned.pth`, as tensors only."""
    if not checkpoint.is_file():
        raise FileNotFoundError(f"{checkpoint} is not a file; name a lit_model_ether_finetuned.pth")
    try:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except Exception as error:  # broken and hostile files raise anything, from KeyError to UnpicklingError
        raise ValueError(f"{checkpoint} is not a torch checkpoint of tensors alone, so not read") from error
    state = state.get("model", state) if isinstance(state, dict) else {}
    modules: dict[Place, Vectors] = {}
    for key, tensor in state.items():
        match = _KEY.fullmatch(str(key))
        if match is None or not isinstance(tensor, Tensor):
            raise ValueError(f"{checkpoint} holds {str(key)[:120]!r}, which is no vector of ETHER")
        block, part, head, number, letter = match.groups()
        rows = tensor[0] if tensor.dim() == 3 and len(tensor) == 1 else tensor  # q, k and v: (1, n, d / n)
        if rows.dim() != 2 or not rows.is_floating_point():
            raise ValueError(
                f"{key} has the shape {tuple(tensor.shape)}, where ETHER has (num_blocks, width / "
                "num_blocks); checkpoints with Htype oft are not ETHER and cannot be converted"
            )
        place = block or "", head or (f"{part}.{letter}" if letter else part)
        modules.setdefault(place, {})[int(number or 1)] = rows.float()
    if not modules:
        raise ValueError(f"{checkpoint} holds no vectors of ETHER; name one of the authors' training")
    for place, vectors in modules.items():
        if set(vectors) not in ({1}, {1, 2}, {1, 2, 3, 4}):
            name = ".".join(filter(None, place))
            raise ValueError(f"{name} in {checkpoint} has some of its vectors only; the file is not whole")
    return modules


def _placed(modules: Mapping[Place, Vectors], side: Side | None) -> dict[Place, dict[Side, list[Tensor]]]:
    """Return u and v by the side that the authors' code applies them to, of one side where that is asked."""
    # every part but these has the model's width where the first vectors act
    others = ("attn.attn.k", "attn.attn.v", "mlp.proj")
    widths = {vectors[1].numel() for (_, part), vectors in modules.items() if part not in others}
    if not widths and any(part == "mlp.proj" for _, part in modules):
        raise ValueError("the checkpoint adapts mlp.proj alone, and does not show on which side")
    placed: dict[Place, dict[Side, list[Tensor]]] = {}
    for place, vectors in modules.items():
        part, ordered = place[1], [vectors[number] for number in sorted(vectors)]
        # q, k and v transform their output first, others their input; flip_side moves the MLP's last
        # projection to its narrower output, and only its width shows it
        is_flipped = part == "mlp.proj" and len(ordered) < 4 and ordered[0].numel() == max(widths)
        sides: tuple[Side, Side] = (
            ("output", "input") if part in _FUSED or is_flipped else ("input", "output")
        )
        placed[place] = {sides[0]: ordered[:2]} | ({sides[1]: ordered[2:]} if len(ordered) == 4 else {})
    if side is None:
        return placed
    if any(len(sides) == 2 for sides in placed.values()):
        raise ValueError(f"side={side!r} would drop half of a two-sided checkpoint; leave it out")
    chosen = {place: sides for place, sides in placed.items() if side in sides}
    if not chosen:
        raise ValueError(f"no projection of the checkpoint is transformed on its {side} side")
    return chosen


def _only(values: set[Value], what: str) -> Value:
    if len(values) > 1:
        found, advice = ", ".join(sorted(map(str, values))), "convert one with side (--side) at a time"
        raise ValueError(f"the checkpoint mixes {what} ({found}), and an adapter has one; {advice}")
    return next(iter(values))
