"""What is no whole adapter of ETHER, or none of this model, is refused in one sentence; nothing changes."""

import json
import os
import pickle
import random
import re
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Patch
from diffusers import UNet2DConditionModel as UNet
from hostile_files import (
    CONFIG,
    FIRST,
    TENSORS,
    Spoil,
    config,
    good_adapter,
    header,
    metadata,
    refusal,
    rewrite_config,
    rewrite_tensors,
    tensors,
    truncated,
    written,
)
from peft import HRAConfig, LoraConfig, OFTConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import save, save_file
from small_models import small_unet

from ether_diffusion import EtherConfig
from ether_diffusion.adapters import (
    Adapter,
    AdapterPart,
    detach_adapter,
    load_ether,
    read_adapter,
    save_ether,
    write_adapter,
)
from ether_diffusion.adapters.tensor_file import read_names, safetensors_bytes
from ether_diffusion.reflections import MIN_NORM, Vectors, units

NAME = FIRST.removeprefix("base_model.model.")
MODULE = NAME.removesuffix(".ether_input_u")


@pytest.fixture(scope="module")
def base() -> UNet:
    return small_unet()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return good_adapter(tmp_path / "adapter")


def entry(**changes: Any) -> Spoil:
    """Let the header say something else of a tensor."""
    return header(lambda h: h[FIRST].update(changes))


def shift(h: dict[str, Any]) -> None:
    h[FIRST]["data_offsets"] = [offset + 4 for offset in h[FIRST]["data_offsets"]]


def overlap(h: dict[str, Any]) -> None:
    h[FIRST]["data_offsets"] = h[min(h.keys() - {FIRST, "__metadata__"})]["data_offsets"]


def length(number: int) -> Spoil:
    """Let the file promise a header of another length."""

    def change(folder: Path) -> None:
        (folder / TENSORS).write_bytes(struct.pack("<Q", number) + (folder / TENSORS).read_bytes()[8:])

    return change


def twice(folder: Path) -> None:
    """Name a tensor of the header once more."""
    data = (folder / TENSORS).read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    again = json.dumps({FIRST: json.loads(data[8 : 8 + size])[FIRST]})[1:-1].encode()
    text = data[8 : 8 + size].rstrip()[:-1] + b"," + again + b"}"
    (folder / TENSORS).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def pipe(name: str) -> Spoil:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return change


def forge(h: dict[str, Any]) -> None:
    found = json.loads(h["__metadata__"]["ether.base_fingerprint"]) | {"architecture": "abc"}
    h["__metadata__"]["ether.base_fingerprint"] = json.dumps(found)


def without_one_under_its_header(folder: Path) -> None:
    with safe_open(folder / TENSORS, "pt") as file:
        found = file.metadata()
    rewrite_tensors(folder, lambda t: t.pop(FIRST), **found)


def of_conv(folder: Path) -> None:
    found = EtherConfig(num_blocks=1, target_modules=["conv_in"])
    write_adapter(folder, AdapterPart(found, {"conv_in.ether_input_u": torch.ones(1, 4)}))


def saved_by_peft(config: Any, *, tensors_alone: bool) -> Spoil:
    """Write PEFT's file of another method, with its configuration or under that of ETHER."""

    def change(folder: Path) -> None:
        own = (folder / CONFIG).read_bytes()
        get_peft_model(small_unet(), config).save_pretrained(folder)
        if tensors_alone:
            (folder / CONFIG).write_bytes(own)

    return change


def named(name: str) -> Spoil:
    return tensors(lambda t: t.update({name: torch.ones(4, 8)}))


def filled(value: float) -> Spoil:
    return tensors(lambda t: t[FIRST].view(-1)[-1:].fill_(value))


LORA, OFT = LoraConfig(r=8, target_modules=["to_q"]), OFTConfig(oft_block_size=8, target_modules=["to_q"])
ETHER = '{"peft_type": "ETHER", '
PRINT = '{"architecture": "a", "norms": ["1"], "rounding": 0}'
NO_ADAPTER = r"is not a safetensors adapter|not valid JSON|not those of ETHER .* \(none\)"
NOT_TOGETHER = "num_blocks=2, sides='input'; the two files do not belong together"

