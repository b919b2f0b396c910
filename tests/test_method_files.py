"""Adapters of the methods beside ETHER are read as strictly: settings, names, shapes and values."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile_files import rewrite_config, rewrite_header, rewrite_tensors, state
from method_adapters import METHODS, adapt, save_method
from peft.tuners.tuners_utils import BaseTunerLayer
from small_models import small_unet
from tiny_pipelines import tiny_sd
from torch import Tensor, nn

from ether_diffusion import EtherConfig
from ether_diffusion.adapters import AdapterMetadata, load, load_any, read_adapter, save_ether
from ether_diffusion.adapters.format import PREFIX
from ether_diffusion.adapters.load import remove_adapter
from ether_diffusion.training.methods import adapter_files

FIRST = "base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k."
TENSORS = {
    "lora": "lora_A.weight",
    "oft": "oft_R.weight",
    "hra": "hra_u",
    "delora": "delora_w_norm",
    "boft": "boft_R",
}
RANKS = {"lora": "r", "oft": "r", "hra": "r", "delora": "r", "boft": "boft_block_num"}


def refused(folder: Path, words: str, unet: Any = None, kind: type[Exception] = ValueError) -> None:
    unet = tiny_sd().unet if unet is None else unet
    before = state(unet)
    with pytest.raises(kind, match=words) as caught:
        load_any(unet, folder)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 700
    assert state(unet) == before


def forget_base(header: dict[str, Any]) -> None:
    del header["__metadata__"][f"{PREFIX}base_fingerprint"]


@pytest.mark.parametrize("method", METHODS)
def test_what_was_saved_is_read_without_a_model(tmp_path: Path, method: str) -> None:
    save_method(tmp_path, method)
    adapter = read_adapter(tmp_path)
    assert adapter.method.lower() == method
    assert len(adapter.first.modules()) == 32
    assert adapter.metadata.trigger == "a photo of sks"
    assert adapter.metadata.base_model == "base"


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_of_another_architecture_is_refused(tmp_path: Path, method: str) -> None:
    save_method(tmp_path, method)
    refused(tmp_path, "was made for base", small_unet(block_out_channels=(64, 64)))


@pytest.mark.parametrize("method", METHODS)
def test_another_rank_than_the_tensors_have_is_refused(tmp_path: Path, method: str) -> None:
    save_method(tmp_path, method)
    rewrite_config(tmp_path, **{RANKS[method]: 8})
    refused(tmp_path, "the two files do not belong together")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda tensors, name: tensors.pop(name), "lacks|holds no|are not those"),
        (
            lambda tensors, name: tensors.update({f"{FIRST}more": torch.zeros(1)}),
            "are not those of .* \\(base|more",
        ),
        (lambda tensors, name: tensors[name].view(-1)[0].fill_(float("nan")), "NaN or infinite"),
        (lambda tensors, name: tensors[name].view(-1)[0].fill_(float("-inf")), "NaN or infinite"),
        (lambda tensors, name: tensors.update({name: tensors[name].to(torch.int8)}), 'dtype is "I8"'),
        (lambda tensors, name: tensors.update({name: tensors[name][:0]}), "do not belong together"),
        (
            lambda tensors, name: tensors.update({name: tensors[name].reshape(-1)[:7]}),
            "do not belong together",
        ),
        (
            lambda tensors, name: tensors.update({name.removeprefix("base_model.model."): tensors.pop(name)}),
            "both with and without the prefix",
        ),
    ],
)
def test_spoilt_tensors_are_refused(
    tmp_path: Path, method: str, spoil: Callable[[dict[str, Tensor], str], object], words: str
) -> None:
    save_method(tmp_path, method)
    header = tmp_path / "adapter_model.safetensors"
    assert header.is_file()
    rewrite_tensors(tmp_path, lambda tensors: spoil(tensors, FIRST + TENSORS[method]))
    refused(tmp_path, words)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"surprise": 1}, "sets surprise, which this release does not know"),
        ({"target_modules": "(a+)+$"}, "target_modules is"),
        ({"target_modules": [".*to_k"]}, "target_modules"),
        ({"target_modules": []}, "target_modules"),
        ({"target_modules": ["../to_k"]}, "target_modules"),
        ({"target_modules": ["to_k"]}, "which the configuration does not target"),
        ({"target_modules": ["to_k", "to_q", "to_v", "to_out.0", "ff.net.2"]}, "lacks projections that its"),
        ({"modules_to_save": ["conv_in"]}, 'sets modules_to_save=\\["conv_in"\\]'),
        ({"auto_mapping": {"base_model_class": "os.system"}}, "sets auto_mapping"),
        ({"layers_to_transform": [1]}, "sets layers_to_transform"),
        ({"exclude_modules": "(a+)+$"}, "sets exclude_modules"),
        ({"revision": "https://example.com"}, "sets revision"),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path is 3"),
        ({"peft_type": "VERA"}, "is of the method VERA; ETHER, LoRA, OFT"),
    ],
)
def test_strange_settings_are_refused(
    tmp_path: Path, method: str, change: dict[str, Any], words: str
) -> None:
    save_method(tmp_path, method)
    rewrite_config(tmp_path, **change)
    refused(tmp_path, words)


@pytest.mark.parametrize(
    ("method", "change", "words"),
    [
        ("lora", {"use_dora": True}, "sets use_dora=true"),
        ("lora", {"bias": "all"}, 'sets bias="all"'),
        ("lora", {"rank_pattern": {"(a+)+$": 4}}, "sets rank_pattern"),
        ("lora", {"megatron_core": "os"}, "sets megatron_core"),
        ("lora", {"init_lora_weights": "pissa"}, "init_lora_weights is"),
        ("lora", {"r": 10**9}, "r is 1000000000; it should be less than or equal to 4096"),
        ("lora", {"r": True}, "r is true"),
        ("lora", {"lora_alpha": -1}, "lora_alpha is -1"),
        ("lora", {"lora_dropout": 1.0}, "lora_dropout is 1.0"),
        ("oft", {"coft": True}, "sets coft=true"),
        ("oft", {"use_cayley_neumann": False}, "sets use_cayley_neumann=false"),
        ("oft", {"oft_block_size": 4}, "oft_block_size is 4"),
        ("hra", {"apply_GS": True}, "sets apply_GS=true"),
        ("delora", {"lambda_pattern": {"x": 1}}, "sets lambda_pattern"),
        ("boft", {"boft_n_butterfly_factor": 2}, "sets boft_n_butterfly_factor=2"),
    ],
)
def test_settings_of_one_method_are_refused(
    tmp_path: Path, method: str, change: dict[str, Any], words: str
) -> None:
    save_method(tmp_path, method)
    rewrite_config(tmp_path, **change)
    refused(tmp_path, words)


def test_empty_entries_of_later_releases_are_said_and_ignored(tmp_path: Path) -> None:
    save_method(tmp_path, "lora")
    rewrite_config(tmp_path, later=None)
    with pytest.warns(UserWarning, match="unknown entries later"):
        load_any(tmp := tiny_sd().unet, tmp_path)
    remove_adapter(tmp, ["default"])


def test_a_reflection_without_direction_is_refused(tmp_path: Path) -> None:
    save_method(tmp_path, "hra")
    rewrite_tensors(tmp_path, lambda tensors: tensors[f"{FIRST}hra_u"][:, 1].zero_())
    refused(tmp_path, "is zero and has no direction")


def test_a_file_without_a_fingerprint_is_checked_by_its_shapes(tmp_path: Path) -> None:
    save_method(tmp_path, "lora")
    rewrite_header(tmp_path, forget_base)
    assert load_any(tiny_sd().unet, tmp_path).base_match == "unknown"


def test_other_weights_are_told_and_refused_where_the_same_are_required(tmp_path: Path) -> None:
    save_method(tmp_path, "oft")
    with pytest.warns(UserWarning, match="same architecture and other weights, so results may differ"):
        assert load_any(tiny_sd(seed=2).unet, tmp_path).base_match == "other weights"
    with pytest.raises(ValueError, match="or leave out require_same_base"):
        load_any(tiny_sd(seed=2).unet, tmp_path, require_same_base=True)


def test_two_methods_in_one_model_are_refused(tmp_path: Path) -> None:
    save_method(tmp_path, "lora")
    unet = tiny_sd().unet
    unet.add_adapter(EtherConfig(), "fox")
    refused(tmp_path, "carries an adapter of the method ETHER, which one of LoRA does not work with", unet)


def test_a_taken_name_is_refused(tmp_path: Path) -> None:
    save_method(tmp_path, "lora")
    unet = tiny_sd().unet
    load_any(unet, tmp_path)
    refused(tmp_path, "already has an adapter named 'default'", unet)


def test_a_pattern_that_was_trained_with_is_saved_as_names(tmp_path: Path) -> None:
    unet = tiny_sd().unet
    config = adapt(unet, "lora")
    config.target_modules = r".*attn\d\.to_[qkv]|.*to_out\.0"
    saved = json.loads(adapter_files(unet, AdapterMetadata())["adapter_config.json"])
    assert len(saved["target_modules"]) == 32
    assert all(name in dict(unet.named_modules()) for name in saved["target_modules"])


def test_many_targets_and_long_names_take_no_time(tmp_path: Path) -> None:
    save_method(tmp_path, "lora")
    rewrite_config(tmp_path, target_modules=[f"a{n}." * 30 + "b" for n in range(4000)])
    refused(tmp_path, "which the configuration does not target")


@pytest.mark.parametrize("has_adapter", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_a_failure_in_the_midst_of_loading_puts_the_model_back(
    tmp_path: Path, method: str, has_adapter: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_method(tmp_path, method)
    unet = tiny_sd().unet
    if has_adapter:
        load_any(unet, tmp_path, adapter_name="first")
    before = state(unet), in_force(unet)
    monkeypatch.setattr(load, "set_peft_model_state_dict", no_memory)
    with pytest.raises(MemoryError):
        load_any(unet, tmp_path)
    assert (state(unet), in_force(unet)) == before
    monkeypatch.undo()
    assert load_any(unet, tmp_path).num_projections == 32


def test_a_failure_of_ether_over_a_lora_leaves_the_lora_in_force(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_method(tmp_path, "lora")
    unet = tiny_sd().unet
    unet.add_adapter(EtherConfig())
    save_ether(unet, tmp_path / "ether")
    lora = tiny_sd().unet
    load_any(lora, tmp_path, adapter_name="lora")
    before = state(lora), in_force(lora)
    monkeypatch.setattr(load, "set_peft_model_state_dict", no_memory)
    with pytest.raises(MemoryError):
        load_any(lora, tmp_path / "ether")
    assert (state(lora), in_force(lora)) == before


def in_force(model: nn.Module) -> list[tuple[list[str], bool]]:
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    return [(list(layer.active_adapters), layer.disable_adapters) for layer in layers]


def no_memory(*_: object) -> None:
    raise MemoryError("no memory left")
