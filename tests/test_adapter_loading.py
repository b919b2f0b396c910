"""Loaded adapters compute what the saved ones did, in models of PEFT, diffusers and transformers."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from small_models import adapted_unet, exactly_equal, output, small_llama, small_unet

from ether_diffusion import EtherConfig
from ether_diffusion.adapters import AdapterPart, detach_adapter, load_ether, save_ether, write_adapter

CONFIGS = [
    {"variant": "ether"},
    {"variant": "ether", "sides": "both", "num_blocks": 2},
    {"variant": "ether_plus", "init_weights": False},
    {"variant": "ether_plus", "sides": "output", "init_weights": False},
    {"variant": "ether", "num_blocks_pattern": {"attn1.to_q": 8, "mid_block.*": 2}},
    {"variant": "ether", "target_modules": r".*attn2\.to_[qk]"},
    {"variant": "ether", "exclude_modules": ["attn2.to_v"]},
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_saved_adapter_gives_the_same_output_bit_for_bit_in_a_fresh_unet(
    config: dict[str, Any], tmp_path: Path
) -> None:
    unet = adapted_unet(**config)
    save_ether(unet, tmp_path)
    fresh = small_unet()
    load_ether(fresh, tmp_path, adapter_name="dog")
    assert exactly_equal(output(fresh), output(unet))
    assert not exactly_equal(output(fresh), output(small_unet()))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_peft_reads_what_is_written_and_gives_the_same_output_bit_for_bit(
    config: dict[str, Any], tmp_path: Path
) -> None:
    unet = adapted_unet(**config)
    save_ether(unet, tmp_path, trigger="a photo of sks dog")
    assert exactly_equal(output(PeftModel.from_pretrained(small_unet(), tmp_path)), output(unet))


@pytest.mark.parametrize("activate", [True, False])
def test_loading_freezes_the_base_whether_the_adapter_is_active_or_not(
    tmp_path: Path, activate: bool
) -> None:
    save_ether(adapted_unet(variant="ether_plus", init_weights=False), tmp_path)
    unet = small_unet()
    load_ether(unet, tmp_path, activate=activate)
    assert not any(parameter.requires_grad for parameter in unet.parameters())


def test_a_file_that_plain_peft_wrote_loads_and_says_once_that_its_base_is_unchecked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(1)
    model = get_peft_model(small_unet(), EtherConfig())
    model.save_pretrained(tmp_path)
    fresh = small_unet()
    with caplog.at_level(logging.INFO, logger="ether_diffusion"):
        report = load_ether(fresh, tmp_path)
    assert report.base_match == "unknown"
    (record,) = caplog.records
    assert record.getMessage() == (
        f"loaded {tmp_path} into 32 projections; it carries no fingerprint, so its base was checked by shape "
        "only"
    )
    assert exactly_equal(output(fresh), output(model))


def test_a_language_model_keeps_its_logits_through_peft_and_back(tmp_path: Path) -> None:
    config = EtherConfig(variant="ether_plus", init_weights=False, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(small_llama(), config)
    save_ether(model, tmp_path)
    tokens = torch.arange(10)[None]
    fresh = small_llama()
    load_ether(fresh, tmp_path)
    with torch.no_grad():
        expected = model(tokens).logits
        assert exactly_equal(fresh(tokens).logits, expected)
        assert exactly_equal(PeftModel.from_pretrained(small_llama(), tmp_path)(tokens).logits, expected)


def test_an_adapter_loads_into_a_peft_model_that_carries_another(tmp_path: Path) -> None:
    unet = adapted_unet()
    save_ether(unet, tmp_path)
    torch.manual_seed(5)
    model = get_peft_model(small_unet(), EtherConfig(num_blocks=2))
    before = output(model)
    load_ether(model, tmp_path, adapter_name="dog", activate=False)
    assert exactly_equal(output(model), before)
    model.set_adapter("dog")
    assert exactly_equal(output(model), output(unet))


def test_loading_says_into_how_many_projections(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_ether(adapted_unet(), tmp_path)
    with caplog.at_level(logging.INFO, logger="ether_diffusion"):
        report = load_ether(small_unet(), tmp_path, adapter_name="dog")
    assert [record.getMessage() for record in caplog.records] == [f"loaded {tmp_path} into 32 projections"]
    assert report.num_projections == 32
    assert report.base_match == "same"
    assert report.adapter_name == "dog"


def test_loading_does_not_advance_the_random_generator(tmp_path: Path) -> None:
    save_ether(adapted_unet(), tmp_path)
    unet = small_unet()
    before = torch.get_rng_state()
    load_ether(unet, tmp_path)
    assert exactly_equal(torch.get_rng_state(), before)


def test_a_loaded_adapter_is_for_use_unless_it_is_to_be_trained(tmp_path: Path) -> None:
    save_ether(adapted_unet(), tmp_path)
    for trainable in (False, True):
        unet = small_unet()
        load_ether(unet, tmp_path, trainable=trainable)
        flags = {name: p.requires_grad for name, p in unet.named_parameters()}
        assert {flag for name, flag in flags.items() if "ether_" in name} == {trainable}
        assert not any(flag for name, flag in flags.items() if "ether_" not in name)


def test_dropout_stays_off_in_a_model_that_is_in_eval_mode(tmp_path: Path) -> None:
    save_ether(adapted_unet(dropout=0.5), tmp_path)
    unet = small_unet()
    load_ether(unet, tmp_path)
    assert exactly_equal(output(unet), output(unet))


def test_loading_without_activating_leaves_the_output_of_the_base(tmp_path: Path) -> None:
    save_ether(adapted_unet(), tmp_path)
    unet = small_unet()
    load_ether(unet, tmp_path, activate=False)
    assert exactly_equal(output(unet), output(small_unet()))


def test_two_loaded_adapters_are_weighed_by_set_adapters(tmp_path: Path) -> None:
    torch.manual_seed(1)
    one, two = adapted_unet(), adapted_unet(variant="ether_plus", init_weights=False)
    save_ether(one, tmp_path / "one")
    save_ether(two, tmp_path / "two")
    unet = small_unet()
    load_ether(unet, tmp_path / "one", adapter_name="one")
    load_ether(unet, tmp_path / "two", adapter_name="two")
    assert exactly_equal(output(unet), output(two))  # the newest alone is active, as in diffusers
    unet.set_adapters(["one", "two"], [1.0, 0.0])
    assert exactly_equal(output(unet), output(one))


def test_a_regex_of_the_file_is_replaced_by_the_very_modules_it_adapts(tmp_path: Path) -> None:
    unet = adapted_unet(target_modules=r".*(attn1)\.to_q", num_blocks_pattern={".*down_blocks.*": 2})
    save_ether(unet, tmp_path)
    fresh = small_unet()
    load_ether(fresh, tmp_path)
    assert set(detach_adapter(fresh, "default").projections()) == set(
        detach_adapter(unet, "default").projections()
    )
    assert "(attn1)" not in fresh.peft_config["default"].target_modules


def test_an_adapter_of_half_precision_is_held_in_float32(tmp_path: Path) -> None:
    adapter = detach_adapter(adapted_unet(), "default")
    halves = {name: tensor.half() for name, tensor in adapter.tensors.items()}
    write_adapter(tmp_path, AdapterPart(adapter.config, halves, adapter.metadata))
    unet = small_unet().to(torch.bfloat16)
    load_ether(unet, tmp_path)
    dtypes = {p.dtype for name, p in unet.named_parameters() if "ether_" in name}
    assert dtypes == {torch.float32}


def test_a_compiled_model_saves_and_loads_under_the_names_of_the_model_itself(tmp_path: Path) -> None:
    unet = adapted_unet()
    save_ether(torch.compile(unet), tmp_path)  # type: ignore[arg-type]
    fresh = small_unet()
    load_ether(torch.compile(fresh), tmp_path)  # type: ignore[arg-type]
    assert exactly_equal(output(fresh), output(unet))


def test_a_unet_of_the_form_of_stable_diffusion_1_5_takes_128_projections(tmp_path: Path) -> None:
    down = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    form: dict[str, Any] = {"down_block_types": down, "block_out_channels": (16,) * 4, "layers_per_block": 2}
    form |= {"up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3}
    unet = small_unet(**form)
    unet.add_adapter(EtherConfig())
    save_ether(unet, tmp_path)
    assert load_ether(small_unet(**form), tmp_path).num_projections == 128
