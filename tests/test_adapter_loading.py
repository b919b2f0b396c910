"""Loaded adapters compute what the saved ones did, whatever model takes them and whatever else it carries."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Factory, Log
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import IPAdapterPlusImageProjection, MultiIPAdapterImageProjection
from peft import LoraConfig, OFTConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from small_models import adapted_unet, exactly_equal, output, small_unet
from tiny_pipelines import motion_unet, tiny_sd
from torch import nn
from transformer_families import TRANSFORMERS

from ether_diffusion import EtherConfig
from ether_diffusion.adapters import (
    AdapterMetadata,
    AdapterPart,
    detach_adapter,
    load_ether,
    read_adapter,
    save_ether,
    write_adapter,
)
from ether_diffusion.tuner import EtherLinear

TENSORS = "adapter_model.safetensors"
ACROSS = pytest.mark.parametrize("targets", [["to_q", "to_v"], ["attn1.to_k"], ["to_out.0"]], ids="+".join)
A_SECOND = pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: Factory) -> Path:
    """The adapter of adapted_unet(), which is always the same."""
    folder = tmp_path_factory.mktemp("saved")
    save_ether(adapted_unet(), folder)
    return folder


@pytest.fixture(scope="module")
def unknown(saved: Path, tmp_path_factory: Factory) -> Path:
    """The same without a word of its base, as PEFT's own save_pretrained would have written it."""
    return without_fingerprint(saved, tmp_path_factory.mktemp("unknown"))


def without_fingerprint(folder: Path, to: Path) -> Path:
    adapter = read_adapter(folder)
    write_adapter(to, AdapterPart(adapter.config, adapter.tensors, AdapterMetadata()))
    return to


@pytest.mark.parametrize(
    "config",
    [
        {"variant": "ether", "sides": "both", "num_blocks": 2},
        {"variant": "ether_plus", "init_weights": False},
        {"variant": "ether_plus", "sides": "output", "init_weights": False},
        {"variant": "ether", "num_blocks_pattern": {"attn1.to_q": 8, "mid_block.*": 2}},
        {"variant": "ether", "target_modules": r".*attn2\.to_[qk]"},
        {"variant": "ether", "exclude_modules": ["attn2.to_v"]},
        {"variant": "ether"},
    ],
    ids=str,
)
def test_a_saved_adapter_gives_the_same_output_bit_for_bit_through_load_ether_and_through_peft(
    config: dict[str, Any], tmp_path: Path
) -> None:
    unet, fresh = adapted_unet(**config), small_unet()
    expected = output(unet)
    save_ether(unet, tmp_path)
    load_ether(fresh, tmp_path, adapter_name="dog")
    assert not exactly_equal(expected, output(small_unet()))
    assert exactly_equal(output(fresh), expected)
    assert exactly_equal(output(PeftModel.from_pretrained(small_unet(), tmp_path)), expected)


def test_loading_says_into_how_many_projections_and_draws_no_random_number(saved: Path, caplog: Log) -> None:
    unet = small_unet()
    before = torch.get_rng_state()
    with caplog.at_level(logging.INFO, logger="ether_diffusion"):
        report = load_ether(unet, saved, adapter_name="dog")
    assert [record.getMessage() for record in caplog.records] == [f"loaded {saved} into 32 projections"]
    assert (report.num_projections, report.base_match, report.adapter_name) == (32, "same", "dog")
    assert exactly_equal(torch.get_rng_state(), before)


def test_a_file_of_plain_peft_loads_and_says_that_its_base_is_unchecked(tmp_path: Path, caplog: Log) -> None:
    model, fresh = get_peft_model(small_unet(), EtherConfig()), small_unet()
    model.save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO, logger="ether_diffusion"):
        assert load_ether(fresh, tmp_path).base_match == "unknown"
    (record,) = caplog.records
    assert "carries no fingerprint, so its base was checked by shape only" in record.getMessage()
    assert exactly_equal(output(fresh), output(model))


