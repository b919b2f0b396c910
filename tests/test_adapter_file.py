"""Adapters survive the way to disk and back, and interrupted writing leaves no half of one."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from small_models import adapted_unet, exactly_equal, small_unet

from ether_diffusion import EtherConfig
from ether_diffusion.adapters import (
    AdapterMetadata,
    AdapterPart,
    BaseFingerprint,
    detach_adapter,
    read_adapter,
    save_ether,
    write_adapter,
)
from ether_diffusion.adapters.format import metadata_header, parse_metadata

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
        shuffled = AdapterPart(adapter.config, {n: adapter.tensors[n] for n in names}, adapter.metadata)
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