SPOILT: dict[str, tuple[Spoil, str]] = {
    # the configuration's text
    "config cut": (written("{", CONFIG), f"{CONFIG} is not valid JSON"),
    "config not UTF-8": (written(b'{"peft_type": "\xff"}', CONFIG), f"{CONFIG} is not valid JSON"),
    "config a list": (written("[]", CONFIG), f"{CONFIG} is not a JSON object"),
    "config NaN": (written(ETHER + '"dropout": NaN}', CONFIG), f"{CONFIG} holds NaN"),
    "config long number": (written(ETHER + '"num_blocks": ' + "9" * 5000 + "}", CONFIG), "5000 digits"),
    "config a key twice": (written(ETHER + '"num_blocks": 4, "num_blocks": 2}', CONFIG), "num_blocks twice"),
    "config deep": (written('{"peft_type": ' + "[" * 9 + "]" * 9 + "}", CONFIG), "nested too deeply"),
    "config very deep": (written("[" * 100_000, CONFIG), f"{CONFIG}.* is nested too deeply"),
    "config half a surrogate": (written(ETHER + '"revision": "\\ud800"}', CONFIG), "half of a surrogate"),
    "config no method": (written("{}", CONFIG), f"{CONFIG} is of the method None; ETHER, LoRA"),
    "config of 500 MB": (truncated(500 * 10**6, CONFIG), "has 500000000 bytes; an adapter's has at most"),
    "config a pipe": (pipe(CONFIG), "is not a regular file"),
    # what the header says beside the tensors
    "version 2": (metadata(format_version="2"), "was made by a newer release"),
    "version true": (metadata(format_version="true"), "format_version is"),
    "no version": (metadata(trigger='"dog"'), "format_version is null"),
    "metadata not JSON": (metadata(format_version="1", trigger="dog"), r"ether\.trigger"),
    "trigger a number": (metadata(format_version="1", trigger="3"), "trigger is 3"),
    "training nested": (metadata(format_version="1", training='{"a": {}}'), r"training\.a"),
    "metadata unknown": (metadata(format_version="1", new="1"), "new is not a key that is known"),
    "fingerprint bare": (metadata(format_version="1", base_fingerprint="{}"), r"base_fingerprint\."),
    "norms of text": (metadata(format_version="1", base_fingerprint=PRINT), r"base_fingerprint\."),
    "a control character": (metadata(format_version="1", **{"\x1b[2J": "1"}), r"\\x1b\[2J"),
    # a header that lies
    "offsets moved": (header(shift), TENSORS),
    "offsets beyond the file": (entry(data_offsets=[0, 2**40]), TENSORS),
    "offsets negative": (entry(data_offsets=[-128, 0]), TENSORS),
    "offsets overlapping": (header(overlap), TENSORS),
    "shape too large": (entry(shape=[2**62, 2**62]), TENSORS),
    "shape not the data's": (entry(shape=[4, 9]), TENSORS),
    "shape negative": (entry(shape=[-4, -8]), TENSORS),
    "shape empty": (entry(shape=[0, 8]), TENSORS),
    "shape flat": (entry(shape=[32]), TENSORS),
    "dtype unknown": (entry(dtype="F33"), TENSORS),
    "dtype whole numbers": (entry(dtype="I32"), TENSORS),
    "an entry too many": (entry(more=1), TENSORS),
    "no shape": (header(lambda h: h[FIRST].pop("shape")), TENSORS),
    "a tensor that is text": (header(lambda h: h.update({FIRST: "tensor"})), TENSORS),
    "metadata nested": (header(lambda h: h.update(__metadata__={"a": {"b": "c"}})), TENSORS),
    "metadata a list": (header(lambda h: h.update(__metadata__=[])), TENSORS),
    "a tensor gone": (header(lambda h: h.pop(FIRST)), TENSORS),
    "a name twice": (twice, "twice"),
    **{f"length {number}": (length(number), TENSORS) for number in (0, 1, 2**20, 2**31, 2**63, 2**64 - 1)},
    # no safetensors file, or too large a one
    **{
        f"short {data!r}": (written(data), NO_ADAPTER)
        for data in (b"", b"\0" * 4, b"\0" * 8, b"\x02\0\0\0\0\0\0\0{}", b"hello, world, I am no adapter")
    },
    "tensors a pipe": (pipe(TENSORS), "is not a regular file"),
    "a header over a MiB": (
        written(struct.pack("<Q", 2**20 + 1) + b" " * (2**20 + 1)),
        "has a header of 1048577 bytes; it may have 1048576",
    ),
    "4097 tensors": (
        written(save({f"m{i}.ether_input_u": torch.ones(1, 1) for i in range(4097)})),
        "holds 4097 tensors; an adapter has at most 4096",
    ),
    "over 64 MiB": (truncated(2**26 + 1), "has 67108865 bytes; an adapter's has at most 67108864"),
    "metadata over 64 KiB": (metadata(other="x" * 2**16), "bytes of metadata; an adapter has at most 65536"),
    # numbers without a direction
    **{f"a {x}": (filled(float(x)), f"{NAME} holds NaN or inf") for x in ("nan", "inf", "-inf")},
    "a zero vector": (tensors(lambda t: t[FIRST][2].zero_()), f"block 2 of {NAME} is zero"),
    # another model's, or not whole
    "a forged fingerprint": (header(forge), r"made for stable/base \(fingerprint abc-"),
    "a layer missing": (tensors(lambda t: t.pop(FIRST)), f"lacks projections that .*{MODULE}"),
    "a layer of the header missing": (without_one_under_its_header, "holds 31 .* its header speaks of 32"),
    "a layer too many": (
        named("base_model.model.up_blocks.9.to_q.ether_input_u"),
        r"1 of its 33 projections are not in this UNet2DConditionModel \(up_blocks\.9\.to_q\)",
    ),
    "another variant": (config(variant="ether_plus", sides="input"), "lacks .*ether_input_v and "),
    "a vector too many": (named(FIRST.replace("input", "output")), "not those of ETHER with .*sides='input'"),
    "another number of blocks": (config(num_blocks=2), f"{MODULE}.*{NOT_TOGETHER}"),
    "a pattern of blocks": (config(num_blocks_pattern={"attn1.to_k": 2}), "files do not belong together"),
    "a wrong length": (
        tensors(lambda t: t.update({FIRST: torch.ones(4, 9)})),
        "attn1.to_k: input width 32 here and 36 in the adapter",
    ),
    "a convolution": (of_conv, r"conv_in is a torch.*Conv2d; what is adapted is torch\.nn\.Linear"),
    # another method's
    "a LoRA": (saved_by_peft(LORA, tensors_alone=False), r"LORA, not ETHER; use pipe\.load_lora_weights"),
    "a LoRA's tensors": (saved_by_peft(LORA, tensors_alone=True), "ETHER adapter: this is a LoRA; use pipe"),
    "an OFT": (saved_by_peft(OFT, tensors_alone=False), r"of the method OFT, not ETHER; use peft\.PeftModel"),
    "an OFT's tensors": (saved_by_peft(OFT, tensors_alone=True), r"is an OFT adapter; use peft\.PeftModel"),
}  # fmt: skip


