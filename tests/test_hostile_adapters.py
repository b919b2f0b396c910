"""Files that are no ETHER adapter, or not one of this model, are refused in one sentence; nothing changes.

The numbers are those of the list of bad inputs that the reader is held to: 40 to 52.
"""

import hashlib
import json
import os
import pickle
import random
import re
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, OFTConfig, get_peft_model
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn

from ether_diffusion import EtherConfig
from ether_diffusion.adapter_file import (
    Adapter,
    detach_adapter,
    load_ether,
    read_adapter,
    save_ether,
    write_adapter,
)
from ether_diffusion.reflections import MIN_NORM, Vectors, units
from ether_diffusion.tuner import EtherLinear

TENSORS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
FIRST = "base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k.ether_input_u"


def small_unet(seed: int = 0, **changes: Any) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=8,
        **({"cross_attention_dim": 32} | changes),
    ).eval()


@pytest.fixture(scope="module")
def base() -> UNet2DConditionModel:
    return small_unet()


@pytest.fixture(scope="module")
def good_bytes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("good")
    unet = small_unet()
    unet.add_adapter(EtherConfig())
    save_ether(unet, folder, base_model="stable/base", trigger="a photo of sks dog")
    return {name: (folder / name).read_bytes() for name in (TENSORS, CONFIG)}


@pytest.fixture
def folder(tmp_path: Path, good_bytes: dict[str, bytes]) -> Path:
    """A folder with a good adapter, for a test to spoil."""
    place = tmp_path / "adapter"
    place.mkdir()
    for name, data in good_bytes.items():
        (place / name).write_bytes(data)
    return place


def state(model: nn.Module) -> list[object]:
    """Everything that loading could change: values, modules, flags, what is said to be loaded."""
    values = [(n, hashlib.sha256(t.numpy().tobytes()).hexdigest()) for n, t in model.state_dict().items()]
    modules = [(name, id(module), module.training) for name, module in model.named_modules()]
    flags = [(name, parameter.requires_grad) for name, parameter in model.named_parameters()]
    active = [m.active_adapters for m in model.modules() if isinstance(m, EtherLinear)]
    return [
        values,
        modules,
        flags,
        active,
        sorted(getattr(model, "peft_config", {})),
        model._hf_peft_config_loaded,
    ]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refusal(model: nn.Module, source: str | Path, kind: type[Exception] = ValueError, **options: Any) -> str:
    """Return the message that loading is refused with, having checked that nothing changed."""
    folder = Path(source) if isinstance(source, Path) and source.is_dir() else None
    before, files_before = state(model), files(folder) if folder else {}
    with pytest.raises(kind) as caught:
        load_ether(model, source, **options)
    assert caught.type is kind  # not a library's error that happens to derive from it
    message = str(caught.value)
    assert message.isprintable(), message  # one line, nothing that a terminal obeys
    assert len(message) < 700, message
    assert state(model) == before
    assert (files(folder) if folder else {}) == files_before
    return message


def rewrite_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object], **metadata: str) -> None:
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS, metadata or None)


def rewrite_header(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = (folder / TENSORS).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    (folder / TENSORS).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def rewrite_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))


def test_the_good_adapter_that_the_others_are_made_from_loads(folder: Path) -> None:
    assert load_ether(small_unet(), folder).num_projections == 32


# what is there at all


def test_a_missing_folder_is_named(base: UNet2DConditionModel, tmp_path: Path) -> None:
    message = refusal(base, tmp_path / "nowhere", FileNotFoundError)
    assert f"there is no folder {tmp_path / 'nowhere'}" in message


