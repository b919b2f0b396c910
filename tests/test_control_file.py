"""An adapter and its control encoder share a folder, come back whole, and are refused as strictly."""

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from control_encoders import control_images, fresh_unet, predict, random_encoder, unet_inputs
from hostile_files import state
from safetensors.torch import load, save
from small_models import small_unet

from ether_diffusion import EtherConfig, save_ether
from ether_diffusion.adapters import AdapterPart, detach_adapter, read_adapter
from ether_diffusion.control import ControlEncoder, controlled, load_control, read_control, save_control

ENCODER, CONFIG = "control_encoder.safetensors", "control_config.json"
ADAPTER_FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    encoder, adapter = _trained()
    save_control(tmp_path / "control", encoder, adapter=adapter)
    return tmp_path / "control"


def test_one_folder_holds_the_adapter_and_the_encoder(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == sorted([*ADAPTER_FILES, CONFIG, ENCODER])


def test_what_was_saved_is_loaded_and_predicts_the_same(folder: Path) -> None:
    unet, encoder = _adapted(), random_encoder(fresh_unet(), control_type="silhouette")
    with torch.no_grad(), controlled(unet, encoder, control_images()):
        expected = predict(unet, unet_inputs())
    fresh = fresh_unet()
    loaded = load_control(fresh, folder)
    assert loaded.report is not None
    assert loaded.report.components == {"UNet2DConditionModel": 32}
    assert loaded.encoder.config.control_type == "silhouette"
    with torch.no_grad(), controlled(fresh, loaded.encoder, control_images()):
        assert torch.equal(predict(fresh, unet_inputs()), expected)


def test_the_adapter_in_the_folder_is_read_as_any_other(folder: Path) -> None:
    assert len(read_adapter(folder).projections()) == 32


def test_an_encoder_by_itself_is_saved_and_loaded(tmp_path: Path) -> None:
    encoder = random_encoder(fresh_unet())
    save_control(tmp_path, encoder)
    loaded = load_control(fresh_unet(), tmp_path)
    assert loaded.report is None
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(loaded.encoder.state_dict()[name], tensor)


def test_a_read_encoder_is_frozen(folder: Path) -> None:
    assert not any(parameter.requires_grad for parameter in read_control(folder).parameters())


def test_the_same_encoder_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    encoder, adapter = _trained()
    save_control(tmp_path / "again", encoder, adapter=adapter)
    for name in (CONFIG, ENCODER):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_an_encoder_in_half_precision_is_read_in_float32(folder: Path) -> None:
    path = folder / ENCODER
    path.write_bytes(save({name: tensor.half() for name, tensor in load(path.read_bytes()).items()}))
    assert read_control(folder).conv_in.weight.dtype == torch.float32


def test_an_adapter_of_another_save_beside_the_encoder_is_refused(folder: Path) -> None:
    other = fresh_unet()
    torch.manual_seed(77)
    other.add_adapter(EtherConfig())
    save_ether(other, folder)
    _refused(folder, "were not saved together")


def test_an_encoder_without_the_adapter_that_it_names_is_refused(folder: Path) -> None:
    for name in ADAPTER_FILES:
        (folder / name).unlink()
    _refused(folder, "has no adapter_config.json, the adapter that its control encoder", FileNotFoundError)


def test_an_adapter_without_control_is_refused_by_what_is_missing(tmp_path: Path) -> None:
    save_ether(_adapted(), tmp_path)
    _refused(tmp_path, "has no control_config.json", FileNotFoundError)


def test_an_encoder_alone_is_not_written_over_an_adapter(folder: Path) -> None:
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match="holds an adapter; save the encoder with it"):
        save_control(folder, random_encoder(fresh_unet()))
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_an_encoder_with_numbers_that_are_not_finite_is_not_written(tmp_path: Path) -> None:
    encoder = random_encoder(fresh_unet())
    with torch.no_grad():
        encoder.conv_out.bias[0] = float("nan")
    with pytest.raises(ValueError, match=r"conv_out\.bias holds NaN or infinite numbers"):
        save_control(tmp_path / "new", encoder)
    assert not (tmp_path / "new").exists()