@pytest.mark.parametrize("case", SPOILT)
def test_a_spoilt_adapter_is_refused(case: str, base: UNet, folder: Path) -> None:
    spoil, words = SPOILT[case]
    spoil(folder)
    assert re.search(words, refusal(base, folder))


BAD_FIELDS: dict[str, list[Any]] = {
    "num_blocks": [-1, 0, 10**9, "4", 4.0, True, None],
    "dropout": ["0", 1.5, -0.1],
    "variant": ["ether_minus", 1],
    "sides": ["left", ["input"]],
    "init_weights": [1],
    "inference_mode": ["yes"],
    "target_modules": [{"to_q": 1}, [1]],
    "exclude_modules": [[["to_q"]]],
    "num_blocks_pattern": [{"to_q": "4"}, {"to_q": 10**9}, ["to_q"]],
    "layers_to_transform": ["0"],
    "layers_pattern": [3],
    "modules_to_save": ["conv_out", ["conv_out"]],
    "task_type": ["NO_SUCH_TASK"],
    "auto_mapping": [{"a": ["b"]}],
    "revision": [3],
    "lora_alpha": [8],
    "trust_remote_code": [True],
    "\x1b[2J": [1],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in BAD_FIELDS.items() for value in values], ids=ascii
)
def test_a_field_outside_the_schema_is_refused_by_name(
    name: str, value: object, base: UNet, folder: Path
) -> None:
    rewrite_config(folder, **{name: value})
    message = refusal(base, folder)
    assert name.encode("unicode_escape").decode() in message or "task type" in message


STRANGE = ("../../x", "a\x1b[2Jb", "a\u202eb", "a\nb", "a\0b", "a..b", "x" * 500)
NAMES = ("conv_out.weight", "ether_input_u", "lin.ether_input_u.default")


@pytest.mark.parametrize("name", [*(f"{name}.ether_input_u" for name in STRANGE), *NAMES], ids=ascii)
def test_a_strange_name_is_refused_and_printed_escaped(name: str, base: UNet, folder: Path) -> None:
    named(f"base_model.model.{name}")(folder)
    assert "holds tensors that are not those of ETHER" in refusal(base, folder)