def test_an_empty_name_is_not_the_working_directory(
    base: UNet2DConditionModel, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    assert "an empty name" in refusal(base, "", FileNotFoundError)


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000, "a/b/c", "https://example.com/x.safetensors"])
def test_what_can_be_neither_a_folder_nor_a_hub_id_is_refused_without_asking_the_hub(
    name: str, base: UNet2DConditionModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "give" in refusal(base, name, FileNotFoundError)


def test_a_file_in_place_of_a_folder_is_refused(base: UNet2DConditionModel, folder: Path) -> None:
    assert "is a file; give the folder" in refusal(base, folder / TENSORS)


@pytest.mark.parametrize("name", [TENSORS, CONFIG])
def test_a_missing_file_is_named(name: str, base: UNet2DConditionModel, folder: Path) -> None:
    (folder / name).unlink()
    assert f"has no {name}" in refusal(base, folder, FileNotFoundError)


@pytest.mark.parametrize("name", [TENSORS, CONFIG])
def test_a_pipe_in_place_of_a_file_is_refused_and_does_not_hang(
    name: str, base: UNet2DConditionModel, folder: Path
) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(ValueError, match="is not a regular file"):
        load_ether(base, folder)


# 40


class Canary:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    "data", [b"", b"\0" * 4, b"\0" * 8, b"\x02\0\0\0\0\0\0\0{}", b"hello, world, I am no adapter"]
)
def test_an_empty_or_short_file_is_no_adapter(data: bytes, base: UNet2DConditionModel, folder: Path) -> None:
    (folder / TENSORS).write_bytes(data)
    assert re.search("is not a safetensors adapter|not valid JSON|no tensors", refusal(base, folder))


@pytest.mark.parametrize("writer", ["pickle", "torch"])
def test_a_renamed_pickle_is_no_adapter_and_is_never_unpickled(
    writer: str, base: UNet2DConditionModel, folder: Path, tmp_path: Path
) -> None:
    canary = tmp_path / "canary"
    if writer == "pickle":
        (folder / TENSORS).write_bytes(pickle.dumps(Canary(canary)))
    else:
        torch.save(Canary(canary), folder / TENSORS)
    assert "is not a safetensors adapter (it is a pickle or a zip file" in refusal(base, folder)
    assert not canary.exists()


def test_a_pickle_beside_the_configuration_is_refused_and_never_unpickled(
    base: UNet2DConditionModel, folder: Path, tmp_path: Path
) -> None:
    (folder / TENSORS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Canary(tmp_path / "canary")))
    assert "adapter_model.bin is a pickle" in refusal(base, folder)
    assert not (tmp_path / "canary").exists()


# 41


def shift(header: dict[str, Any]) -> None:
    header[FIRST]["data_offsets"] = [offset + 4 for offset in header[FIRST]["data_offsets"]]


LIES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "offsets moved": shift,
    "offsets beyond the file": lambda h: h[FIRST].update(data_offsets=[0, 2**40]),
    "offsets negative": lambda h: h[FIRST].update(data_offsets=[-128, 0]),
    "offsets overlapping": lambda h: h[FIRST].update(
        data_offsets=h[min(h.keys() - {FIRST, "__metadata__"})]["data_offsets"]
    ),
    "offsets not a list": lambda h: h[FIRST].update(data_offsets="0"),
    "shape too large": lambda h: h[FIRST].update(shape=[2**62, 2**62]),
    "shape not the data's": lambda h: h[FIRST].update(shape=[4, 9]),
    "shape negative": lambda h: h[FIRST].update(shape=[-4, -8]),
    "shape of text": lambda h: h[FIRST].update(shape=["4", "8"]),
    "shape empty": lambda h: h[FIRST].update(shape=[0, 8]),
    "shape flat": lambda h: h[FIRST].update(shape=[32]),
    "dtype unknown": lambda h: h[FIRST].update(dtype="F33"),
    "dtype a number": lambda h: h[FIRST].update(dtype=32),
    "dtype a list": lambda h: h[FIRST].update(dtype=["F32"]),
    "dtype whole numbers": lambda h: h[FIRST].update(dtype="I32"),
    "an entry too many": lambda h: h[FIRST].update(more=1),
    "no shape": lambda h: h[FIRST].pop("shape"),
    "a tensor that is text": lambda h: h.update({FIRST: "tensor"}),
    "metadata nested": lambda h: h.update(__metadata__={"a": {"b": "c"}}),
    "metadata a list": lambda h: h.update(__metadata__=[]),
    "a tensor gone": lambda h: h.pop(FIRST),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_no_adapter(lie: str, base: UNet2DConditionModel, folder: Path) -> None:
    rewrite_header(folder, LIES[lie])
    assert str(folder / TENSORS) in refusal(base, folder)


@pytest.mark.parametrize("length", [0, 1, 2**20, 2**31, 2**63, 2**64 - 1])
def test_a_header_length_that_lies_is_no_adapter(
    length: int, base: UNet2DConditionModel, folder: Path
) -> None:
    data = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(struct.pack("<Q", length) + data[8:])
    assert str(folder / TENSORS) in refusal(base, folder)


