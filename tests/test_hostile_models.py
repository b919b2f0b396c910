"""An adapter that is not one of this model (46 to 50) is refused in one sentence; nothing changes."""

import json
import re
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from hostile_files import (
    FIRST,
    TENSORS,
    good_adapter,
    refusal,
    rewrite_config,
    rewrite_header,
    rewrite_tensors,
    state,
)
from peft import LoraConfig, OFTConfig, get_peft_model
from safetensors.torch import save_file
from small_models import small_unet

from ether_diffusion import EtherConfig
from ether_diffusion.adapters import AdapterPart, load_ether, read_adapter, write_adapter
from ether_diffusion.tuner import EtherLinear


@pytest.fixture(scope="module")
def base() -> UNet2DConditionModel:
    return small_unet()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return good_adapter(tmp_path / "adapter")


# 46 and 47 are in test_adapter_fingerprint.py; here the file says nothing of its base


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
    needed = r"lacks .*ether_input_v and \d+ more, which variant='ether_plus', .*sides='input' needs"
    assert re.search(needed, refusal(base, folder))


def test_a_vector_too_many_is_named(base: UNet2DConditionModel, folder: Path) -> None:
    name = FIRST.replace("input", "output")
    rewrite_tensors(folder, lambda tensors: tensors.update({name: torch.ones(4, 8)}))
    assert "not those of ETHER with variant='ether', num_blocks=4, sides='input'" in refusal(base, folder)


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
    assert "holds tensors that are not those of ETHER" in refusal(base, folder)


def test_an_unsupported_layer_is_refused_by_name(base: UNet2DConditionModel, folder: Path) -> None:
    config = EtherConfig(num_blocks=1, target_modules=["conv_in"])
    write_adapter(folder, AdapterPart(config, {"conv_in.ether_input_u": torch.ones(1, 4)}))
    message = refusal(base, folder)
    assert "conv_in is a torch.nn.modules.conv.Conv2d; ETHER adapts torch.nn.Linear" in message


def test_a_projection_that_carries_an_oft_is_refused_by_name(folder: Path) -> None:
    unet = small_unet()
    unet.add_adapter(OFTConfig(oft_block_size=4, target_modules=["attn1.to_q"]), adapter_name="oft")
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
    assert FIRST.removeprefix("base_model.model.").removesuffix(".ether_input_u") in message
    assert "num_blocks=2, sides='input' has; the two files do not belong together" in message


def test_a_vector_of_the_wrong_length_names_the_layer(base: UNet2DConditionModel, folder: Path) -> None:
    rewrite_tensors(folder, lambda tensors: tensors.update({FIRST: torch.ones(4, 9)}))
    assert "attn1.to_k: input width 32 here and 36 in the adapter" in refusal(base, folder)


def test_a_pattern_says_the_blocks_of_the_layers_it_names(base: UNet2DConditionModel, folder: Path) -> None:
    rewrite_config(folder, num_blocks_pattern={"attn1.to_k": 2})
    assert "num_blocks=2, sides='input' has; the two files do not" in refusal(base, folder)


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