@pytest.mark.parametrize("options", [{}, {"activate": False}, {"trainable": True}], ids=str)
def test_loading_freezes_the_base_and_what_is_not_to_be_trained(saved: Path, options: dict[str, Any]) -> None:
    unet = small_unet()
    load_ether(unet, saved, **options)
    flags = {name: p.requires_grad for name, p in unet.named_parameters()}
    assert {flag for name, flag in flags.items() if "ether_" in name} == {options.get("trainable", False)}
    assert not any(flag for name, flag in flags.items() if "ether_" not in name)
    is_base = exactly_equal(output(unet), output(small_unet()))
    assert is_base is (options == {"activate": False})


def test_an_adapter_loads_into_a_peft_model_that_carries_another(saved: Path) -> None:
    model = get_peft_model(small_unet(), EtherConfig(num_blocks=2))
    before = output(model)
    load_ether(model, saved, adapter_name="dog", activate=False)
    assert exactly_equal(output(model), before)
    model.set_adapter("dog")
    assert exactly_equal(output(model), output(adapted_unet()))


def test_dropout_stays_off_in_a_model_that_is_in_eval_mode(tmp_path: Path) -> None:
    save_ether(adapted_unet(dropout=0.5), tmp_path)
    unet = small_unet()
    load_ether(unet, tmp_path)
    assert exactly_equal(output(unet), output(unet))


def test_a_regex_of_the_file_is_replaced_by_the_very_modules_it_adapts(tmp_path: Path) -> None:
    unet = adapted_unet(target_modules=r".*(attn1)\.to_q", num_blocks_pattern={".*down_blocks.*": 2})
    save_ether(unet, tmp_path)
    fresh = small_unet()
    load_ether(fresh, tmp_path)
    found, expected = (detach_adapter(model, "default").projections() for model in (fresh, unet))
    assert found.keys() == expected.keys()
    assert "(attn1)" not in fresh.peft_config["default"].target_modules


def test_an_adapter_of_half_precision_is_held_in_float32(saved: Path, tmp_path: Path) -> None:
    adapter = read_adapter(saved).first
    halves = {name: tensor.half() for name, tensor in adapter.tensors.items()}
    write_adapter(tmp_path, AdapterPart(adapter.config, halves, adapter.metadata))
    unet = small_unet().to(torch.bfloat16)
    load_ether(unet, tmp_path)
    assert {p.dtype for name, p in unet.named_parameters() if "ether_" in name} == {torch.float32}


@pytest.mark.filterwarnings("ignore")  # the compiler's own, which change with every release
@pytest.mark.parametrize("name", ["", "mid_block", "down_blocks.0.attentions.0"])
def test_compiled_models_and_blocks_take_and_give_the_names_of_the_model(name: str, tmp_path: Path) -> None:
    pattern = {f"{name}.transformer_blocks.0.attn1.to_q": 8} if "." in name else {}
    unet, fresh = adapted_unet(num_blocks_pattern=pattern), small_unet()
    save_ether(unet, tmp_path)
    if name:
        fresh.set_submodule(name, torch.compile(fresh.get_submodule(name), backend="eager"))
    whole: Any = fresh if name else torch.compile(fresh)
    assert load_ether(whole, tmp_path).base_match == "same"
    torch.testing.assert_close(output(fresh), output(unet))
    save_ether(whole, tmp_path / "again")
    assert (tmp_path / "again" / TENSORS).read_bytes() == (tmp_path / TENSORS).read_bytes()


# models that hold more than their base did


def with_image_projection(unet: UNet2DConditionModel) -> None:
    plus = IPAdapterPlusImageProjection(
        embed_dims=32, output_dims=32, hidden_dims=32, depth=1, dim_head=8, heads=4, num_queries=2
    )
    unet.encoder_hid_proj = MultiIPAdapterImageProjection([plus])


def with_attention(unet: UNet2DConditionModel) -> None:
    unet.add_module("reference", Attention(32, heads=4, dim_head=8))


def with_gates(unet: UNet2DConditionModel) -> None:
    for block in (m for m in unet.modules() if hasattr(m, "attn1")):
        block.add_module("fuser", nn.ModuleDict({"attn": Attention(32, heads=4, dim_head=8)}))


