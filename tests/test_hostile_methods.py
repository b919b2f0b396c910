"""Adapters of the methods beside ETHER, and control encoders, are read as strictly; nothing changes."""

import json
import pickle
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Factory, Patch
from control_encoders import control_images, fresh_unet, predict, random_encoder, unet_inputs
from diffusers import UNet2DConditionModel as UNet
from hostile_files import (
    Spoil,
    config,
    refusal,
    rewrite_config,
    rewrite_header,
    rewrite_tensors,
    state,
    tensors,
    truncated,
    written,
)
from method_adapters import METHODS, adapt, save_method
from safetensors.torch import load as load_bytes
from safetensors.torch import save
from small_models import small_unet
from tiny_pipelines import tiny_sd
from torch import Tensor

from ether_diffusion import EtherConfig, save_ether
from ether_diffusion.adapters import AdapterMetadata, detach_adapter, load, load_any, read_adapter
from ether_diffusion.adapters.format import PREFIX
from ether_diffusion.control import controlled, load_control, read_control, save_control
from ether_diffusion.training.methods import adapter_files

MODULE = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k."
FIRST = f"base_model.model.{MODULE}"
NAMES = {
    "lora": f"{FIRST}lora_A.weight",
    "oft": f"{FIRST}oft_R.weight",
    "hra": f"{FIRST}hra_u",
    "delora": f"{FIRST}delora_w_norm",
    "boft": f"{FIRST}boft_R",
    "ia3": f"{FIRST}ia3_l",
}
RANKS = {"lora": "r", "oft": "r", "hra": "r", "delora": "r", "boft": "boft_block_num"}
ENCODER, CONTROL = "control_encoder.safetensors", "control_config.json"
ADAPTER_FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
NOT_TOGETHER = "do not belong together"


@pytest.fixture(scope="module")
def base() -> UNet:
    return tiny_sd().unet


@pytest.fixture(scope="module")
def saved(tmp_path_factory: Factory) -> Path:
    """A folder of each method, and one with a control encoder of another base."""
    place = tmp_path_factory.mktemp("saved")
    for method in METHODS:
        save_method(place / method, method)
    unet = tiny_sd().unet
    unet.add_adapter(EtherConfig())
    save_ether(unet, place / "ether")
    encoder = random_encoder(fresh_unet(), control_type="silhouette")
    save_control(place / "control", encoder, adapter=detach_adapter(adapted(), "default"))
    return place


@pytest.fixture
def take(saved: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Copy a folder, for a test to spoil."""
    return lambda method: Path(shutil.copytree(saved / method, tmp_path / method))


@pytest.fixture
def control(take: Callable[[str], Path]) -> Path:
    return take("control")


def adapted(seed: int = 8) -> Any:
    unet = fresh_unet()
    torch.manual_seed(seed)
    unet.add_adapter(EtherConfig())
    return unet


# every method beside ETHER


def tensor(change: Callable[[dict[str, Tensor], str], object]) -> Callable[[str], Spoil]:
    """Change a tensor of the method's own."""
    return lambda method: tensors(lambda found: change(found, NAMES[method]))


SPOILT: dict[str, tuple[Callable[[str], Spoil], str]] = {
    "rank": (lambda method: config(**{RANKS[method]: 8}), f"the two files {NOT_TOGETHER}"),
    "gone": (tensor(lambda t, name: t.pop(name)), "lacks|holds no|are not those"),
    "more": (tensor(lambda t, _: t.update({f"{FIRST}more": torch.zeros(1)})), r"not those of .* \(base|more"),
    "NaN": (tensor(lambda t, name: t[name].view(-1)[0].fill_(float("nan"))), "NaN or infinite"),
    "infinite": (tensor(lambda t, name: t[name].view(-1)[0].fill_(float("-inf"))), "NaN or infinite"),
    "whole numbers": (tensor(lambda t, name: t.update({name: t[name].to(torch.int8)})), 'dtype is "I8"'),
    "empty": (tensor(lambda t, name: t.update({name: t[name][:0]})), NOT_TOGETHER),
    "flat": (tensor(lambda t, name: t.update({name: t[name].reshape(-1)[:7]})), NOT_TOGETHER),
    "two prefixes": (
        tensor(lambda t, name: t.update({name.removeprefix("base_model.model."): t.pop(name)})),
        "both with and without a prefix",
    ),
}

SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"surprise": 1}, "sets surprise, which this release does not know"),
    ({"target_modules": "(a+)+$"}, "target_modules is"),
    ({"target_modules": [".*to_k"]}, "target_modules"),
    ({"target_modules": []}, "target_modules"),
    ({"target_modules": ["../to_k"]}, "target_modules"),
    ({"target_modules": ["to_k"]}, "which the configuration does not target|a subset of `target_modules`"),
    ({"target_modules": ["to_k", "to_q", "to_v", "to_out.0", "ff.net.2"]}, "lacks projections that its"),
    ({"target_modules": ["to_k", "to_q", "to_v", "to_out.0", "conv1"]}, "lacks projections that its"),
    ({"modules_to_save": ["conv_in"]}, r'sets modules_to_save=\["conv_in"\]'),
    ({"auto_mapping": {"base_model_class": "os.system"}}, "sets auto_mapping"),
    ({"layers_to_transform": [1]}, "sets layers_to_transform"),
    ({"exclude_modules": "(a+)+$"}, "sets exclude_modules"),
    ({"revision": "https://example.com"}, "sets revision"),
    ({"base_model_name_or_path": 3}, "base_model_name_or_path is 3"),
    ({"peft_type": "VERA"}, "is of the method VERA; ETHER, LoRA, OFT"),
]