def test_a_name_given_twice_in_the_header_is_refused(base: UNet2DConditionModel, folder: Path) -> None:
    data = (folder / TENSORS).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    entry = json.dumps({FIRST: json.loads(data[8 : 8 + length])[FIRST]})[1:-1].encode()
    header = data[8 : 8 + length].rstrip()[:-1] + b"," + entry + b"}"
    (folder / TENSORS).write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])
    assert "twice" in refusal(base, folder)


def read_or_refusal(folder: Path) -> Adapter | ValueError:
    try:
        return read_adapter(folder)
    except ValueError as error:
        return error


def test_every_one_of_400_random_changes_is_refused_in_a_sentence_or_harmless(folder: Path) -> None:
    """Bytes changed, cut, inserted and repeated; what still reads must be a whole adapter."""
    original = (folder / TENSORS).read_bytes()
    (length,) = struct.unpack("<Q", original[:8])
    chance = random.Random(0)
    refused = 0
    for _ in range(400):
        data = bytearray(original)
        place = chance.randrange(8 + length) if chance.random() < 0.8 else chance.randrange(len(data))
        span = chance.randrange(1, 64)
        kind = chance.randrange(5)
        if kind == 0:
            data[place] ^= 1 << chance.randrange(8)
        elif kind == 1:
            del data[place:]
        elif kind == 2:
            del data[place : place + span]
        elif kind == 3:
            data[place:place] = chance.randbytes(span)
        else:
            data[place : place + span] = data[chance.randrange(length) :][:span]
        (folder / TENSORS).write_bytes(data)
        read = read_or_refusal(folder)
        if isinstance(read, Adapter):
            assert len(read.tensors) == 32
            assert all(torch.isfinite(tensor).all() for tensor in read.tensors.values())
        else:
            assert type(read) is ValueError
            assert str(read).isprintable()
            refused += 1
    assert refused > 200


# 42


def test_a_header_over_a_mebibyte_is_refused(base: UNet2DConditionModel, folder: Path) -> None:
    (folder / TENSORS).write_bytes(struct.pack("<Q", 2**20 + 1) + b" " * (2**20 + 1))
    assert "has a header of 1048577 bytes; an adapter's has at most 1048576" in refusal(base, folder)


def test_more_than_4096_tensors_are_refused(base: UNet2DConditionModel, folder: Path) -> None:
    (folder / TENSORS).write_bytes(save({f"m{i}.ether_input_u": torch.ones(1, 1) for i in range(4097)}))
    assert "holds 4097 tensors; an adapter has at most 4096" in refusal(base, folder)


def test_a_file_over_64_mebibytes_is_refused_before_it_is_read(
    base: UNet2DConditionModel, folder: Path
) -> None:
    with (folder / TENSORS).open("r+b") as file:
        file.truncate(2**26 + 1)  # sparse
    with pytest.raises(ValueError, match="has 67108865 bytes; an adapter's has at most 67108864"):
        load_ether(base, folder)


def test_metadata_over_64_kibibytes_is_refused(base: UNet2DConditionModel, folder: Path) -> None:
    rewrite_tensors(folder, lambda tensors: None, other="x" * 2**16)
    assert "bytes of metadata; an adapter has at most 65536" in refusal(base, folder)


# 43, 44, 45


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_not_finite_is_refused_by_the_name_of_its_tensor(
    value: float, base: UNet2DConditionModel, folder: Path
) -> None:
    rewrite_tensors(folder, lambda tensors: tensors[FIRST].view(-1)[-1:].fill_(value))
    assert f"{FIRST} holds NaN or infinite numbers" in refusal(base, folder)


def test_a_zero_vector_is_refused_by_name(base: UNet2DConditionModel, folder: Path) -> None:
    rewrite_tensors(folder, lambda tensors: tensors[FIRST][2].zero_())
    assert f"block 2 of {FIRST} is zero and has no direction" in refusal(base, folder)


