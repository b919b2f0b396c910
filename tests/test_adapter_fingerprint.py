"""A base is told from another by its fingerprint, and from a rounded copy of itself it is not."""

from pathlib import Path

import pytest
import torch
from small_models import adapted_unet, small_unet

from ether_diffusion.adapters import base_fingerprint, detach_adapter, fingerprint, load_ether, save_ether


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
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
