"""Bytes that are no whole, finite adapter (inputs 40 to 45) are refused in one sentence."""

import json
import os
import pickle
import random
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from hostile_files import CONFIG, FIRST, TENSORS, good_adapter, refusal, rewrite_header, rewrite_tensors
from safetensors.torch import save
from small_models import small_unet

from ether_diffusion import EtherConfig
from ether_diffusion.adapters import Adapter, AdapterPart, load_ether, read_adapter, write_adapter
from ether_diffusion.reflections import MIN_NORM, Vectors, units

NAME = FIRST.removeprefix("base_model.model.")


@pytest.fixture(scope="module")
def base() -> UNet2DConditionModel:
    return small_unet()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return good_adapter(tmp_path / "adapter")


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
    assert f"{NAME} holds NaN or infinite numbers" in refusal(base, folder)


def test_a_zero_vector_is_refused_by_name(base: UNet2DConditionModel, folder: Path) -> None:
    rewrite_tensors(folder, lambda tensors: tensors[FIRST][2].zero_())
    assert f"block 2 of {NAME} is zero and has no direction" in refusal(base, folder)


@pytest.mark.parametrize("factor", [1e38, 1e-38, 1e-44])
def test_huge_and_tiny_vectors_keep_their_direction(factor: float, folder: Path) -> None:
    """In float32 the squares of the first overflow, and the norms of the others are below MIN_NORM."""
    direction = torch.tensor([[1.0, 2.0], [-1.0, 3.0]])
    raw = direction * factor
    unit = units(Vectors(raw, None)).u
    assert raw.double().norm(dim=1).min() < MIN_NORM or unit.norm() == 0
    config = EtherConfig(num_blocks=2, target_modules=["lin"])
    place = folder / "large"
    write_adapter(place, AdapterPart(config, {"lin.ether_input_u": raw}))
    found = units(Vectors(read_adapter(place).tensors["lin.ether_input_u"], None)).u
    wide = raw.double()
    torch.testing.assert_close(found, (wide / wide.norm(dim=1, keepdim=True)).float())
