"""What saving writes: numbers and facts, whole or not at all, the base's fingerprint, the model card."""

import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Patch
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from small_models import adapted_unet, exactly_equal, output, small_llama, small_unet
from tiny_pipelines import tiny_sd

from ether_diffusion import EtherConfig
from ether_diffusion.adapters import (
    AdapterMetadata,
    AdapterPart,
    BaseFingerprint,
    base_fingerprint,
    detach_adapter,
    fingerprint,
    load_ether,
    read_adapter,
    save_ether,
    write_adapter,
)
from ether_diffusion.adapters.format import metadata_header, parse_metadata
from ether_diffusion.bases import open_base
from ether_diffusion.tiny_world import EMBEDDED

TO_Q = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
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


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@given(METADATA)
@settings(max_examples=40, deadline=None)
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
    stored = load_file(path)[f"base_model.model.{TO_Q}.ether_input_u"]
    assert exactly_equal(stored, unet.get_submodule(TO_Q).ether_input_u["default"])
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["ether.trigger"]) == "a photo of sks dog"
    assert json.loads(metadata["ether.training"]) == {"steps": 800}
    assert len(json.loads(metadata["ether.base_fingerprint"])["norms"]) == 32


def test_the_same_adapter_gives_the_same_bytes_every_time(tmp_path: Path) -> None:
    metadata = AdapterMetadata(base_model="b", trigger="t", training={"steps": 1})
    adapter = detach_adapter(adapted_unet(), "default", metadata=metadata)
    written = set()
    for order in range(8):  # safetensors itself orders the metadata by a hash table, each time another way
        names = sorted(adapter.tensors, key=lambda name: hash((name, order)))
        shuffled = AdapterPart(adapter.config, {n: adapter.tensors[n] for n in names}, adapter.metadata)
        write_adapter(tmp_path / str(order), shuffled)
        written.add(hashlib.sha256(repr(sorted(files_in(tmp_path / str(order)).items())).encode()).digest())
    assert len(written) == 1