@pytest.mark.parametrize("extend", [with_image_projection, with_attention, with_gates])
def test_further_attention_is_not_taken_for_a_missing_part(
    extend: Callable[[UNet2DConditionModel], None], saved: Path, unknown: Path
) -> None:
    for folder, match in ((saved, "same"), (unknown, "unknown")):
        fresh = small_unet()
        extend(fresh)
        report = load_ether(fresh, folder)
        assert (report.num_projections, report.base_match) == (32, match)
        assert detach_adapter(fresh, "default").tensors.keys() == read_adapter(folder).tensors.keys()
        fresh.encoder_hid_proj = None
        assert exactly_equal(output(fresh), output(adapted_unet()))


@pytest.mark.parametrize("has_fingerprint", [True, False])
def test_an_adapter_works_in_the_motion_model_of_its_base(has_fingerprint: bool, tmp_path: Path) -> None:
    unet, motion = tiny_sd().unet, motion_unet()
    unet.add_adapter(EtherConfig())
    save_ether(unet, tmp_path)
    if not has_fingerprint:
        without_fingerprint(tmp_path, tmp_path)
    assert load_ether(motion, tmp_path).num_projections == 32
    found, expected = (
        {name for name, module in model.named_modules() if isinstance(module, EtherLinear)}
        for model in (motion, unet)
    )
    assert found == expected
    save_ether(motion, tmp_path / "again")
    assert read_adapter(tmp_path / "again").tensors.keys() == read_adapter(tmp_path).tensors.keys()


