"""Converted checkpoints compute what the authors' code computes, or are refused with the reason."""

import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import Patch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PhiConfig, PhiForCausalLM

from ether_diffusion.adapters import load_ether, read_adapter
from ether_diffusion.adapters.convert import Architecture, Side, convert_checkpoint
from ether_diffusion.tuner import EtherLinear

WIDTH, WIDE, HEADS, VOCABULARY = 32, 64, 4, 48
PARTS: dict[Architecture, dict[str, str]] = {
    "llama": {
        "attn.proj": "self_attn.o_proj",
        "mlp.fc_1": "mlp.gate_proj",
        "mlp.fc_2": "mlp.up_proj",
        "mlp.proj": "mlp.down_proj",
    },
    "phi": {"attn.proj": "self_attn.dense", "mlp.fc": "mlp.fc1", "mlp.proj": "mlp.fc2"},
}


def tiny_model(architecture: Architecture, groups: int = HEADS) -> nn.Module:
    sizes = {
        "hidden_size": WIDTH,
        "intermediate_size": WIDE,
        "num_hidden_layers": 2,
        "vocab_size": VOCABULARY,
    }
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": groups, "tie_word_embeddings": False}
    config: dict[str, Any] = sizes | heads | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    is_llama = architecture == "llama"
    model = LlamaForCausalLM(LlamaConfig(**config)) if is_llama else PhiForCausalLM(PhiConfig(**config))
    return model.eval()


# The authors' mathematics, from their description: weights are reshaped, then multiplied block by block.


def official_h(kind: str, r: Tensor, r2: Tensor | None) -> Tensor:
    """Block matrices (n, m, m) from raw vectors (n, m)."""

    def projection(x: Tensor) -> Tensor:
        return x[:, :, None] * x[:, None, :] / (x * x).sum(-1)[:, None, None]

    identity = torch.eye(r.shape[1]).expand(len(r), -1, -1)
    if kind == "ether":
        return identity - 2 * projection(r)
    assert r2 is not None
    return identity - projection(r) + projection(r2)