@pytest.mark.parametrize("factor", [1e38, 1e-38, 1e-44])
def test_huge_and_tiny_vectors_keep_their_direction(factor: float, folder: Path) -> None:
    """In float32 the squares of the first overflow, and the norms of the others are below MIN_NORM."""
    direction = torch.tensor([[1.0, 2.0], [-1.0, 3.0]])
    raw = direction * factor
    unit = units(Vectors(raw, None)).u
    assert raw.double().norm(dim=1).min() < MIN_NORM or unit.norm() == 0
    config = EtherConfig(num_blocks=2, target_modules=["lin"])
    place = folder / "large"
    write_adapter(place, Adapter(config, {"lin.ether_input_u": raw}))
    found = units(Vectors(read_adapter(place).tensors["lin.ether_input_u"], None)).u
    wide = raw.double()
    torch.testing.assert_close(found, (wide / wide.norm(dim=1, keepdim=True)).float())


# 46 and 47 are in test_adapter_file.py; here the file says nothing of its base


def test_other_widths_are_refused_by_shape_where_the_base_is_not_known(folder: Path) -> None:
    rewrite_tensors(folder, lambda tensors: None)
    message = refusal(small_unet(cross_attention_dim=64), folder)
    assert "another architecture than this UNet2DConditionModel" in message
    assert "attn2.to_k: input width 64 here and 32 in the adapter" in message


def test_the_same_base_cannot_be_required_of_a_file_that_does_not_know_it(
    base: UNet2DConditionModel, folder: Path
) -> None:
    rewrite_tensors(folder, lambda tensors: None)
    message = refusal(base, folder, require_same_base=True)
    assert "carries no fingerprint of its base" in message


def test_a_fingerprint_of_another_architecture_is_refused_even_where_the_shapes_fit(
    base: UNet2DConditionModel, folder: Path
) -> None:
    def forge(header: dict[str, Any]) -> None:
        found = json.loads(header["__metadata__"]["ether.base_fingerprint"]) | {"architecture": "abc"}
        header["__metadata__"]["ether.base_fingerprint"] = json.dumps(found)

    rewrite_header(folder, forge)
    assert "made for stable/base (fingerprint abc-" in refusal(base, folder)


# 48


def test_missing_layers_are_listed(base: UNet2DConditionModel, folder: Path) -> None:
    rewrite_tensors(folder, lambda tensors: tensors.pop(FIRST))
    message = refusal(base, folder)
    assert "lacks projections that its configuration targets" in message
    assert FIRST.removeprefix("base_model.model.").removesuffix(".ether_input_u") in message


def test_missing_layers_are_found_without_a_model_where_the_header_counts_them(folder: Path) -> None:
    with_header = (folder / TENSORS).read_bytes()
    (length,) = struct.unpack("<Q", with_header[:8])
    metadata = json.loads(with_header[8 : 8 + length])["__metadata__"]
    rewrite_tensors(folder, lambda tensors: tensors.pop(FIRST), **metadata)
    with pytest.raises(ValueError, match="holds 31 projections and its header speaks of 32"):
        read_adapter(folder)


def test_extra_layers_are_listed(base: UNet2DConditionModel, folder: Path) -> None:
    name = "base_model.model.up_blocks.9.to_q.ether_input_u"
    rewrite_tensors(folder, lambda tensors: tensors.update({name: torch.ones(4, 8)}))
    assert "1 of its 33 projections are not in this UNet2DConditionModel (up_blocks.9.to_q)" in refusal(
        base, folder
    )


def test_a_vector_of_another_variant_is_named(base: UNet2DConditionModel, folder: Path) -> None:
    rewrite_config(folder, variant="ether_plus", sides="input")
    needed = r"lacks .*ether_input_v and \d+ more, which variant='ether_plus', sides='input' needs"
    assert re.search(needed, refusal(base, folder))


def test_a_vector_too_many_is_named(base: UNet2DConditionModel, folder: Path) -> None:
    name = FIRST.replace("input", "output")
    rewrite_tensors(folder, lambda tensors: tensors.update({name: torch.ones(4, 8)}))
    assert "ether_output_u, which variant='ether', sides='input' has no use for" in refusal(base, folder)


STRANGE_NAMES = [
    "../../x.ether_input_u",
    "conv_out.weight",
    "a\x1b[2Jb.ether_input_u",
    "a\u202eb.ether_input_u",
    "a\nb.ether_input_u",
    "a\0b.ether_input_u",
    "ether_input_u",
    "a..b.ether_input_u",
    "lin.ether_input_u.default",
    "x" * 500 + ".ether_input_u",
]


