"""Adapters survive the way to disk and back; PEFT, safetensors and the Hub's tools read what is written."""

import hashlib
import json
import logging
import os
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DConditionModel
from huggingface_hub import DryRunFileInfo, ModelCard
from huggingface_hub.errors import EntryNotFoundError
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaForCausalLM

from ether_diffusion import EtherConfig
from ether_diffusion.adapter_file import (
    Adapter,
    AdapterMetadata,
    BaseFingerprint,
    base_fingerprint,
    detach_adapter,
    fingerprint,
    load_ether,
    read_adapter,
    save_ether,
    write_adapter,
)
from ether_diffusion.adapter_file.schema import metadata_header, parse_metadata
from ether_diffusion.tuner import EtherLinear

CONFIGS = [
    {"variant": "ether"},
    {"variant": "ether", "sides": "both", "num_blocks": 2},
    {"variant": "ether_plus", "init_weights": False},
    {"variant": "ether_plus", "sides": "output", "init_weights": False},
    {"variant": "ether", "num_blocks_pattern": {"attn1.to_q": 8, "mid_block.*": 2}},
    {"variant": "ether", "target_modules": r".*attn2\.to_[qk]"},
    {"variant": "ether", "exclude_modules": ["attn2.to_v"]},
]


def small_unet(seed: int = 0, **changes: Any) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    form = {
        "sample_size": 8,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 32,
        "attention_head_dim": 8,
        "norm_num_groups": 8,
    }
    return UNet2DConditionModel(**(form | changes)).eval()


def adapted_unet(**config: Any) -> UNet2DConditionModel:
    unet = small_unet()
    unet.add_adapter(EtherConfig(**config))
    return unet


def small_text_encoder(seed: int = 0) -> CLIPTextModel:
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    return CLIPTextModel(config).eval()


def small_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


def output(unet: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    sample, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 32, generator=generator)
    with torch.no_grad():
        result: Tensor = unet(sample, torch.tensor([3, 700]), text, return_dict=False)[0]
    return result


def exactly_equal(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one, other)


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
    write_adapter(tmp_path, Adapter(adapter.config, halves, adapter.metadata))
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


# pipelines


def test_a_pipeline_of_diffusers_saves_and_loads_as_its_unet_does(tmp_path: Path) -> None:
    unet = adapted_unet()
    save_ether(DDPMPipeline(unet, DDPMScheduler()), tmp_path)
    pipe = DDPMPipeline(small_unet(), DDPMScheduler())
    assert load_ether(pipe, tmp_path).components == {"unet": 32}
    assert exactly_equal(output(pipe.unet), output(unet))


def test_a_pipeline_with_a_transformer_takes_the_adapter_of_the_folder_into_it(tmp_path: Path) -> None:
    save_ether(adapted_unet(), tmp_path)
    pipe = SimpleNamespace(components={"transformer": small_unet(), "text_encoder": small_text_encoder()})
    assert load_ether(pipe, tmp_path).components == {"transformer": 32}


def pipeline(*, text_encoder: bool = True, adapt_text: bool = False) -> SimpleNamespace:
    parts: dict[str, object] = {"unet": small_unet(), "vae": None, "scheduler": object()}
    if text_encoder:
        parts["text_encoder"] = small_text_encoder()
    if adapt_text:
        torch.manual_seed(2)
        parts["unet"].add_adapter(EtherConfig())  # type: ignore[attr-defined]
        parts["text_encoder"].add_adapter(EtherConfig(target_modules=["q_proj"]))  # type: ignore[attr-defined]
    return SimpleNamespace(components=parts)


def encoded(pipe: SimpleNamespace) -> Tensor:
    with torch.no_grad():
        result: Tensor = pipe.components["text_encoder"](torch.arange(10)[None])[0]
    return result


def test_a_pipeline_takes_back_the_adapters_of_unet_and_text_encoder(tmp_path: Path) -> None:
    pipe, fresh = pipeline(adapt_text=True), pipeline()
    save_ether(pipe, tmp_path)
    assert (tmp_path / "text_encoder" / "adapter_model.safetensors").exists()
    report = load_ether(fresh, tmp_path, adapter_name="dog")
    assert report.components == {"unet": 32, "text_encoder": 2}
    assert exactly_equal(output(fresh.components["unet"]), output(pipe.components["unet"]))
    assert exactly_equal(encoded(fresh), encoded(pipe))


def test_what_holds_no_model_that_can_be_adapted_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has none of unet, transformer"):
        save_ether(SimpleNamespace(components={"vae": nn.Linear(2, 2)}), tmp_path)
    with pytest.raises(ValueError, match="str is neither a torch module nor a diffusers pipeline"):
        load_ether("model", tmp_path)  # type: ignore[arg-type]


