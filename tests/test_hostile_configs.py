"""Configurations and metadata outside their schema (51 and 52) are refused in one sentence."""

import sys
from pathlib import Path
from typing import Any

import pytest
from diffusers import UNet2DConditionModel
from hostile_files import CONFIG, good_adapter, refusal, rewrite_config, rewrite_tensors
from small_models import small_unet

from ether_diffusion.adapters import detach_adapter, load_ether, save_ether


@pytest.fixture(scope="module")
def base() -> UNet2DConditionModel:
    return small_unet()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return good_adapter(tmp_path / "adapter")


# 51


BAD_CONFIGS: dict[str, tuple[str | bytes, str]] = {
    "not JSON": ("{", "is not valid JSON"),
    "empty": ("", "is not valid JSON"),
    "not UTF-8": (b'{"peft_type": "\xff"}', "is not valid JSON"),
    "a list": ("[]", "is not a JSON object"),
    "null": ("null", "is not a JSON object"),
    "NaN": ('{"peft_type": "ETHER", "dropout": NaN}', "holds NaN"),
    "infinite": ('{"peft_type": "ETHER", "dropout": -Infinity}', "holds -Infinity"),
    "1e999": ('{"peft_type": "ETHER", "dropout": 1e999}', "holds 1e999, which is out of range"),
    "5000 digits": ('{"peft_type": "ETHER", "num_blocks": ' + "9" * 5000 + "}", "a number of 5000 digits"),
    "a key twice": ('{"peft_type": "ETHER", "num_blocks": 4, "num_blocks": 2}', "the key num_blocks twice"),
    "deep": ('{"peft_type": ' + "[" * 9 + "]" * 9 + "}", "is nested too deeply"),
    "very deep": ("[" * 100_000, "is nested too deeply"),
    "half a surrogate": ('{"peft_type": "ETHER", "revision": "\\ud800"}', "half of a surrogate pair"),
    "no method": ("{}", 'does not say "peft_type": "ETHER"'),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_malformed_json_is_refused(case: str, base: UNet2DConditionModel, folder: Path) -> None:
    text, needed = BAD_CONFIGS[case]
    (folder / CONFIG).write_bytes(text if isinstance(text, bytes) else text.encode())
    message = refusal(base, folder)
    assert needed in message
    assert CONFIG in message


BAD_FIELDS: list[dict[str, Any]] = [
    {"num_blocks": -1},
    {"num_blocks": 0},
    {"num_blocks": 10**9},
    {"num_blocks": "4"},
    {"num_blocks": 4.0},
    {"num_blocks": True},
    {"num_blocks": None},
    {"dropout": "0"},
    {"dropout": 1.5},
    {"dropout": -0.1},
    {"variant": "ether_minus"},
    {"variant": 1},
    {"sides": "left"},
    {"sides": ["input"]},
    {"init_weights": 1},
    {"inference_mode": "yes"},
    {"target_modules": {"to_q": 1}},
    {"target_modules": [1]},
    {"exclude_modules": [["to_q"]]},
    {"num_blocks_pattern": {"to_q": "4"}},
    {"num_blocks_pattern": {"to_q": 10**9}},
    {"num_blocks_pattern": ["to_q"]},
    {"layers_to_transform": "0"},
    {"layers_pattern": 3},
    {"modules_to_save": "conv_out"},
    {"modules_to_save": ["conv_out"]},
    {"task_type": "NO_SUCH_TASK"},
    {"auto_mapping": {"a": ["b"]}},
    {"revision": 3},
    {"lora_alpha": 8},
    {"trust_remote_code": True},
    {"\x1b[2J": 1},
]


@pytest.mark.parametrize("changes", BAD_FIELDS, ids=ascii)
def test_a_field_outside_the_schema_is_refused_by_name(
    changes: dict[str, Any], base: UNet2DConditionModel, folder: Path
) -> None:
    rewrite_config(folder, **changes)
    message = refusal(base, folder)
    (name,) = changes
    assert name.encode("unicode_escape").decode() in message or "task type" in message


def test_an_unknown_field_without_content_is_ignored_with_a_warning(folder: Path) -> None:
    rewrite_config(folder, of_a_later_peft=None)
    with pytest.warns(UserWarning, match="unknown entries of_a_later_peft; they are empty"):
        load_ether(small_unet(), folder)


@pytest.mark.parametrize("targets", [None, [], "", "all-linear", ["to_q"], ["no_such_module", "to_k"]])
def test_the_tensors_say_what_is_adapted_whatever_the_configuration_targets(
    targets: object, folder: Path
) -> None:
    rewrite_config(folder, target_modules=targets)
    assert load_ether(small_unet(), folder).num_projections == 32


def test_a_configuration_of_500_megabytes_is_refused_before_it_is_read(
    base: UNet2DConditionModel, folder: Path
) -> None:
    with (folder / CONFIG).open("r+b") as file:
        file.truncate(500 * 10**6)
    with pytest.raises(ValueError, match="has 500000000 bytes; an adapter's has at most 1048576"):
        load_ether(base, folder)


BAD_METADATA = {
    "version 2": ({"ether.format_version": "2"}, "was made by a newer release"),
    "version of text": ({"ether.format_version": '"1"'}, "format_version is"),
    "version true": ({"ether.format_version": "true"}, "format_version is"),
    "no version": ({"ether.trigger": '"dog"'}, "format_version is null"),
    "not JSON": ({"ether.format_version": "1", "ether.trigger": "dog"}, "ether.trigger"),
    "trigger a number": ({"ether.format_version": "1", "ether.trigger": "3"}, "trigger is 3"),
    "training nested": ({"ether.format_version": "1", "ether.training": '{"a": {}}'}, "training.a"),
    "unknown": ({"ether.format_version": "1", "ether.new": "1"}, "new is not a key that is known"),
    "fingerprint bare": (
        {"ether.format_version": "1", "ether.base_fingerprint": "{}"},
        "base_fingerprint.",
    ),
    "norms of text": (
        {
            "ether.format_version": "1",
            "ether.base_fingerprint": '{"architecture": "a", "norms": ["1"], "rounding": 0}',
        },
        "base_fingerprint.",
    ),
    "a control character": ({"ether.format_version": "1", "ether.\x1b[2J": "1"}, r"\x1b[2J"),
}


@pytest.mark.parametrize("case", BAD_METADATA)
def test_malformed_metadata_is_refused(case: str, base: UNet2DConditionModel, folder: Path) -> None:
    metadata, needed = BAD_METADATA[case]
    rewrite_tensors(folder, lambda tensors: None, **metadata)
    assert needed in refusal(base, folder)


# 52


def test_classes_paths_and_urls_of_a_configuration_are_neither_imported_nor_fetched(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    assert detach_adapter(unet, "default").config.auto_mapping is None