@pytest.mark.parametrize("lost", ["mid_block.attentions.0", "up_blocks.1.attentions.1", "attn2.to_v"])
def test_without_a_fingerprint_lost_modules_are_refused(lost: str, unknown: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_bytes((unknown / "adapter_config.json").read_bytes())
    tensors = load_file(unknown / TENSORS)
    save_file({k: t for k, t in tensors.items() if lost not in k or "attn1" in k}, tmp_path / TENSORS)
    with pytest.raises(ValueError, match="lacks projections that its configuration targets"):
        load_ether(small_unet(), tmp_path)


@pytest.mark.parametrize("targets", [["to_q"], ["to_k"], ["to_v", "to_out.0"], ["to_out.0"]], ids="+".join)
def test_an_adapter_is_loaded_beside_fused_projections(targets: list[str], tmp_path: Path) -> None:
    save_ether(adapted_unet(target_modules=targets), tmp_path)
    plain, fused = small_unet(), small_unet()
    fused.fuse_qkv_projections()
    for unet in (plain, fused):
        load_ether(unet, tmp_path)
    torch.testing.assert_close(output(fused), output(plain))
    fused.unfuse_qkv_projections()
    assert exactly_equal(output(fused), output(plain))


@pytest.mark.parametrize("family", ["flux", "sd3", "auraflow", "wan"])
def test_fused_projections_of_transformers_carry_a_loaded_adapter(family: str, tmp_path: Path) -> None:
    model = TRANSFORMERS[family]()
    model.add_adapter(EtherConfig(target_modules=["to_q"], num_blocks=1))
    save_ether(model, tmp_path)
    fused = TRANSFORMERS[family]()
    fused.fuse_qkv_projections()
    load_ether(fused, tmp_path)
    attentions = [module for module in fused.modules() if hasattr(module, "to_qkv")]
    assert attentions
    for attention in attentions:
        for hook in attention._forward_pre_hooks.values():  # as a call of the attention does
            hook(attention, ())
        x = torch.randn(3, attention.to_q.in_features)
        parts = [attention.to_q(x), attention.to_k(x), attention.to_v(x)]
        assert torch.equal(attention.to_qkv(x), torch.cat(parts, dim=-1))
        assert not torch.allclose(parts[0], attention.to_q.base_layer(x))


def test_a_module_with_a_hyphen_in_its_name_is_saved_and_loaded(tmp_path: Path) -> None:
    model = TRANSFORMERS["z_image"]()
    model.add_adapter(EtherConfig(target_modules=["all_final_layer.2-1.linear"], num_blocks=1))
    save_ether(model, tmp_path)
    assert load_ether(TRANSFORMERS["z_image"](), tmp_path).num_projections == 1


# beside and beneath a LoRA


@ACROSS
@A_SECOND
def test_loading_beside_a_lora_gives_the_same_in_either_order(targets: list[str], saved: Path) -> None:
    lora = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    predictions = []
    for steps in ("lora ether", "ether lora"):
        unet = small_unet()
        for step in steps.split():
            torch.manual_seed(4)
            if step == "lora":
                unet.add_adapter(lora, "lora")
            else:
                load_ether(unet, saved, adapter_name="ether")
        for names in ("lora", "ether", ["lora", "ether"]):
            unet.set_adapters(names)
            predictions.append(output(unet))
    assert exactly_equal(predictions[1], output(adapted_unet()))
    assert not exactly_equal(predictions[2], predictions[1])
    for ours, theirs in zip(predictions[:3], predictions[3:], strict=True):
        assert exactly_equal(ours, theirs)


@ACROSS
@A_SECOND
def test_an_adapter_that_is_loaded_over_a_lora_is_alone_in_force(targets: list[str], saved: Path) -> None:
    unet = small_unet()
    unet.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False), "lora")
    of_lora = output(unet)
    load_ether(unet, saved, adapter_name="quiet", activate=False)
    assert exactly_equal(output(unet), of_lora)
    load_ether(unet, saved, adapter_name="ether")
    assert unet.active_adapters() == ["ether"]
    assert exactly_equal(output(unet), output(adapted_unet()))
    unet.set_adapters("lora")
    assert exactly_equal(output(unet), of_lora)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_an_adapter_that_is_loaded_over_oft_leaves_it_ready_for_pefts_set_adapter(saved: Path) -> None:
    predictions = []
    for order in ("oft ether", "ether oft"):
        unet = small_unet()
        for step in order.split():
            torch.manual_seed(4)
            if step == "oft":
                unet.add_adapter(OFTConfig(oft_block_size=4, target_modules=["to_q"]), "oft")
            else:
                load_ether(unet, saved, adapter_name="ether")
        for name, parameter in unet.named_parameters():
            if "oft_R" in name:
                parameter.data = torch.full_like(parameter, 0.1)
        unet.set_adapter(["oft", "ether"])
        predictions.append(output(unet))
    assert exactly_equal(*predictions)
    assert not exactly_equal(predictions[0], output(adapted_unet()))


@ACROSS
@A_SECOND
def test_an_adapter_beneath_a_lora_is_saved_under_the_models_names(
    targets: list[str], tmp_path: Path
) -> None:
    unet, fresh = adapted_unet(), small_unet()
    unet.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False), "lora")
    save_ether(unet, tmp_path)
    assert load_ether(fresh, tmp_path).base_match == "same"
    assert exactly_equal(output(fresh), output(adapted_unet()))


@pytest.mark.parametrize(
    "beneath", ["to_q", "attn1.to_k", "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0"]
)
def test_a_file_that_was_saved_from_beneath_a_lora_is_read(beneath: str, saved: Path, tmp_path: Path) -> None:
    adapter = read_adapter(saved).first
    renamed = {}
    for key, tensor in adapter.tensors.items():
        module, _, vector = key.rpartition(".")
        renamed[f"{module}.base_layer.{vector}" if module.endswith(beneath) else key] = tensor
    base = adapter.metadata.base_fingerprint
    assert base is not None
    metadata = replace(adapter.metadata, base_fingerprint=replace(base, architecture="0" * 12))
    write_adapter(tmp_path, AdapterPart(adapter.config, renamed, metadata))
    assert renamed.keys() != adapter.tensors.keys()
    fresh = small_unet()
    assert load_ether(fresh, tmp_path).base_match == "unknown"
    assert exactly_equal(output(fresh), output(adapted_unet()))