def test_a_pipeline_without_the_text_encoder_refuses_its_adapter(tmp_path: Path) -> None:
    save_ether(pipeline(adapt_text=True), tmp_path)
    pipe = pipeline(text_encoder=False)
    with pytest.raises(ValueError, match="an adapter of text_encoder, which this pipeline lacks"):
        load_ether(pipe, tmp_path)
    assert not hasattr(pipe.components["unet"], "peft_config")


def test_a_bare_unet_is_told_of_the_text_encoders_adapter_that_it_leaves(tmp_path: Path) -> None:
    save_ether(pipeline(adapt_text=True), tmp_path)
    with pytest.warns(UserWarning, match="also holds an adapter of text_encoder, which is not loaded"):
        load_ether(small_unet(), tmp_path)


def test_a_unet_alone_is_not_saved_over_an_adapter_with_a_text_encoder(tmp_path: Path) -> None:
    save_ether(pipeline(adapt_text=True), tmp_path)
    with pytest.raises(ValueError, match="holds adapters of text_encoder, which 'default' lacks"):
        save_ether(adapted_unet(), tmp_path)


def test_a_text_encoder_that_does_not_fit_leaves_the_unet_untouched(tmp_path: Path) -> None:
    save_ether(pipeline(adapt_text=True), tmp_path)
    pipe = pipeline()
    pipe.components["text_encoder"] = small_llama()
    before = {name: type(module) for name, module in pipe.components["unet"].named_modules()}
    with pytest.raises(ValueError, match="2 of its 2 projections are not in"):
        load_ether(pipe, tmp_path)
    assert {name: type(module) for name, module in pipe.components["unet"].named_modules()} == before


def test_a_failure_in_the_text_encoder_takes_the_adapter_out_of_the_unet_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_ether(pipeline(adapt_text=True), tmp_path)
    pipe, layers = pipeline(), iter(range(100))
    before = output(pipe.components["unet"])
    update = EtherLinear.update_layer

    def failing(self: EtherLinear, *arguments: Any) -> None:
        if next(layers) == 33:  # the second of the text encoder's
            raise MemoryError("no memory left")
        update(self, *arguments)

    monkeypatch.setattr(EtherLinear, "update_layer", failing)
    with pytest.raises(MemoryError, match="no memory left"):
        load_ether(pipe, tmp_path)
    for part in ("unet", "text_encoder"):
        assert not any(isinstance(module, EtherLinear) for module in pipe.components[part].modules())
        assert not hasattr(pipe.components[part], "peft_config")
        assert all(parameter.requires_grad for parameter in pipe.components[part].parameters())
    assert exactly_equal(output(pipe.components["unet"]), before)


def test_a_failure_in_a_peft_model_leaves_its_own_adapter_in_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_ether(adapted_unet(), tmp_path)
    model = get_peft_model(small_unet(), EtherConfig(num_blocks=2))
    before, flags = output(model), [p.requires_grad for p in model.parameters()]
    names = list(model.state_dict())
    monkeypatch.setattr(
        "ether_diffusion.adapter_file.attach.set_peft_model_state_dict",
        lambda *_: (_ for _ in ()).throw(MemoryError("no memory left")),
    )
    with pytest.raises(MemoryError, match="no memory left"):
        load_ether(model, tmp_path, adapter_name="dog")
    assert list(model.peft_config) == ["default"]
    assert list(model.state_dict()) == names
    assert [p.requires_grad for p in model.parameters()] == flags
    assert exactly_equal(output(model), before)


# the base's fingerprint


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [32, 320, 1280])
def test_rounding_a_base_leaves_it_the_same_base(dtype: torch.dtype, width: int) -> None:
    torch.manual_seed(0)
    weights = {f"layer{i}": torch.randn(width, 64) * 0.05 for i in range(16)}
    rounded = {name: weight.to(dtype) for name, weight in weights.items()}
    one, other = fingerprint(weights), fingerprint(rounded)
    assert one is not None
    assert other is not None
    assert one.compare(other) == other.compare(one) == "same"


@pytest.mark.parametrize(
    ("dtype", "step"), [(torch.float32, 1e-5), (torch.float16, 1e-4), (torch.bfloat16, 1e-3)]
)
def test_fine_tuning_a_base_makes_other_weights(dtype: torch.dtype, step: float) -> None:
    """A hundred steps of AdamW on each entry, of one sign as often as chance has it, and its weight decay."""
    torch.manual_seed(0)
    weights = {f"layer{i}": torch.randn(320, 320) * 0.05 for i in range(128)}
    tuned = {n: w * (1 - 1e-2 * 100 * step) + step * 10 * torch.randn_like(w) for n, w in weights.items()}
    one = fingerprint(weights)
    other = fingerprint({name: weight.to(dtype) for name, weight in tuned.items()})
    assert one is not None
    assert other is not None
    assert one.compare(other) == "other weights"


