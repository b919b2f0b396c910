"""Adapters in models that hold more than their base did, run it otherwise, or carry other things on top."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import IPAdapterPlusImageProjection, MultiIPAdapterImageProjection
from peft import LoraConfig
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


def without_fingerprint(folder: Path) -> None:
    """Leave of an adapter what PEFT's own save_pretrained would have written."""
    adapter = read_adapter(folder)
    write_adapter(folder, AdapterPart(adapter.config, adapter.tensors, AdapterMetadata()))


def with_image_projection(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    plus = IPAdapterPlusImageProjection(
        embed_dims=32, output_dims=32, hidden_dims=32, depth=1, dim_head=8, heads=4, num_queries=2
    )
    unet.encoder_hid_proj = MultiIPAdapterImageProjection([plus])
    return unet


def with_attention(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    unet.add_module("reference", Attention(32, heads=4, dim_head=8))
    return unet


def with_gates(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    for block in (m for m in unet.modules() if hasattr(m, "attn1")):
        block.add_module("fuser", nn.ModuleDict({"attn": Attention(32, heads=4, dim_head=8)}))
    return unet


@pytest.mark.parametrize("extend", [with_image_projection, with_attention, with_gates])
@pytest.mark.parametrize("has_fingerprint", [True, False])
def test_further_attention_is_not_taken_for_a_missing_part(
    extend: Callable[[UNet2DConditionModel], UNet2DConditionModel], has_fingerprint: bool, tmp_path: Path
) -> None:
    unet = adapted_unet()
    save_ether(unet, tmp_path)
    if not has_fingerprint:
        without_fingerprint(tmp_path)
    fresh = extend(small_unet())
    report = load_ether(fresh, tmp_path)
    assert (report.num_projections, report.base_match) == (32, "same" if has_fingerprint else "unknown")
    assert detach_adapter(fresh, "default").tensors.keys() == detach_adapter(unet, "default").tensors.keys()
    fresh.encoder_hid_proj = None
    assert exactly_equal(output(fresh), output(unet))


@pytest.mark.parametrize("has_fingerprint", [True, False])
def test_an_adapter_works_in_the_motion_model_of_its_base(has_fingerprint: bool, tmp_path: Path) -> None:
    pipe = tiny_sd()
    pipe.unet.add_adapter(EtherConfig())
    save_ether(pipe.unet, tmp_path)
    if not has_fingerprint:
        without_fingerprint(tmp_path)
    motion = motion_unet()
    assert load_ether(motion, tmp_path).num_projections == 32
    adapted = {name for name, module in motion.named_modules() if isinstance(module, EtherLinear)}
    assert adapted == {n for n, module in pipe.unet.named_modules() if isinstance(module, EtherLinear)}
    save_ether(motion, tmp_path / "again")
    again = read_adapter(tmp_path / "again")
    assert again.tensors.keys() == read_adapter(tmp_path).tensors.keys()


def test_an_adapter_of_motion_modules_is_refused_without_them(tmp_path: Path) -> None:
    motion = motion_unet()
    motion.add_adapter(EtherConfig())
    save_ether(motion, tmp_path)
    with pytest.raises(ValueError, match="56 of its 88 projections are not in"):
        load_ether(tiny_sd().unet, tmp_path)


@pytest.mark.parametrize("lost", ["mid_block.attentions.0", "up_blocks.1.attentions.1", "attn2.to_v"])
def test_a_file_without_a_fingerprint_that_lost_some_modules_is_refused(lost: str, tmp_path: Path) -> None:
    save_ether(adapted_unet(), tmp_path)
    without_fingerprint(tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    save_file({k: t for k, t in tensors.items() if lost not in k or "attn1" in k}, tmp_path / TENSORS)
    with pytest.raises(ValueError, match="lacks projections that its configuration targets"):
        load_ether(small_unet(), tmp_path)


def test_a_larger_model_of_other_weights_is_not_taken_for_the_base(tmp_path: Path) -> None:
    save_ether(adapted_unet(), tmp_path)
    with pytest.raises(ValueError, match="it is not whole, or was made for another base"):
        load_ether(small_unet(seed=3, layers_per_block=2), tmp_path)


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


@pytest.mark.parametrize("targets", [["to_q", "to_v"], ["attn1.to_k"], ["to_out.0"]], ids="+".join)
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
def test_loading_beside_a_lora_gives_the_same_in_either_order(targets: list[str], tmp_path: Path) -> None:
    save_ether(adapted_unet(), tmp_path)
    lora = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    predictions = []
    for steps in ("lora ether", "ether lora"):
        unet = small_unet()
        for step in steps.split():
            torch.manual_seed(4)
            if step == "lora":
                unet.add_adapter(lora, "lora")
            else:
                load_ether(unet, tmp_path, adapter_name="ether")
        for names in ("lora", "ether", ["lora", "ether"]):
            unet.set_adapters(names)
            predictions.append(output(unet))
    alone = small_unet()
    load_ether(alone, tmp_path)
    assert exactly_equal(predictions[1], output(alone))
    assert not exactly_equal(predictions[2], predictions[1])
    for ours, theirs in zip(predictions[:3], predictions[3:], strict=True):
        assert exactly_equal(ours, theirs)


@pytest.mark.parametrize("targets", [["to_q", "to_v"], ["attn1.to_k"], ["to_out.0"]], ids="+".join)
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
def test_an_adapter_beneath_a_lora_is_saved_under_the_names_of_the_model(
    targets: list[str], tmp_path: Path
) -> None:
    unet = adapted_unet()
    expected = output(unet)
    unet.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False), "lora")
    save_ether(unet, tmp_path)
    fresh = small_unet()
    assert load_ether(fresh, tmp_path).base_match == "same"
    assert exactly_equal(output(fresh), expected)


@pytest.mark.parametrize(
    "beneath", ["to_q", "attn1.to_k", "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0"]
)
def test_a_file_that_was_saved_from_beneath_a_lora_is_read(beneath: str, tmp_path: Path) -> None:
    unet = adapted_unet()
    adapter = detach_adapter(unet, "default")
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
    assert exactly_equal(output(fresh), output(unet))


def test_a_file_that_has_a_projection_under_two_names_is_refused(tmp_path: Path) -> None:
    adapter = detach_adapter(adapted_unet(), "default")
    twice = {k.replace(".ether", ".base_layer.ether"): t.clone() for k, t in adapter.tensors.items()}
    write_adapter(tmp_path, AdapterPart(adapter.config, adapter.tensors | twice))
    with pytest.raises(ValueError, match="one projection under two names"):
        read_adapter(tmp_path)


@pytest.mark.filterwarnings("ignore")  # the compiler's own, which change with every release
@pytest.mark.parametrize("name", ["mid_block", "down_blocks.0.attentions.0", "up_blocks.1.attentions.0"])
def test_a_compiled_block_takes_and_gives_the_names_of_the_model(name: str, tmp_path: Path) -> None:
    unet = adapted_unet(
        num_blocks_pattern={f"{name}.transformer_blocks.0.attn1.to_q": 8} if "." in name else {}
    )
    save_ether(unet, tmp_path)
    fresh = small_unet()
    fresh.set_submodule(name, torch.compile(fresh.get_submodule(name), backend="eager"))
    assert load_ether(fresh, tmp_path).base_match == "same"
    torch.testing.assert_close(output(fresh), output(unet))
    save_ether(fresh, tmp_path / "again")
    assert (tmp_path / "again" / TENSORS).read_bytes() == (tmp_path / TENSORS).read_bytes()


def test_a_module_with_a_hyphen_in_its_name_is_saved_and_loaded(tmp_path: Path) -> None:
    model = TRANSFORMERS["z_image"]()
    model.add_adapter(EtherConfig(target_modules=["all_final_layer.2-1.linear"], num_blocks=1))
    save_ether(model, tmp_path)
    fresh = TRANSFORMERS["z_image"]()
    assert load_ether(fresh, tmp_path).num_projections == 1