OF_ONE_METHOD: list[tuple[str, dict[str, Any], str]] = [
    ("lora", {"use_dora": True}, "sets use_dora=true"),
    ("lora", {"bias": "all"}, 'sets bias="all"'),
    ("lora", {"rank_pattern": {"(a+)+$": 4}}, "sets rank_pattern"),
    ("lora", {"megatron_core": "os"}, "sets megatron_core"),
    ("lora", {"init_lora_weights": "pissa"}, "init_lora_weights is"),
    ("lora", {"r": 10**9}, "r is 1000000000; it should be less than or equal to 4096"),
    ("lora", {"r": True}, "r is true"),
    ("lora", {"lora_alpha": -1}, "lora_alpha is -1"),
    ("lora", {"lora_dropout": 1.0}, r"lora_dropout is 1\.0"),
    ("oft", {"coft": True}, "sets coft=true"),
    ("oft", {"use_cayley_neumann": False}, "sets use_cayley_neumann=false"),
    ("oft", {"oft_block_size": 4}, "oft_block_size is 4"),
    ("hra", {"apply_GS": True}, "sets apply_GS=true"),
    ("delora", {"lambda_pattern": {"x": 1}}, "sets lambda_pattern"),
    ("boft", {"boft_n_butterfly_factor": 2}, "sets boft_n_butterfly_factor=2"),
]


@pytest.mark.parametrize(
    ("method", "case"), [(m, c) for m in METHODS for c in SPOILT if (m, c) != ("ia3", "rank")]
)
def test_a_spoilt_adapter_of_any_method_is_refused(
    method: str, case: str, base: UNet, take: Callable[[str], Path]
) -> None:
    folder, (spoil, words) = take(method), SPOILT[case]
    spoil(method)(folder)
    assert re.search(words, refusal(base, folder, by=load_any))


@pytest.mark.parametrize(
    ("method", "change", "words"),
    [*((method, *setting) for method in METHODS for setting in SETTINGS), *OF_ONE_METHOD],
)
def test_strange_settings_are_refused(
    method: str, change: dict[str, Any], words: str, base: UNet, take: Callable[[str], Path]
) -> None:
    rewrite_config(folder := take(method), **change)
    assert re.search(words, refusal(base, folder, by=load_any))


def test_a_reflection_without_direction_is_refused(base: UNet, take: Callable[[str], Path]) -> None:
    rewrite_tensors(folder := take("hra"), lambda tensors: tensors[f"{FIRST}hra_u"][:, 1].zero_())
    assert "is zero and has no direction" in refusal(base, folder, by=load_any)


@pytest.mark.parametrize("method", METHODS)
def test_a_model_that_cannot_take_an_adapter_is_refused(method: str, take: Callable[[str], Path]) -> None:
    folder = take(method)
    wide = small_unet(block_out_channels=(64, 64))
    assert "was made for base" in refusal(wide, folder, by=load_any)
    if method == "hra":
        ether = small_unet()
        ether.add_adapter(EtherConfig(), "fox")
        assert "carries an adapter of the method ETHER" in refusal(ether, folder, by=load_any)