def test_another_shape_or_name_is_another_architecture() -> None:
    prints = [
        fingerprint({name: torch.ones(shape)})
        for name, shape in (("to_q", (4, 6)), ("to_k", (4, 6)), ("to_q", (6, 4)))
    ]
    first = prints[0]
    assert first is not None
    assert [first.compare(other) for other in prints if other is not None] == [
        "same",
        "other architecture",
        "other architecture",
    ]


def test_norms_are_the_frobenius_norms_of_the_weights_in_the_order_of_their_names() -> None:
    weights = {"b": torch.full((2, 2), 3.0), "a": torch.eye(4)}
    found = fingerprint(weights)
    assert found is not None
    assert found.norms == (2.0, 6.0)


def test_merging_an_adapter_does_not_change_the_fingerprint_of_the_base() -> None:
    unet = adapted_unet()
    names = list(detach_adapter(unet, "default").projections())
    before = base_fingerprint(unet, names)
    unet.fuse_lora(adapter_names=["default"])
    assert base_fingerprint(unet, names) == before == base_fingerprint(small_unet(), names)


def test_other_weights_of_the_same_architecture_warn_and_are_refused_on_request(tmp_path: Path) -> None:
    save_ether(adapted_unet(), tmp_path, base_model="stable/base")
    with pytest.warns(
        UserWarning, match="made for stable/base .* has the same architecture and other weights"
    ):
        report = load_ether(small_unet(seed=1), tmp_path)
    assert report.base_match == "other weights"
    with pytest.raises(ValueError, match="other weights; load that base, or leave out require_same_base"):
        load_ether(small_unet(seed=1), tmp_path, require_same_base=True)
    assert load_ether(small_unet(), tmp_path, require_same_base=True).base_match == "same"


def test_another_architecture_is_refused_naming_both_bases(tmp_path: Path) -> None:
    save_ether(adapted_unet(), tmp_path, base_model="stable/base")
    other = small_unet(cross_attention_dim=64)
    other.register_to_config(_name_or_path="stable/other")
    needed = (
        r"made for stable/base \(fingerprint \w+-\w+\), another architecture than stable/other \(\w+-\w+\)"
    )
    with pytest.raises(ValueError, match=needed):
        load_ether(other, tmp_path)


# the files

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
FACTS = st.one_of(
    TEXTS, st.integers(-(10**17), 10**17), st.floats(allow_nan=False, allow_infinity=False), st.booleans()
)
PRINTS = st.builds(
    BaseFingerprint,
    architecture=st.from_regex(r"[0-9a-f]{12}", fullmatch=True),
    norms=st.lists(st.floats(0, 1e30), max_size=5).map(tuple),
    rounding=st.floats(0, 0.1),
)
METADATA = st.builds(
    AdapterMetadata,
    format_version=st.just(1),
    base_model=st.none() | TEXTS,
    base_fingerprint=st.none() | PRINTS,
    trigger=st.none() | TEXTS,
    training=st.dictionaries(TEXTS, FACTS, max_size=5),
)


@given(METADATA)
@settings(max_examples=60, deadline=None)
def test_metadata_survives_the_header(metadata: AdapterMetadata) -> None:
    assert parse_metadata(metadata_header(metadata), "a file") == metadata


def test_an_adapter_survives_the_file_whole(tmp_path: Path) -> None:
    adapter = detach_adapter(
        adapted_unet(variant="ether_plus", num_blocks_pattern={"to_q": 2}),
        "default",
        metadata=AdapterMetadata(base_model="a/b", trigger="sks\n❤", training={"steps": 3, "rate": 1e-3}),
    )
    write_adapter(tmp_path, adapter)
    read = read_adapter(tmp_path)
    assert read.config == adapter.config
    assert read.metadata == adapter.metadata
    assert read.tensors.keys() == adapter.tensors.keys()
    assert all(exactly_equal(read.tensors[name], tensor) for name, tensor in adapter.tensors.items())


def test_safetensors_own_reader_finds_the_vectors_and_the_facts(tmp_path: Path) -> None:
    unet = adapted_unet()
    save_ether(unet, tmp_path, trigger="a photo of sks dog", training={"steps": 800})
    path = tmp_path / "adapter_model.safetensors"
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    stored = load_file(path)[f"base_model.model.{name}.ether_input_u"]
    assert exactly_equal(stored, unet.get_submodule(name).ether_input_u["default"])
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["ether.trigger"]) == "a photo of sks dog"
    assert json.loads(metadata["ether.training"]) == {"steps": 800}
    assert len(json.loads(metadata["ether.base_fingerprint"])["norms"]) == 32


