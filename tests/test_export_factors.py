"""LoRA factors and their keys: the dense update at the promised rank, under the names that others read."""

import pytest
import torch
from real_configs import meta_unet
from trained_adapters import dense_update, relative_error, train

from ether_diffusion import EtherConfig
from ether_diffusion.export import LoraFactors, kohya_keys, lora_factors, lora_tensors, stored_factors
from ether_diffusion.reflections import Vectors

# The block names that diffusers, A1111, ComfyUI and InvokeAI read, and the transformer blocks in each.
SD15_BLOCKS = {
    **{f"down_blocks_{i}_attentions_{j}": 1 for i in (0, 1, 2) for j in (0, 1)},
    "mid_block_attentions_0": 1,
    **{f"up_blocks_{i}_attentions_{j}": 1 for i in (1, 2, 3) for j in (0, 1, 2)},
}
SDXL_BLOCKS = {
    **{f"down_blocks_{i}_attentions_{j}": depth for i, depth in ((1, 2), (2, 10)) for j in (0, 1)},
    "mid_block_attentions_0": 10,
    **{f"up_blocks_{i}_attentions_{j}": depth for i, depth in ((0, 10), (1, 2)) for j in (0, 1, 2)},
}


def table_of_keys(blocks: dict[str, int]) -> set[str]:
    return {
        f"lora_unet_{block}_transformer_blocks_{t}_{attention}_{projection}.{part}"
        for block, depth in blocks.items()
        for t in range(depth)
        for attention in ("attn1", "attn2")
        for projection in ("to_q", "to_k", "to_v", "to_out_0")
        for part in ("lora_down.weight", "lora_up.weight", "alpha")
    }


@pytest.mark.parametrize(
    ("name", "blocks", "count"),
    [("sd15", SD15_BLOCKS, 128), ("sd21", SD15_BLOCKS, 128), ("sdxl", SDXL_BLOCKS, 560)],
)
def test_the_keys_of_a_real_unet_are_the_tables(name: str, blocks: dict[str, int], count: int) -> None:
    unet = meta_unet(name)
    train(unet, EtherConfig())
    layers = {n: m for n, m in unet.named_modules() if hasattr(m, "ether_input_u")}
    found = kohya_keys([("unet", n) for n in layers], has_two_text_encoders=False)
    assert found is not None
    keys = {n: key for (_, n), key in found.items()}
    factors = {
        keys[n]: stored_factors(lora_factors(m.base_linear.weight, *m.vectors("default")), torch.float16)
        for n, m in layers.items()
    }
    tensors, rank = lora_tensors(factors)
    assert set(tensors) == table_of_keys(blocks)
    assert len(layers) == count
    assert rank == 4
    for n, m in layers.items():
        assert tensors[f"{keys[n]}.lora_down.weight"].shape == (4, m.in_features)
        assert tensors[f"{keys[n]}.lora_up.weight"].shape == (m.out_features, 4)
        assert tensors[f"{keys[n]}.alpha"].item() == 4


@pytest.mark.parametrize(
    ("module", "two", "key"),
    [
        ("encoder.layers.3.self_attn.q_proj", False, "lora_te_text_model_encoder_layers_3_self_attn_q_proj"),
        ("text_model.encoder.layers.0.mlp.fc1", True, "lora_te1_text_model_encoder_layers_0_mlp_fc1"),
    ],
)
def test_text_encoder_keys_say_text_model_and_number_sdxls(module: str, two: bool, key: str) -> None:
    place = "text_encoder", module
    assert kohya_keys([place], has_two_text_encoders=two) == {place: key}


def side(width: int, num_blocks: int, *, distance: float | None) -> Vectors:
    """Vectors of ETHER (None) or of ETHER+ with v about `distance` from -u, relative to its norm."""
    u = torch.randn(num_blocks, width // num_blocks) * 0.1
    if distance is None:
        return Vectors(u, None)
    direction = torch.randn_like(u) / u.shape[1] ** 0.5
    return Vectors(u, -u + distance * u.norm(dim=1, keepdim=True) * direction)


def both_sides(
    where: str, *, num_blocks: int, distance: float | None
) -> tuple[Vectors | None, Vectors | None]:
    first = side(96, num_blocks, distance=distance) if where != "output" else None
    second = side(64, num_blocks, distance=distance) if where != "input" else None
    return first, second


SIDES_AND_DISTANCES = [(w, d) for w in ("input", "output", "both") for d in (None, 1.0, 1e-1, 1e-3, 1e-6)]


@pytest.mark.parametrize(("where", "distance"), SIDES_AND_DISTANCES)
def test_the_factors_are_the_dense_update_at_the_promised_rank(where: str, distance: float | None) -> None:
    weight = torch.randn(64, 96) / 96**0.5
    sides = both_sides(where, num_blocks=4, distance=distance)
    down, up = lora_factors(weight, *sides)
    assert down.dtype == up.dtype == torch.float64
    torch.testing.assert_close(up @ down, dense_update(weight, sides), rtol=0, atol=1e-14)
    assert len(down) == 4 * (1 if distance is None else 2) * (2 if where == "both" else 1)


@pytest.mark.parametrize(("where", "distance"), SIDES_AND_DISTANCES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1e-3), (torch.float32, 3e-7)])
def test_rounding_keeps_the_update_however_close_to_the_identity(
    where: str, distance: float | None, dtype: torch.dtype, tolerance: float
) -> None:
    for num_blocks in (1, 4, 16):
        weight = torch.randn(64, 96) / 96**0.5
        sides = both_sides(where, num_blocks=num_blocks, distance=distance)
        down, up = stored_factors(lora_factors(weight, *sides), dtype)
        assert relative_error(up.double() @ down.double(), dense_update(weight, sides)) < tolerance


def test_an_adapter_at_the_identity_exports_zeros() -> None:
    u = torch.randn(4, 24)
    down, up = stored_factors(lora_factors(torch.randn(64, 96), Vectors(u, -u), None), torch.float16)
    assert torch.equal(up @ down, torch.zeros(64, 96, dtype=torch.float16))


def test_the_rank_is_at_most_the_input_width() -> None:
    weight = torch.randn(16, 8)
    u, v = torch.randn(8, 1), torch.randn(8, 1)
    sides = (Vectors(u, v), Vectors(torch.randn(8, 2), torch.randn(8, 2)))
    down, up = lora_factors(weight, *sides)
    assert len(down) == 8
    torch.testing.assert_close(up @ down, dense_update(weight, sides), rtol=0, atol=1e-13)


def test_an_update_too_large_for_float16_is_refused() -> None:
    with pytest.raises(ValueError, match="export in float32"):
        stored_factors(LoraFactors(torch.full((1, 2), 1e6), torch.full((2, 1), 1e6)), torch.float16)