@pytest.mark.parametrize("method", METHODS)
def test_what_was_saved_is_read_without_a_model(method: str, saved: Path) -> None:
    adapter = read_adapter(saved / method)
    assert adapter.method.lower() == method
    assert len(adapter.first.modules()) == 32
    assert adapter.metadata.trigger == "a photo of sks"
    assert adapter.metadata.base_model == "base"


def test_empty_entries_of_later_releases_and_a_missing_fingerprint_are_taken(
    take: Callable[[str], Path],
) -> None:
    rewrite_config(folder := take("lora"), later=None)
    rewrite_header(folder, lambda h: h["__metadata__"].pop(f"{PREFIX}base_fingerprint"))
    with pytest.warns(UserWarning, match="unknown entries later"):
        assert load_any(tiny_sd().unet, folder).base_match == "unknown"


def test_a_pattern_that_was_trained_with_is_saved_as_names(tmp_path: Path) -> None:
    unet = tiny_sd().unet
    config = adapt(unet, "lora")
    config.target_modules = r".*attn\d\.to_[qkv]|.*to_out\.0"
    found = json.loads(adapter_files(unet, AdapterMetadata())["adapter_config.json"])
    assert len(found["target_modules"]) == 32
    assert all(name in dict(unet.named_modules()) for name in found["target_modules"])


@pytest.mark.parametrize(
    ("method", "first"),
    [*((m, first) for m in (*METHODS, "ether") for first in (None, m)), ("ether", "lora")],
)
def test_a_failure_in_the_midst_of_loading_puts_the_model_back(
    method: str, first: str | None, saved: Path, monkeypatch: Patch
) -> None:
    folder, unet = saved / method, tiny_sd().unet
    if first is not None:
        load_any(unet, saved / first, adapter_name="first")
    before = state(unet)
    monkeypatch.setattr(load, "set_peft_model_state_dict", no_memory)
    with pytest.raises(MemoryError):
        load_any(unet, folder)
    assert state(unet) == before
    monkeypatch.undo()
    assert load_any(unet, folder).num_projections == 32


def no_memory(*_: object) -> None:
    raise MemoryError("no memory left")


# control encoders


def encoder(change: Callable[[bytes], bytes]) -> Spoil:
    return lambda folder: (folder / ENCODER).write_bytes(change((folder / ENCODER).read_bytes()))


def bias(value: Tensor) -> Spoil:
    return parts(lambda found: found.update({"conv_out.bias": value}))


def parts(change: Callable[[dict[str, Tensor]], object]) -> Spoil:
    def spoil(data: bytes) -> bytes:
        found = load_bytes(data)
        change(found)
        return save(found)

    return encoder(spoil)


def without_entry(folder: Path) -> None:
    found = json.loads((folder / CONTROL).read_text())
    del found["control_type"]
    (folder / CONTROL).write_text(json.dumps(found))


SPOILT_ENCODERS: list[tuple[Spoil, str]] = [
    (encoder(lambda data: b""), "it has 0 bytes"),
    (encoder(lambda data: data[:-5]), "is not a safetensors adapter"),
    (encoder(lambda data: pickle.dumps({"conv_in.weight": 1})), "pickle"),
    (encoder(lambda data: struct.pack("<Q", 1 << 60) + data[8:]), "promises a header"),
    (parts(lambda t: t.pop("conv_out.bias")), "conv_out.bias has shape none"),
    (parts(lambda t: t.update(more=torch.zeros(1))), r"more has shape \(1,\) and .* says none"),
    (bias(torch.zeros(31)), r"has shape \(31,\) and the configuration says \(32,\)"),
    (bias(torch.zeros(32, dtype=torch.int8)), 'dtype is "I8"'),
    (bias(torch.full((32,), float("inf"))), "conv_out.bias holds NaN or infinite numbers"),
    (bias(torch.full((32,), 1e300, dtype=torch.float64)), "conv_out.bias holds NaN or infinite numbers"),
    (truncated(2**27, ENCODER), "has 134217728 bytes"),
    *((written(text, CONTROL), CONTROL) for text in ("[]", "{", '{"a": NaN}', '{"a": 1, "a": 2}')),
    (without_entry, "control_type is missing"),
    *(
        (config(CONTROL, **change), words)
        for change, words in (
            ({"format_version": 2}, "made by a newer release"),
            ({"format_version": True}, "format_version is true"),
            ({"format_version": 0}, "format_version is 0"),
            ({"surprise": 1}, "surprise is not a key that is known"),
            ({"block_out_channels": None}, "block_out_channels is null"),
            ({"block_out_channels": []}, r"block_out_channels is \[\]"),
            ({"block_out_channels": [16] * 99}, "at most 7 items"),
            ({"block_out_channels": [16, 10**9]}, "block_out_channels.1 is 1000000000"),
            ({"block_out_channels": [16, -1]}, "block_out_channels.1 is -1"),
            ({"block_out_channels": [16, 64]}, f"the two files {NOT_TOGETHER}"),
            ({"conditioning_channels": 4}, "conditioning_channels is 4; it should be 3"),
            ({"conditioning_embedding_channels": 1.5}, r"conditioning_embedding_channels is 1\.5"),
            ({"control_type": "\u001b[31m"}, "control_type is .*should match pattern"),
            ({"control_type": 3}, "control_type is 3"),
            ({"adapter_sha256": "0" * 63}, "adapter_sha256 is"),
        )
    ),
    (lambda folder: save_ether(adapted(77), folder), "were not saved together"),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "words"), SPOILT_ENCODERS)