@pytest.mark.parametrize("name", STRANGE_NAMES, ids=ascii)
def test_a_strange_name_is_refused_and_printed_escaped(
    name: str, base: UNet2DConditionModel, folder: Path
) -> None:
    rewrite_tensors(folder, lambda tensors: tensors.update({name: torch.ones(4, 8)}))
    assert "holds tensors that are not ETHER's" in refusal(base, folder)


def test_an_unsupported_layer_is_refused_by_name(base: UNet2DConditionModel, folder: Path) -> None:
    config = EtherConfig(num_blocks=1, target_modules=["conv_in"])
    write_adapter(folder, Adapter(config, {"conv_in.ether_input_u": torch.ones(1, 4)}))
    message = refusal(base, folder)
    assert "conv_in is a torch.nn.modules.conv.Conv2d; ETHER adapts torch.nn.Linear" in message


def test_a_projection_that_carries_a_lora_is_refused_by_name(folder: Path) -> None:
    unet = small_unet()
    unet.add_adapter(LoraConfig(r=2, target_modules=["attn1.to_q"]), adapter_name="lora")
    assert "attn1.to_q already carries an adapter of another method" in refusal(unet, folder)


@pytest.mark.parametrize("name", ["", "a.b", "to_q", "0", "x\n", "n" * 101])
def test_a_name_that_cannot_name_an_adapter_is_refused(
    name: str, base: UNet2DConditionModel, folder: Path
) -> None:
    assert "adapter_name=" in refusal(base, folder, adapter_name=name)


def test_a_taken_name_is_refused_and_the_adapter_that_has_it_stays(folder: Path) -> None:
    unet = small_unet()
    load_ether(unet, folder)
    assert "already has an adapter named 'default'" in refusal(unet, folder)


def test_a_model_with_a_merged_adapter_is_refused(folder: Path) -> None:
    unet = small_unet()
    load_ether(unet, folder)
    unet.fuse_lora(adapter_names=["default"])
    assert "default is merged into" in refusal(unet, folder, adapter_name="second")


def test_a_model_without_weights_is_refused(folder: Path) -> None:
    with torch.device("meta"):
        unet = small_unet()
    with pytest.raises(ValueError, match="has no weights here"):
        load_ether(unet, folder)