def test_projections_pair_the_vectors_of_each_side(tmp_path: Path) -> None:
    unet = adapted_unet(variant="ether_plus", sides="output")
    (name, (input_side, output_side)), *_ = detach_adapter(unet, "default").projections().items()
    assert input_side is None
    assert output_side is not None
    assert output_side.v is not None
    layer = unet.get_submodule(name)
    assert exactly_equal(output_side.u, layer.ether_output_u["default"])
    assert exactly_equal(output_side.v, layer.ether_output_v["default"])


def test_the_same_adapter_gives_the_same_bytes_every_time(tmp_path: Path) -> None:
    adapter = detach_adapter(
        adapted_unet(),
        "default",
        metadata=AdapterMetadata(base_model="b", trigger="t", training={"steps": 1}),
    )
    digests = set()
    for order in range(8):  # safetensors itself orders the metadata by a hash table, each time another way
        names = sorted(adapter.tensors, key=lambda name: hash((name, order)))
        shuffled = Adapter(adapter.config, {n: adapter.tensors[n] for n in names}, adapter.metadata)
        write_adapter(tmp_path / str(order), shuffled)
        files = sorted((tmp_path / str(order)).iterdir())
        digests.add(tuple(hashlib.sha256(path.read_bytes()).hexdigest() for path in files))
    assert len(digests) == 1


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failed_write_leaves_the_adapter_that_was_there(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_ether(adapted_unet(), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*((os, "fsync", full) if failing == "fsync" else (Path, "replace", full)))
    with pytest.raises(OSError, match="No space left"):
        save_ether(adapted_unet(variant="ether_plus"), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("moment", range(6))
def test_an_interruption_at_any_step_of_writing_leaves_the_old_or_the_new_adapter_whole(
    moment: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = detach_adapter(adapted_unet(), "default")
    new = Adapter(old.config, {name: -2 * tensor for name, tensor in old.tensors.items()}, old.metadata)
    write_adapter(tmp_path, old)
    steps = iter(range(100))

    def interrupted(step: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: object) -> object:
            if next(steps) == moment:
                raise KeyboardInterrupt
            return step(*arguments)

        return run

    monkeypatch.setattr(os, "fsync", interrupted(os.fsync))
    monkeypatch.setattr(Path, "replace", interrupted(Path.replace))
    with pytest.raises(KeyboardInterrupt):
        write_adapter(tmp_path, new)
    read = read_adapter(tmp_path).tensors
    assert any(
        all(exactly_equal(read[name], tensor) for name, tensor in whole.tensors.items())
        for whole in (old, new)
    )
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_what_could_not_be_read_back_is_not_written(value: float, tmp_path: Path) -> None:
    unet = adapted_unet()
    layer = unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
    layer.ether_input_u["default"].data[1] = value
    with pytest.raises(ValueError, match=r"the adapter to be written: .*mid_block.*to_q\.ether_input_u"):
        save_ether(unet, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_whole_modules_beside_the_vectors_are_refused_on_saving(tmp_path: Path) -> None:
    model = get_peft_model(small_unet(), EtherConfig(modules_to_save=["conv_out"]))
    with pytest.raises(ValueError, match="modules_to_save=conv_out"):
        save_ether(model, tmp_path)


def test_saving_an_adapter_that_is_not_there_names_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="carries no ETHER adapter named 'cat'; it has default"):
        save_ether(adapted_unet(), tmp_path, adapter_name="cat")


# the model card


def test_the_model_card_is_one_that_the_hub_reads(tmp_path: Path) -> None:
    save_ether(adapted_unet(), tmp_path, trigger="a photo of sks dog", base_model="stable/base")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "peft"
    assert card.data.base_model == "stable/base"
    assert card.data.instance_prompt == "a photo of sks dog"
    assert {"ether", "text-to-image"} <= set(card.data.tags)
    assert "load_ether(pipe," in card.text
    assert "load_lora_weights" not in card.text


def test_the_model_card_tells_of_the_export_that_lies_beside_it(tmp_path: Path) -> None:
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(b"")
    save_ether(adapted_unet(), tmp_path)
    assert "pipe.load_lora_weights(" in (tmp_path / "README.md").read_text()


def test_the_model_card_of_a_language_model_speaks_of_no_pictures(tmp_path: Path) -> None:
    config = EtherConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    save_ether(get_peft_model(small_llama(), config), tmp_path, base_model="some/llama")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.pipeline_tag is None
    assert 'AutoModelForCausalLM.from_pretrained("some/llama")' in card.text


def test_the_example_of_the_model_card_runs(tmp_path: Path) -> None:
    base = tmp_path / "base"
    DDPMPipeline(small_unet(), DDPMScheduler()).save_pretrained(base)
    save_ether(adapted_unet(), tmp_path / "adapter", base_model=str(base))
    text = ModelCard.load(tmp_path / "adapter" / "README.md").text
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    code = code.replace("path or Hub id of this adapter", str(tmp_path / "adapter"))
    names: dict[str, Any] = {}
    exec(code, names)
    assert exactly_equal(output(names["pipe"].unet), output(adapted_unet()))


def test_a_local_path_is_not_given_to_the_hub_as_the_base(tmp_path: Path) -> None:
    save_ether(adapted_unet(), tmp_path, base_model="/home/somebody/base")
    assert ModelCard.load(tmp_path / "README.md").data.base_model is None


def test_a_readme_that_somebody_edited_is_left_alone(tmp_path: Path) -> None:
    save_ether(adapted_unet(), tmp_path, trigger="one")
    save_ether(adapted_unet(), tmp_path, trigger="two")
    assert "two" in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text((tmp_path / "README.md").read_text().replace("# ETHER", "# My ETHER"))
    save_ether(adapted_unet(), tmp_path, trigger="three")
    text = (tmp_path / "README.md").read_text()
    assert "# My ETHER" in text
    assert "three" not in text


# the Hub


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the Hub as a download leaves it, with the adapter somebody/dog."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    revision = "0" * 40
    repository = tmp_path / "hub" / "models--somebody--dog"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    save_ether(adapted_unet(), repository / "snapshots" / revision)
    return tmp_path / "hub"


def test_an_adapter_of_the_hub_is_read_from_what_was_downloaded(hub_cache: Path) -> None:
    unet = small_unet()
    load_ether(unet, "somebody/dog", local_files_only=True)
    assert exactly_equal(output(unet), output(adapted_unet()))


def test_an_adapter_that_was_not_downloaded_is_named(hub_cache: Path) -> None:
    with pytest.raises(FileNotFoundError, match="of somebody/cat has not been downloaded"):
        read_adapter("somebody/cat", local_files_only=True)


def test_a_folder_is_taken_before_the_hub(
    hub_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(next(hub_cache.glob("*/snapshots/*")), tmp_path / "somebody" / "cat")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(read_adapter("somebody/cat").projections()) == 32


def test_a_pipeline_loads_offline_what_was_downloaded(
    hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert load_ether(pipeline(), "somebody/dog").components == {"unet": 32}


class StandInHub:
    """A Hub with one model, whose files have the sizes given; what it gives out is counted."""

    def __init__(self, folder: Path, **sizes: int) -> None:
        self.folder, self.sizes, self.fetched = folder, sizes, list[str]()

    def download(
        self, repo_id: str, filename: str, *, subfolder: str | None, dry_run: bool = False, **_: object
    ) -> str | DryRunFileInfo:
        path = self.folder / (subfolder or "") / filename
        if not path.exists():
            raise EntryNotFoundError(f"no {filename}")
        if dry_run:
            size = self.sizes.get(path.stem, path.stat().st_size)
            return DryRunFileInfo("0" * 40, size, filename, str(path), is_cached=False, will_download=True)
        self.fetched.append(filename)
        return str(path)


def test_a_hub_adapter_is_fetched_file_by_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_ether(adapted_unet(), tmp_path)
    hub = StandInHub(tmp_path)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", hub.download)
    assert load_ether(pipeline(), "somebody/dog").components == {"unet": 32}
    assert hub.fetched == ["adapter_config.json", "adapter_model.safetensors"]


def test_a_file_of_the_hub_that_is_too_large_is_not_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_ether(adapted_unet(), tmp_path)
    hub = StandInHub(tmp_path, adapter_model=10**9)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", hub.download)
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors has 1000000000 bytes"):
        load_ether(small_unet(), "somebody/dog")
    assert hub.fetched == ["adapter_config.json"]


def test_a_lora_of_the_hub_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.hf_hub_download", StandInHub(tmp_path).download)
    monkeypatch.setattr(
        "huggingface_hub.file_exists", lambda _, name, **__: name == "pytorch_lora_weights.safetensors"
    )
    with pytest.raises(ValueError, match=r"this is a LoRA; use pipe\.load_lora_weights"):
        load_ether(small_unet(), "somebody/lora")