def test_control_of_another_base_is_refused_and_leaves_the_model_alone(folder: Path) -> None:
    wide = small_unet(block_out_channels=(64, 64))
    _refused(folder, "gives 32 channels and the UNet's conv_in 64", unet=wide)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda data: b"", "it has 0 bytes"),
        (lambda data: data[:-5], "is not a safetensors adapter"),
        (lambda data: pickle.dumps({"conv_in.weight": 1}), "pickle"),
        (lambda data: struct.pack("<Q", 1 << 60) + data[8:], "promises a header"),
        (lambda data: _with(data, lambda t: t.pop("conv_out.bias")), "lacks conv_out.bias"),
        (lambda data: _with(data, lambda t: t.update(more=torch.zeros(1))), "also holds more"),
        (
            lambda data: _with(data, lambda t: t.update({"conv_out.bias": torch.zeros(31)})),
            "has shape \\(31,\\) and the configuration says \\(32,\\)",
        ),
        (
            lambda data: _with(
                data, lambda t: t.update({"conv_out.bias": torch.zeros(32, dtype=torch.int8)})
            ),
            'dtype is "I8"',
        ),
        (
            lambda data: _with(data, lambda t: t["conv_out.bias"].fill_(float("inf"))),
            "conv_out.bias holds NaN or infinite numbers",
        ),
        (
            lambda data: _with(
                data, lambda t: t.update({"conv_out.bias": torch.full((32,), 1e300, dtype=torch.float64)})
            ),
            "conv_out.bias holds NaN or infinite numbers",
        ),
    ],
)
def test_a_damaged_encoder_is_refused(folder: Path, spoil: Callable[[bytes], bytes], words: str) -> None:
    path = folder / ENCODER
    path.write_bytes(spoil(path.read_bytes()))
    _refused(folder, words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format_version": 2}, "made by a newer release"),
        ({"format_version": True}, "format_version is true"),
        ({"format_version": 0}, "format_version is 0"),
        ({"surprise": 1}, "surprise is not a key that is known"),
        ({"block_out_channels": None}, "block_out_channels is null"),
        ({"block_out_channels": []}, "found 0 block_out_channels"),
        ({"block_out_channels": [16] * 99}, "found 99 block_out_channels"),
        ({"block_out_channels": [16, 10**9]}, "found 1000000000 channels"),
        ({"block_out_channels": [16, -1]}, "found -1 channels"),
        ({"block_out_channels": [16, 64]}, "the two files do not belong together"),
        ({"conditioning_channels": 4}, "conditioning_channels=4; control images have 3"),
        ({"conditioning_embedding_channels": 1.5}, "conditioning_embedding_channels is 1.5"),
        ({"control_type": "\u001b[31m"}, "use up to 40 letters"),
        ({"control_type": 3}, "control_type is 3"),
        ({"adapter_sha256": "0" * 63}, "adapter_sha256 is"),
    ],
)
def test_a_strange_configuration_is_refused(folder: Path, change: dict[str, Any], words: str) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    _refused(folder, words)


def test_a_configuration_without_an_entry_is_refused(folder: Path) -> None:
    path = folder / CONFIG
    found = json.loads(path.read_text())
    del found["control_type"]
    path.write_text(json.dumps(found))
    _refused(folder, "control_type is missing")


@pytest.mark.parametrize("text", ["[]", "{", '{"format_version": NaN}', '{"a": 1, "a": 2}'])
def test_a_configuration_that_is_no_plain_json_object_is_refused(folder: Path, text: str) -> None:
    (folder / CONFIG).write_text(text)
    _refused(folder, "control_config.json")


def test_a_file_beyond_the_limit_is_refused_by_its_size(folder: Path) -> None:
    with (folder / ENCODER).open("r+b") as file:
        file.truncate(2**27)
    _refused(folder, "has 134217728 bytes")


def _refused(folder: Path, words: str, error: type[Exception] = ValueError, *, unet: Any = None) -> None:
    unet = fresh_unet() if unet is None else unet
    before = state(unet)
    with pytest.raises(error, match=words) as caught:
        load_control(unet, folder)
    assert state(unet) == before
    assert str(caught.value).isprintable()


def _with(data: bytes, change: Callable[[dict[str, torch.Tensor]], object]) -> bytes:
    tensors = load(data)
    change(tensors)
    return save(tensors)


def _adapted() -> Any:
    unet = fresh_unet()
    torch.manual_seed(8)
    unet.add_adapter(EtherConfig())
    return unet


def _trained() -> tuple[ControlEncoder, AdapterPart]:
    encoder = random_encoder(fresh_unet(), control_type="silhouette")
    return encoder, detach_adapter(_adapted(), "default")