@pytest.mark.parametrize("has_adapter", [False, True])
def test_a_failure_in_the_midst_of_loading_puts_the_model_back(
    has_adapter: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet = small_unet().requires_grad_(True)
    if has_adapter:
        unet.add_adapter(EtherConfig(num_blocks=2), adapter_name="first")
    before, calls = state(unet), iter(range(100))
    update = EtherLinear.update_layer

    def failing(self: EtherLinear, *arguments: Any) -> None:
        if next(calls) == 20:
            raise MemoryError("no memory left")
        update(self, *arguments)

    monkeypatch.setattr(EtherLinear, "update_layer", failing)
    with pytest.raises(MemoryError, match="no memory left"):
        load_ether(unet, folder)
    assert state(unet) == before
    monkeypatch.undo()
    assert load_ether(unet, folder).num_projections == 32


# 49


def test_another_number_of_blocks_names_the_layer(base: UNet2DConditionModel, folder: Path) -> None:
    rewrite_config(folder, num_blocks=2)
    message = refusal(base, folder)
    assert FIRST.removeprefix("base_model.model.") + " has 4 blocks and the configuration says 2" in message


def test_a_vector_of_the_wrong_length_names_the_layer(base: UNet2DConditionModel, folder: Path) -> None:
    rewrite_tensors(folder, lambda tensors: tensors.update({FIRST: torch.ones(4, 9)}))
    assert "attn1.to_k: input width 32 here and 36 in the adapter" in refusal(base, folder)


def test_a_pattern_says_the_blocks_of_the_layers_it_names(base: UNet2DConditionModel, folder: Path) -> None:
    rewrite_config(folder, num_blocks_pattern={"attn1.to_k": 2})
    assert "has 4 blocks and the configuration says 2" in refusal(base, folder)


def test_a_regex_that_would_never_end_is_never_evaluated(base: UNet2DConditionModel, folder: Path) -> None:
    endless = r"(([a-z0-9_.]+)+)+!"
    rewrite_config(folder, num_blocks_pattern={endless: 8}, target_modules=endless, exclude_modules=endless)
    assert load_ether(small_unet(), folder).num_projections == 32


# 50


def test_a_peft_lora_is_named_with_its_rank_and_its_reader(
    base: UNet2DConditionModel, tmp_path: Path
) -> None:
    get_peft_model(small_unet(), LoraConfig(r=8, target_modules=["to_q"])).save_pretrained(tmp_path)
    assert "this is a LoRA of rank 8; use pipe.load_lora_weights" in refusal(base, tmp_path)


def test_a_lora_under_the_configuration_of_ether_is_named(base: UNet2DConditionModel, folder: Path) -> None:
    model = get_peft_model(small_unet(), LoraConfig(r=8, target_modules=["to_q"]))
    model.save_pretrained(folder.parent / "lora")
    (folder / TENSORS).write_bytes((folder.parent / "lora" / TENSORS).read_bytes())
    assert "is no ETHER adapter: this is a LoRA of rank 8; use pipe.load_lora_weights" in refusal(
        base, folder
    )


def test_an_oft_adapter_is_named(base: UNet2DConditionModel, folder: Path) -> None:
    model = get_peft_model(small_unet(), OFTConfig(oft_block_size=8, target_modules=["to_q"]))
    model.save_pretrained(folder.parent / "oft")
    assert "this is an adapter of the method OFT; use peft.PeftModel" in refusal(base, folder.parent / "oft")
    (folder / TENSORS).write_bytes((folder.parent / "oft" / TENSORS).read_bytes())
    assert "this is an OFT adapter; use peft.PeftModel" in refusal(base, folder)


def test_a_folder_of_diffusers_lora_is_named(base: UNet2DConditionModel, tmp_path: Path) -> None:
    unet = small_unet()
    unet.add_adapter(LoraConfig(r=4, target_modules=["to_q"]))
    unet.save_lora_adapter(tmp_path)
    assert "this is a LoRA of rank 4; use pipe.load_lora_weights" in refusal(base, tmp_path)


def test_a_kohya_file_is_named(base: UNet2DConditionModel, tmp_path: Path) -> None:
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {
        f"{name}.lora_down.weight": torch.ones(16, 32),
        f"{name}.lora_up.weight": torch.ones(32, 16),
        f"{name}.alpha": torch.tensor(1.0),
    }
    save_file(tensors, tmp_path / "my.safetensors")
    needed = "this is a LoRA of rank 16; use pipe.load_lora_weights"
    assert needed in refusal(base, tmp_path)
    assert needed in refusal(base, tmp_path / "my.safetensors")


# 51


BAD_CONFIGS: dict[str, tuple[str | bytes, str]] = {
    "not JSON": ("{", "is not valid JSON"),
    "empty": ("", "is not valid JSON"),
    "not UTF-8": (b'{"peft_type": "\xff"}', "is not valid JSON"),
    "a list": ("[]", "is not a JSON object"),
    "null": ("null", "is not a JSON object"),
    "NaN": ('{"peft_type": "ETHER", "dropout": NaN}', "holds NaN"),
    "infinite": ('{"peft_type": "ETHER", "dropout": -Infinity}', "holds -Infinity"),
    "1e999": ('{"peft_type": "ETHER", "dropout": 1e999}', "holds 1e999, which is out of range"),
    "5000 digits": ('{"peft_type": "ETHER", "num_blocks": ' + "9" * 5000 + "}", "a number of 5000 digits"),
    "a key twice": ('{"peft_type": "ETHER", "num_blocks": 4, "num_blocks": 2}', "the key num_blocks twice"),
    "deep": ('{"peft_type": ' + "[" * 9 + "]" * 9 + "}", "is nested too deeply"),
    "very deep": ("[" * 100_000, "is nested too deeply"),
    "half a surrogate": ('{"peft_type": "ETHER", "revision": "\\ud800"}', "half of a surrogate pair"),
    "no method": ("{}", 'does not say "peft_type": "ETHER"'),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_malformed_json_is_refused(case: str, base: UNet2DConditionModel, folder: Path) -> None:
    text, needed = BAD_CONFIGS[case]
    (folder / CONFIG).write_bytes(text if isinstance(text, bytes) else text.encode())
    message = refusal(base, folder)
    assert needed in message
    assert CONFIG in message


BAD_FIELDS: list[dict[str, Any]] = [
    {"num_blocks": -1},
    {"num_blocks": 0},
    {"num_blocks": 10**9},
    {"num_blocks": "4"},
    {"num_blocks": 4.0},
    {"num_blocks": True},
    {"num_blocks": None},
    {"dropout": "0"},
    {"dropout": 1.5},
    {"dropout": -0.1},
    {"variant": "ether_minus"},
    {"variant": 1},
    {"sides": "left"},
    {"sides": ["input"]},
    {"init_weights": 1},
    {"inference_mode": "yes"},
    {"target_modules": {"to_q": 1}},
    {"target_modules": [1]},
    {"exclude_modules": [["to_q"]]},
    {"num_blocks_pattern": {"to_q": "4"}},
    {"num_blocks_pattern": {"to_q": 10**9}},
    {"num_blocks_pattern": ["to_q"]},
    {"layers_to_transform": "0"},
    {"layers_pattern": 3},
    {"modules_to_save": "conv_out"},
    {"modules_to_save": ["conv_out"]},
    {"task_type": "NO_SUCH_TASK"},
    {"auto_mapping": {"a": ["b"]}},
    {"revision": 3},
    {"lora_alpha": 8},
    {"trust_remote_code": True},
    {"\x1b[2J": 1},
]


@pytest.mark.parametrize("changes", BAD_FIELDS, ids=ascii)
def test_a_field_outside_the_schema_is_refused_by_name(
    changes: dict[str, Any], base: UNet2DConditionModel, folder: Path
) -> None:
    rewrite_config(folder, **changes)
    message = refusal(base, folder)
    (name,) = changes
    assert name.encode("unicode_escape").decode() in message or "task type" in message


def test_an_unknown_field_without_content_is_ignored_with_a_warning(folder: Path) -> None:
    rewrite_config(folder, of_a_later_peft=None)
    with pytest.warns(UserWarning, match="unknown entries of_a_later_peft; they are empty"):
        load_ether(small_unet(), folder)


def test_a_configuration_of_500_megabytes_is_refused_before_it_is_read(
    base: UNet2DConditionModel, folder: Path
) -> None:
    with (folder / CONFIG).open("r+b") as file:
        file.truncate(500 * 10**6)
    with pytest.raises(ValueError, match="has 500000000 bytes; an adapter's has at most 1048576"):
        load_ether(base, folder)


BAD_METADATA = {
    "version 2": ({"ether.format_version": "2"}, "was made by a newer release"),
    "version of text": ({"ether.format_version": '"1"'}, "ether.format_version"),
    "version true": ({"ether.format_version": "true"}, "ether.format_version"),
    "no version": ({"ether.trigger": '"dog"'}, "ether.format_version is null"),
    "not JSON": ({"ether.format_version": "1", "ether.trigger": "dog"}, "ether.trigger"),
    "trigger a number": ({"ether.format_version": "1", "ether.trigger": "3"}, "ether.trigger is 3"),
    "training nested": ({"ether.format_version": "1", "ether.training": '{"a": {}}'}, "ether.training"),
    "unknown": ({"ether.format_version": "1", "ether.new": "1"}, "unknown metadata entries new"),
    "fingerprint bare": (
        {"ether.format_version": "1", "ether.base_fingerprint": "{}"},
        "ether.base_fingerprint",
    ),
    "norms of text": (
        {
            "ether.format_version": "1",
            "ether.base_fingerprint": '{"architecture": "a", "norms": ["1"], "rounding": 0}',
        },
        "ether.base_fingerprint",
    ),
    "a control character": ({"ether.format_version": "1", "ether.\x1b[2J": "1"}, r"\x1b[2J"),
}


@pytest.mark.parametrize("case", BAD_METADATA)
def test_malformed_metadata_is_refused(case: str, base: UNet2DConditionModel, folder: Path) -> None:
    metadata, needed = BAD_METADATA[case]
    rewrite_tensors(folder, lambda tensors: None, **metadata)
    assert needed in refusal(base, folder)


# 52


def test_classes_paths_and_urls_of_a_configuration_are_neither_imported_nor_fetched(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "evil_module.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("asked the network"))
    rewrite_config(
        folder,
        auto_mapping={"base_model_class": "Evil", "parent_library": "evil_module"},
        base_model_name_or_path="https://example.com/evil",
        revision="refs/../../evil",
    )
    unet = small_unet()
    load_ether(unet, folder)
    save_ether(unet, tmp_path / "again")
    assert "evil_module" not in sys.modules
    assert not (tmp_path / "canary").exists()
    assert detach_adapter(unet, "default").config.auto_mapping is None