def official_direct(weight: Tensor, h: Tensor) -> Tensor:
    rows, width = weight.shape
    blocks = weight.reshape(len(h), rows, width // len(h))
    return torch.einsum("rfm,rmn->rfn", blocks, h).reshape(rows, width)


def official_transposed(weight: Tensor, h: Tensor) -> Tensor:
    rows, width = weight.shape
    return torch.einsum("rnm,rmd->rnd", h, weight.reshape(len(h), rows // len(h), width)).reshape(rows, width)


@dataclass
class Training:
    """A checkpoint as the authors' code would leave it, and the weights that it then computes with."""

    kind: str
    num_blocks: int = 1
    parts: tuple[str, ...] = ()
    letters: str = ""
    flip_side: bool = False
    head: bool = False
    architecture: Architecture = "llama"
    groups: int = HEADS
    state: dict[str, Tensor] = field(default_factory=dict)

    def vectors(self, prefix: str, letter: str, first: int, second: int) -> list[Tensor]:
        count = {"ether": 1, "etherplus": 2, "etherplusHH": 4}[self.kind]
        made = []
        for number in range(1, count + 1):
            r = torch.randn(self.num_blocks, (first if number < 3 else second) // self.num_blocks)
            made.append(r)
            # q, k and v are stored with a leading axis of 1
            stored = r[None] if letter else r
            self.state[f"{prefix}.ether_R{'' if number == 1 else number}{letter}"] = stored
        return made

    def transform(self, weight: Tensor, prefix: str, *, letter: str = "", flipped: bool = False) -> Tensor:
        """Add vectors for a module to the checkpoint and return W' as the authors' forward makes it."""
        rows, width = weight.shape
        first, second = (rows, width) if letter or flipped else (width, rows)
        r = self.vectors(prefix, letter, first, second)
        h = official_h(self.kind, r[0], r[1] if len(r) > 1 else None)
        weight = official_transposed(weight, h) if letter or flipped else official_direct(weight, h)
        if self.kind != "etherplusHH":
            return weight
        h2 = official_h(self.kind, r[2], r[3])
        return official_direct(weight, h2) if letter else official_transposed(weight, h2)

    def fused(self, model: nn.Module, layer: int) -> dict[str, Tensor]:
        """Return q', k' and v' by way of lit-gpt's fused weight: per group queries, key, value."""
        size, per_group = WIDTH // HEADS, HEADS // self.groups
        attention = model.get_submodule(f"model.layers.{layer}.self_attn")
        heads = {x: attention.get_parameter(f"{x}_proj.weight").detach().split(size) for x in "qkv"}
        order = [
            (x, i)
            for g in range(self.groups)
            for x, i in [*(("q", g * per_group + j) for j in range(per_group)), ("k", g), ("v", g)]
        ]
        weight = torch.cat([heads[x][i] for x, i in order])
        rows = {x: [r for r, (y, _) in enumerate(order) if y == x] for x in "qkv"}
        picked = {x: torch.cat([torch.arange(r * size, (r + 1) * size) for r in rows[x]]) for x in "qkv"}
        prefix = f"transformer.h.{layer}.attn.attn"
        return {x: self.transform(weight[picked[x]], prefix, letter=x) for x in self.letters}

    def run(self, model: nn.Module) -> dict[str, Tensor]:
        """Fill the checkpoint and return W' by the name of transformers' module."""
        changed = {}
        for layer in range(2):
            for x, weight in self.fused(model, layer).items():
                changed[f"model.layers.{layer}.self_attn.{x}_proj"] = weight
            for part in self.parts:
                name = f"model.layers.{layer}.{PARTS[self.architecture][part]}"
                weight = model.get_parameter(f"{name}.weight").detach()
                flipped = self.flip_side and part == "mlp.proj" and self.kind != "etherplusHH"
                changed[name] = self.transform(weight, f"transformer.h.{layer}.{part}", flipped=flipped)
        if self.head:
            changed["lm_head"] = self.transform(model.get_parameter("lm_head.weight").detach(), "lm_head")
        return changed

    def save(self, folder: Path) -> Path:
        path = folder / "lit_model_ether_finetuned.pth"
        torch.save({"model": self.state}, path)
        return path


def is_of_side(name: str, side: Side | None, training: Training) -> bool:
    is_output = name.endswith(("q_proj", "k_proj", "v_proj")) or (
        training.flip_side and name.endswith(("down_proj", "fc2"))
    )
    return side is None or is_output == (side == "output")


ALL_LLAMA = ("attn.proj", "mlp.fc_1", "mlp.fc_2", "mlp.proj")
OF_PHI = ("attn.proj", "mlp.fc", "mlp.proj")
CONVERTIBLE: list[tuple[Training, Side | None]] = [
    (Training("ether", letters="qv"), None),
    (Training("ether", 4, letters="qkv"), None),
    (Training("etherplus", 4, letters="qv"), None),
    (Training("ether", 4, letters="q", groups=2), None),
    (Training("etherplus", 2, letters="kv", groups=2), None),
    (Training("ether", parts=ALL_LLAMA, head=True), None),
    (Training("etherplusHH", parts=ALL_LLAMA, letters="qkv", head=True), None),
    (Training("etherplusHH", parts=OF_PHI, letters="qv", architecture="phi"), None),
    (Training("etherplus", parts=ALL_LLAMA, letters="qv"), "input"),
    (Training("etherplus", parts=ALL_LLAMA, letters="qv"), "output"),
    (Training("ether", 4, parts=ALL_LLAMA, letters="kv", groups=2, flip_side=True), "output"),
]


@pytest.mark.parametrize(("training", "side"), CONVERTIBLE)
def test_a_converted_checkpoint_computes_what_the_authors_code_computes(
    training: Training, side: Side | None, tmp_path: Path
) -> None:
    model = tiny_model(training.architecture, training.groups)
    changed = training.run(model)
    checkpoint = training.save(tmp_path)
    folder = convert_checkpoint(
        checkpoint, tmp_path / "adapter", architecture=training.architecture, side=side
    )
    load_ether(model, folder)
    expected = {name: w for name, w in changed.items() if is_of_side(name, side, training)}
    assert set(read_adapter(folder).projections()) == set(expected)
    for name, weight in expected.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, EtherLinear)
        x = torch.randn(3, weight.shape[1])
        with torch.no_grad():
            torch.testing.assert_close(
                layer(x), F.linear(x, weight, layer.base_linear.bias), rtol=1e-4, atol=1e-5
            )


MIXED = Training("etherplus", parts=("attn.proj",), letters="qv")
REFUSED: list[tuple[Training, Side | None, str]] = [
    (Training("ether", 4, parts=("attn.proj",)), None, "groups of output rows.*rank num_blocks²"),
    (Training("etherplusHH", 4, letters="qv"), None, r"attn\.attn\.q is transformed .* in 4 blocks"),
    (MIXED, None, r"mixes sides \(input, output\).*--side"),
    (Training("ether", letters="qv"), "input", "no projection of the checkpoint is transformed on its input"),
    (Training("etherplusHH", letters="qv"), "output", "would drop half"),
    (Training("ether", parts=("mlp.proj",)), None, "adapts mlp.proj alone"),
]


@pytest.mark.parametrize(("training", "side", "message"), REFUSED)
def test_another_map_is_refused_with_the_reason(
    training: Training, side: Side | None, message: str, tmp_path: Path
) -> None:
    training.run(tiny_model(training.architecture))
    checkpoint = training.save(tmp_path)
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(checkpoint, tmp_path / "adapter", architecture="llama", side=side)
    assert not (tmp_path / "adapter").exists()


def test_the_official_input_side_is_another_map_in_blocks() -> None:
    # why the refusal: the same vectors, as the paper's block diagonal, give another weight
    weight, r = torch.randn(16, 8), torch.randn(4, 2)
    h = official_h("ether", r, None)
    assert (official_direct(weight, h) - weight @ torch.block_diag(*h)).abs().max() > 0.1


ONE, FUSED = "transformer.h.0.attn.proj.ether_R", "transformer.h.{}.attn.attn.ether_Rq"
OTHER: list[tuple[object, str]] = [
    ({"model": {ONE: torch.zeros(2, 4, 4)}}, "Htype oft"),
    ({"model": {FUSED.format(0): torch.zeros(1, 2, 4, 4)}}, "Htype oft"),
    ({"model": {"transformer.h.0.attn.proj.linear.weight": torch.zeros(2, 2)}}, "is no vector of ETHER"),
    ({"model": {"transformer.h.0.mlp.gate.ether_R": torch.ones(1, 8)}}, "has no place in architecture"),
    ({"model": {f"{ONE}2": torch.ones(1, 8)}}, "some of its vectors only"),
    ({"model": {}}, "holds no vectors of ETHER"),
    ([1, 2], "holds no vectors of ETHER"),
    ({FUSED.format(n): torch.ones(1, 1 + n, 8 // (1 + n)) for n in (0, 1)}, r"numbers of blocks \(1, 2\)"),
]


@pytest.mark.parametrize(("state", "message"), OTHER)
def test_other_checkpoints_are_refused(state: object, message: str, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(tmp_path / "other.pth", tmp_path / "adapter", architecture="llama")
    assert not (tmp_path / "adapter").exists()


class Intruder:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("import pathlib; pathlib.Path('intruder').touch()",)


@pytest.mark.parametrize("write", [torch.save, lambda x, p: p.write_bytes(pickle.dumps(x, protocol=2))])
def test_a_checkpoint_with_code_in_it_is_not_run(write: object, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.chdir(tmp_path)
    assert callable(write)
    write({"model": Intruder()}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match="not a torch checkpoint of tensors alone"):
        convert_checkpoint(tmp_path / "bad.pth", tmp_path / "adapter", architecture="llama")
    assert [p.name for p in tmp_path.iterdir()] == ["bad.pth"]


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="lit_model_ether_finetuned"):
        convert_checkpoint(tmp_path / "none.pth", tmp_path / "adapter", architecture="llama")