def test_a_spoilt_control_encoder_is_refused(spoil: Spoil, words: str, control: Path) -> None:
    spoil(control)
    assert re.search(words, refusal(fresh_unet(), control, by=load_control))


def test_half_of_a_control_adapter_is_refused_by_what_is_missing(
    base: UNet, control: Path, tmp_path: Path
) -> None:
    def missing(folder: Path) -> str:
        return refusal(base, folder, FileNotFoundError, by=load_control)

    for name in ADAPTER_FILES:
        (control / name).unlink()
    assert "has no adapter_config.json; give the whole folder" in missing(control)
    save_ether(adapted(), tmp_path / "adapter")
    assert "has no control_config.json" in missing(tmp_path / "adapter")


def test_what_was_saved_is_loaded_and_predicts_the_same(control: Path) -> None:
    assert sorted(path.name for path in control.iterdir()) == sorted([*ADAPTER_FILES, CONTROL, ENCODER])
    unet, encoder = adapted(), random_encoder(fresh_unet(), control_type="silhouette")
    with torch.no_grad(), controlled(unet, encoder, control_images()):
        expected = predict(unet, unet_inputs())
    fresh = fresh_unet()
    loaded = load_control(fresh, control)
    assert loaded.report is not None
    assert loaded.report.components == {"UNet2DConditionModel": 32}
    assert loaded.encoder.config.control_type == "silhouette"
    assert not any(parameter.requires_grad for parameter in loaded.encoder.parameters())
    with torch.no_grad(), controlled(fresh, loaded.encoder, control_images()):
        assert torch.equal(predict(fresh, unet_inputs()), expected)


def test_an_encoder_by_itself_is_saved_and_loaded_by_bytes_that_are_always_the_same(tmp_path: Path) -> None:
    encoder = random_encoder(fresh_unet())
    for name in ("once", "again"):
        save_control(tmp_path / name, encoder)
    for path in (tmp_path / "once").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    loaded = load_control(fresh_unet(), tmp_path / "once")
    assert loaded.report is None
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(loaded.encoder.state_dict()[name], tensor)


def test_an_encoder_in_half_precision_is_read_in_float32(control: Path) -> None:
    parts(lambda found: found.update({name: tensor.half() for name, tensor in found.items()}))(control)
    assert read_control(control).conv_in.weight.dtype == torch.float32


def test_an_encoder_is_not_written_over_an_adapter_or_with_numbers_that_are_not_finite(
    control: Path, tmp_path: Path
) -> None:
    encoder, before = random_encoder(fresh_unet()), {path: path.read_bytes() for path in control.iterdir()}
    with pytest.raises(ValueError, match="holds an adapter; save the encoder with it"):
        save_control(control, encoder)
    assert {path: path.read_bytes() for path in control.iterdir()} == before
    with torch.no_grad():
        encoder.conv_out.bias[0] = float("nan")
    with pytest.raises(ValueError, match=r"conv_out\.bias holds NaN or infinite numbers"):
        save_control(tmp_path / "new", encoder)
    assert not (tmp_path / "new").exists()