def test_every_one_of_400_random_changes_is_refused_in_a_sentence_or_harmless(folder: Path) -> None:
    """Bytes changed, cut, inserted and repeated; what still reads must be a whole adapter."""
    original = (folder / TENSORS).read_bytes()
    (size,) = struct.unpack("<Q", original[:8])
    chance, refused = random.Random(0), 0
    for _ in range(400):
        data = bytearray(original)
        place = chance.randrange(8 + size) if chance.random() < 0.8 else chance.randrange(len(data))
        span = chance.randrange(1, 64)
        match chance.randrange(5):
            case 0:
                data[place] ^= 1 << chance.randrange(8)
            case 1:
                del data[place:]
            case 2:
                del data[place : place + span]
            case 3:
                data[place:place] = chance.randbytes(span)
            case _:
                data[place : place + span] = data[chance.randrange(size) :][:span]
        (folder / TENSORS).write_bytes(data)
        read = read_or_refusal(folder)
        if isinstance(read, Adapter):
            assert len(read.tensors) == 32
            assert all(torch.isfinite(tensor).all() for tensor in read.tensors.values())
        else:
            assert type(read) is ValueError
            assert str(read).isprintable()
            refused += 1
    assert refused > 200


def read_or_refusal(folder: Path) -> Adapter | ValueError:
    try:
        return read_adapter(folder)
    except ValueError as error:
        return error


# what is there at all


def test_what_is_not_there_is_named(base: UNet, folder: Path) -> None:
    nowhere = folder.parent / "nowhere"
    assert f"there is no folder {nowhere}" in refusal(base, nowhere, FileNotFoundError)
    assert "is a file; give the folder" in refusal(base, folder / TENSORS)
    for name in (TENSORS, CONFIG):
        (folder / name).unlink()
        assert f"has no {name}" in refusal(base, folder, FileNotFoundError)


@pytest.mark.parametrize("name", ["", "a\0b", "x" * 5000, "a/b/c", "https://example.com/x.safetensors"])
def test_what_can_be_neither_a_folder_nor_a_hub_id_is_refused_without_asking_the_hub(
    name: str, base: UNet, folder: Path, monkeypatch: Patch
) -> None:
    monkeypatch.chdir(folder)  # which an empty name does not mean
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("asked the network"))
    assert ("give" if name else "an empty name") in refusal(base, name, FileNotFoundError)


class Canary:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("length", [0x280, 0x480])
def test_a_header_as_long_as_a_pickle_begins_is_read(length: int, tmp_path: Path) -> None:
    tensors = {"x": torch.zeros(1)}
    (empty,) = struct.unpack("<Q", safetensors_bytes(tensors, {"pad": ""})[:8])
    data = safetensors_bytes(tensors, {"pad": " " * (length - empty)})
    assert struct.unpack("<Q", data[:8]) == (length,)
    (tmp_path / "x.safetensors").write_bytes(data)
    assert set(read_names(tmp_path / "x.safetensors")) == {"x", "__metadata__"}


@pytest.mark.parametrize("writer", ["pickle", "torch", "beside"])
def test_a_pickle_is_named_and_never_unpickled(writer: str, base: UNet, folder: Path, tmp_path: Path) -> None:
    canary = Canary(tmp_path / "canary")
    if writer == "torch":
        torch.save(canary, folder / TENSORS)
    elif writer == "pickle":
        (folder / TENSORS).write_bytes(pickle.dumps(canary))
    else:
        (folder / TENSORS).unlink()
        (folder / "adapter_model.bin").write_bytes(pickle.dumps(canary))
    needed = "adapter_model.bin is a pickle" if writer == "beside" else "it is a pickle or a zip file"
    assert needed in refusal(base, folder)
    assert not canary.path.exists()


def test_loras_of_diffusers_and_of_kohya_are_named(base: UNet, tmp_path: Path) -> None:
    unet = small_unet()
    unet.add_adapter(LoraConfig(r=4, target_modules=["to_q"]))
    unet.save_lora_adapter(tmp_path / "diffusers")
    assert "this is a LoRA; use pipe.load_lora_weights" in refusal(base, tmp_path / "diffusers")
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    (tmp_path / "kohya").mkdir()
    found = {
        f"{name}.lora_down.weight": torch.ones(16, 32),
        f"{name}.lora_up.weight": torch.ones(32, 16),
        f"{name}.alpha": torch.tensor(1.0),
    }
    save_file(found, tmp_path / "kohya" / "my.safetensors")
    for place in (tmp_path / "kohya", tmp_path / "kohya" / "my.safetensors"):
        assert "this is a LoRA; use pipe.load_lora_weights" in refusal(base, place)