@pytest.mark.parametrize("moment", range(6))
def test_an_interruption_at_any_step_of_writing_leaves_the_old_or_the_new_adapter_whole(
    moment: int, tmp_path: Path, monkeypatch: Patch
) -> None:
    old = detach_adapter(adapted_unet(), "default")
    new = AdapterPart(old.config, {name: -2 * tensor for name, tensor in old.tensors.items()}, old.metadata)
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
    unet.get_submodule(TO_Q).ether_input_u["default"].data[1] = value
    with pytest.raises(ValueError, match=r"the adapter to be written: .*mid_block.*to_q\.ether_input_u"):
        save_ether(unet, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_what_is_no_adapter_of_vectors_is_refused_on_saving(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="modules_to_save=conv_out"):
        save_ether(get_peft_model(small_unet(), EtherConfig(modules_to_save=["conv_out"])), tmp_path)
    with pytest.raises(ValueError, match="carries no ETHER adapter named 'cat'; it has default"):
        save_ether(adapted_unet(), tmp_path, adapter_name="cat")


# the fingerprint of the base


def compared(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> str:
    first, second = fingerprint(one), fingerprint(other)
    assert first is not None
    assert second is not None
    assert first.compare(second) == second.compare(first)
    return first.compare(second)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("width", [32, 320, 1280])
def test_rounding_a_base_leaves_it_the_same_base(dtype: torch.dtype, width: int) -> None:
    weights = {f"layer{i}": torch.randn(width, 64) * 0.05 for i in range(16)}
    assert compared(weights, {name: weight.to(dtype) for name, weight in weights.items()}) == "same"


@pytest.mark.parametrize(
    ("dtype", "step"), [(torch.float32, 1e-5), (torch.float16, 1e-4), (torch.bfloat16, 1e-3)]
)
def test_fine_tuning_a_base_makes_other_weights(dtype: torch.dtype, step: float) -> None:
    """A hundred steps of AdamW on each entry, of one sign as often as chance has it, and its weight decay."""
    weights = {f"layer{i}": torch.randn(320, 320) * 0.05 for i in range(128)}
    tuned = {n: w * (1 - 1e-2 * 100 * step) + step * 10 * torch.randn_like(w) for n, w in weights.items()}
    assert compared(weights, {name: weight.to(dtype) for name, weight in tuned.items()}) == "other weights"


def test_another_shape_or_name_is_another_architecture() -> None:
    first = {"to_q": torch.ones(4, 6)}
    assert compared(first, {"to_k": torch.ones(4, 6)}) == "other architecture"
    assert compared(first, {"to_q": torch.ones(6, 4)}) == "other architecture"


def test_norms_are_the_frobenius_norms_of_the_weights_in_the_order_of_their_names() -> None:
    found = fingerprint({"b": torch.full((2, 2), 3.0), "a": torch.eye(4)})
    assert found is not None
    assert found.norms == (2.0, 6.0)


def test_merging_an_adapter_does_not_change_the_fingerprint_of_the_base() -> None:
    unet = adapted_unet()
    names = list(detach_adapter(unet, "default").projections())
    before = base_fingerprint(unet, names)
    unet.fuse_lora(adapter_names=["default"])
    assert base_fingerprint(unet, names) == before == base_fingerprint(small_unet(), names)


def test_other_weights_warn_and_another_architecture_is_refused_naming_both_bases(tmp_path: Path) -> None:
    save_ether(adapted_unet(), tmp_path, base_model="stable/base")
    with pytest.warns(UserWarning, match="made for stable/base .* the same architecture and other weights"):
        assert load_ether(small_unet(seed=1), tmp_path).base_match == "other weights"
    with pytest.raises(ValueError, match="other weights; load that base, or leave out require_same_base"):
        load_ether(small_unet(seed=1), tmp_path, require_same_base=True)
    assert load_ether(small_unet(), tmp_path, require_same_base=True).base_match == "same"
    other = small_unet(cross_attention_dim=64)
    other.register_to_config(_name_or_path="stable/other")
    with pytest.raises(
        ValueError, match=r"stable/base \(fingerprint \w+-\w+\), another .* than stable/other \(\w+-\w+\)"
    ):
        load_ether(other, tmp_path)


# the model card


def example(folder: Path) -> Any:
    """Run the example of an adapter's model card, and return its pipeline."""
    (code,) = re.findall(r"```python\n(.*?)```", ModelCard.load(folder / "README.md").text, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code.replace("path or Hub id of this adapter", str(folder)), names)
    return names["pipe"]


def test_the_model_card_is_one_that_the_hub_reads(tmp_path: Path) -> None:
    save_ether(adapted_unet(), tmp_path, trigger="a photo of sks dog", base_model="stable/base")
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.library_name, card.data.base_model) == ("peft", "stable/base")
    assert card.data.instance_prompt == "a photo of sks dog"
    assert {"ether", "text-to-image"} <= set(card.data.tags)
    assert "load_ether(pipe," in card.text
    assert "load_lora_weights" not in card.text
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(b"")
    save_ether(adapted_unet(), tmp_path)
    assert "pipe.load_lora_weights(" in (tmp_path / "README.md").read_text()


def test_the_model_card_of_a_language_model_speaks_of_no_pictures(tmp_path: Path) -> None:
    config = EtherConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    save_ether(get_peft_model(small_llama(), config), tmp_path, base_model="some/llama")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.pipeline_tag is None
    assert 'AutoModelForCausalLM.from_pretrained("some/llama")' in card.text


def test_the_example_of_the_model_card_runs_and_the_hub_is_not_given_a_local_path(tmp_path: Path) -> None:
    base = tmp_path / "base"
    DDPMPipeline(small_unet(), DDPMScheduler()).save_pretrained(base)
    save_ether(adapted_unet(), tmp_path / "adapter", base_model=str(base))
    assert exactly_equal(output(example(tmp_path / "adapter").unet), output(adapted_unet()))
    assert ModelCard.load(tmp_path / "adapter" / "README.md").data.base_model is None


@pytest.mark.parametrize("name", EMBEDDED)
def test_an_adapter_of_an_embedded_base_names_it_by_its_name_and_its_example_runs(
    name: str, tmp_path: Path
) -> None:
    base = open_base(name)
    pipe = base.load_pipeline()
    getattr(pipe, base.denoiser).add_adapter(EtherConfig())
    save_ether(pipe, tmp_path)
    assert read_adapter(tmp_path).metadata.base_model == name
    assert example(tmp_path).get_active_adapters() == ["default"]


def test_a_readme_that_somebody_edited_is_left_alone(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    for trigger in ("one", "two"):
        save_ether(adapted_unet(), tmp_path, trigger=trigger)
        assert trigger in readme.read_text()
    edited = readme.read_text().replace("# ETHER", "# My ETHER")
    readme.write_text(edited)
    save_ether(adapted_unet(), tmp_path, trigger="three")
    assert readme.read_text() == edited


@pytest.mark.parametrize("origin", [str, Path])
def test_a_shared_adapter_does_not_say_where_its_base_lay(
    tmp_path: Path, origin: Callable[[Path], str | Path]
) -> None:
    tiny_sd().save_pretrained(tmp_path / "home" / "my-base")
    pipe = DiffusionPipeline.from_pretrained(origin(tmp_path / "home" / "my-base"))
    pipe.unet.add_adapter(EtherConfig())
    save_ether(pipe, tmp_path / "adapter")
    assert read_adapter(tmp_path / "adapter").metadata.base_model == "my-base"
    assert str(tmp_path).encode() not in b"".join(files_in(tmp_path / "adapter").values())


@pytest.mark.parametrize("kind", ["fifo", "folder", "link to a fifo"])
def test_a_card_that_is_no_file_is_left_alone_and_never_waited_for(kind: str, tmp_path: Path) -> None:
    place = tmp_path / "adapter" / "README.md"
    place.parent.mkdir()
    if kind == "folder":
        place.mkdir()
    else:
        os.mkfifo(tmp_path / "fifo" if "link" in kind else place)
        if "link" in kind:
            place.symlink_to(tmp_path / "fifo")
    save_ether(adapted_unet(), place.parent)
    assert not place.is_file()
    assert load_ether(small_unet(), place.parent).base_match == "same"