# what is strange and harmless


def test_an_unknown_field_without_content_is_ignored_with_a_warning(folder: Path) -> None:
    rewrite_config(folder, of_a_later_peft=None)
    with pytest.warns(UserWarning, match="unknown entries of_a_later_peft; they are empty"):
        load_ether(small_unet(), folder)


@pytest.mark.parametrize("targets", [None, [], "", "all-linear", ["to_q"], ["no_such_module", "to_k"]])
def test_the_tensors_say_what_is_adapted_whatever_the_file_targets(targets: object, folder: Path) -> None:
    rewrite_config(folder, target_modules=targets)
    assert load_ether(small_unet(), folder).num_projections == 32


def test_a_regex_that_would_never_end_is_never_evaluated(folder: Path) -> None:
    endless = r"(([a-z0-9_.]+)+)+!"
    rewrite_config(folder, num_blocks_pattern={endless: 8}, target_modules=endless, exclude_modules=endless)
    assert load_ether(small_unet(), folder).num_projections == 32


def test_classes_paths_and_urls_of_a_configuration_are_neither_imported_nor_fetched(
    folder: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    (tmp_path / "evil_module.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("asked the network"))
    rewrite_config(
        folder,
        auto_mapping={"base_model_class": "Evil", "parent_library": "evil_module"},
        base_model_name_or_path="https://example.com/evil",
        revision="refs/../../evil",
    )
    unet = small_unet()
    load_ether(unet, folder)
    save_ether(unet, tmp_path / "again")
    assert "evil_module" not in sys.modules
    assert not (tmp_path / "canary").exists()
    own = {"base_model_class": "UNet2DConditionModel", "parent_library": type(unet).__module__}
    assert detach_adapter(unet, "default").config.auto_mapping == own


@pytest.mark.parametrize("factor", [1e38, 1e-38, 1e-44])
def test_huge_and_tiny_vectors_keep_their_direction(factor: float, folder: Path) -> None:
    """In float32 the squares of the first overflow, and the norms of the others are below MIN_NORM."""
    raw = torch.tensor([[1.0, 2.0], [-1.0, 3.0]]) * factor
    unit = units(Vectors(raw, None)).u
    assert raw.double().norm(dim=1).min() < MIN_NORM or unit.norm() == 0
    part = AdapterPart(EtherConfig(num_blocks=2, target_modules=["lin"]), {"lin.ether_input_u": raw})
    write_adapter(folder / "large", part)
    found = units(Vectors(read_adapter(folder / "large").tensors["lin.ether_input_u"], None)).u
    wide = raw.double()
    torch.testing.assert_close(found, (wide / wide.norm(dim=1, keepdim=True)).float())


# models that cannot take it


def test_a_model_that_cannot_take_it_is_refused_with_the_reason(base: UNet, folder: Path) -> None:
    for name in ("", "a.b", "to_q", "0", "x\n", "n" * 101):
        assert "adapter_name=" in refusal(base, folder, adapter_name=name)
    unet = small_unet()
    unet.add_adapter(HRAConfig(r=2, target_modules=["attn1.to_q"]), adapter_name="hra")
    assert "attn1.to_q carries a HRALinear, which reads its weight past ETHER" in refusal(unet, folder)
    unet = small_unet()
    load_ether(unet, folder)
    assert "already has an adapter named 'default'" in refusal(unet, folder)
    unet.fuse_lora(adapter_names=["default"])
    assert "default is merged into" in refusal(unet, folder, adapter_name="second")
    with torch.device("meta"):
        unet = small_unet()
    with pytest.raises(ValueError, match="has no weights here"):
        load_ether(unet, folder)


def test_a_file_that_does_not_know_its_base_is_checked_by_shape(base: UNet, folder: Path) -> None:
    rewrite_tensors(folder, lambda tensors: None)
    message = refusal(small_unet(cross_attention_dim=64), folder)
    assert "another architecture than this UNet2DConditionModel" in message
    assert "attn2.to_k: input width 64 here and 32 in the adapter" in message
    assert "carries no fingerprint of its base" in refusal(base, folder, require_same_base=True)
