"""The factors against the paper's dense matrices, in float64."""

import math
from typing import Any

import pytest
import torch
from oracles import dense_blocks, dense_weight, hyperspherical_energy
from peft import HRAConfig, get_peft_model
from torch import Tensor, nn
from torch.testing import assert_close

from ether_diffusion import reflections
from ether_diffusion.reflections import Vectors

WIDTH, HEIGHT = 24, 40
BLOCKS = [1, 2, 4, 8]
ROUNDING = 1e-12


def vectors(width: int, num_blocks: int, *, plus: bool, dtype: torch.dtype = torch.float64) -> Vectors:
    u = torch.randn(num_blocks, width // num_blocks, dtype=dtype)
    return Vectors(u, torch.randn_like(u) if plus else None)


def identity_rows(side: Vectors, width: int) -> Tensor:
    """H itself, read off the factored form by transforming the identity."""
    (rows,) = reflections.rows([side], torch.float64)
    down, up = reflections.factors(torch.eye(width, dtype=torch.float64), rows, None)
    return torch.eye(width, dtype=torch.float64) + up @ down


@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("num_blocks", BLOCKS)
@pytest.mark.parametrize("sides", ["input", "output", "both"])
def test_factors_give_the_papers_weight(plus: bool, num_blocks: int, sides: str) -> None:
    weight = torch.randn(HEIGHT, WIDTH, dtype=torch.float64)
    input_side = vectors(WIDTH, num_blocks, plus=plus) if sides != "output" else None
    output_side = vectors(HEIGHT, num_blocks, plus=plus) if sides != "input" else None
    first, second = (
        None if side is None else reflections.rows([side], torch.float64)[0]
        for side in (input_side, output_side)
    )
    down, up = reflections.factors(weight, first, second)
    assert_close(weight + up @ down, dense_weight(weight, input_side, output_side), atol=ROUNDING, rtol=0)
    rank_per_side = 2 * num_blocks if plus else num_blocks
    assert down.shape == (rank_per_side * (2 if sides == "both" else 1), WIDTH)


@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("num_blocks", BLOCKS)
def test_reflect_is_a_product_with_the_papers_matrix(plus: bool, num_blocks: int) -> None:
    side, x = vectors(WIDTH, num_blocks, plus=plus), torch.randn(3, 5, WIDTH, dtype=torch.float64)
    reflected = reflections.reflect(x, reflections.units(side))
    assert_close(reflected, x @ dense_blocks(side), atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("num_blocks", BLOCKS)
def test_reflecting_twice_is_the_identity(num_blocks: int) -> None:
    side, x = (
        reflections.units(vectors(WIDTH, num_blocks, plus=False)),
        torch.randn(7, WIDTH, dtype=torch.float64),
    )
    assert_close(reflections.reflect(reflections.reflect(x, side), side), x, atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("num_blocks", BLOCKS)
def test_a_reflection_keeps_norms(num_blocks: int) -> None:
    side, x = (
        reflections.units(vectors(WIDTH, num_blocks, plus=False)),
        torch.randn(7, WIDTH, dtype=torch.float64),
    )
    assert_close(reflections.reflect(x, side).norm(dim=1), x.norm(dim=1), atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("num_blocks", BLOCKS)
def test_ether_stands_at_distance_two_root_n_from_the_identity(num_blocks: int) -> None:
    h = identity_rows(vectors(WIDTH, num_blocks, plus=False), WIDTH)
    distance = torch.linalg.matrix_norm(h - torch.eye(WIDTH, dtype=h.dtype)).item()
    assert distance == pytest.approx(2 * math.sqrt(num_blocks), abs=ROUNDING)


@pytest.mark.parametrize("num_blocks", BLOCKS)
def test_ether_plus_stays_within_root_two_n_of_the_identity(num_blocks: int) -> None:
    h = identity_rows(vectors(WIDTH, num_blocks, plus=True), WIDTH)
    distance = torch.linalg.matrix_norm(h - torch.eye(WIDTH, dtype=h.dtype)).item()
    assert 0 < distance <= math.sqrt(2 * num_blocks) + ROUNDING


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_ether_plus_with_parallel_vectors_is_the_identity_bit_for_bit(sign: float) -> None:
    u = torch.randn(4, WIDTH // 4)
    (rows,) = reflections.rows([Vectors(u, sign * u)], torch.float32)
    down, up = reflections.factors(
        torch.randn(HEIGHT, WIDTH), rows, rows._replace(stack=torch.zeros(12, HEIGHT))
    )
    assert torch.count_nonzero(up @ down) == 0


def test_the_order_of_v_and_its_sign_do_not_matter_to_ether_plus() -> None:
    side = vectors(WIDTH, 4, plus=True)
    assert side.v is not None
    turned = Vectors(side.u, -3.0 * side.v)
    assert_close(identity_rows(side, WIDTH), identity_rows(turned, WIDTH), atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("num_blocks", BLOCKS)
def test_input_side_ether_keeps_the_hyperspherical_energy(num_blocks: int) -> None:
    weight = torch.randn(HEIGHT, WIDTH, dtype=torch.float64)
    turned = dense_weight(weight, vectors(WIDTH, num_blocks, plus=False), None)
    (rows,) = reflections.rows([side := vectors(WIDTH, num_blocks, plus=False)], torch.float64)
    down, up = reflections.factors(weight, rows, None)
    assert side.v is None
    energy = hyperspherical_energy(weight)
    assert_close(hyperspherical_energy(weight + up @ down), energy, rtol=1e-12, atol=0)
    assert_close(hyperspherical_energy(turned), energy, rtol=1e-12, atol=0)


def test_output_side_ether_changes_the_hyperspherical_energy() -> None:
    weight = torch.randn(HEIGHT, WIDTH, dtype=torch.float64)
    (rows,) = reflections.rows([vectors(HEIGHT, 4, plus=False)], torch.float64)
    down, up = reflections.factors(weight, None, rows)
    assert (hyperspherical_energy(weight + up @ down) / hyperspherical_energy(weight) - 1).abs() > 1e-6


def test_one_block_on_the_input_side_is_pefts_hra_of_rank_one() -> None:
    projection = nn.Linear(WIDTH, HEIGHT, dtype=torch.float64)
    weight = projection.weight.detach().clone()
    model: Any = nn.Sequential(projection)
    with pytest.warns(UserWarning, match="symmetric initialization"):
        hra: Any = get_peft_model(model, HRAConfig(r=1, target_modules=["0"]), autocast_adapter_dtype=False)
    u = hra.base_model.model[0].hra_u["default"].detach()  # (WIDTH, 1)
    (rows,) = reflections.rows([Vectors(u.t(), None)], torch.float64)
    down, up = reflections.factors(weight, rows, None)
    merged = hra.merge_and_unload()[0].weight.detach()
    assert_close(weight + up @ down, merged, atol=1e-7, rtol=0)  # PEFT makes u / |u| in float32


def official_output_side(weight: Tensor, raw: Tensor) -> Tensor:
    """The map of the authors' language-model code on its transposed side: one H per block of output rows."""
    num_blocks, size = raw.shape
    h = torch.stack([torch.eye(size, dtype=raw.dtype) - 2 * torch.outer(r, r) / (r @ r) for r in raw])
    return torch.einsum("rnm,rmd->rnd", h, weight.reshape(num_blocks, size, -1)).reshape(weight.shape)


@pytest.mark.parametrize("num_blocks", BLOCKS)
def test_the_output_side_is_the_official_codes_map(num_blocks: int) -> None:
    weight, side = torch.randn(HEIGHT, WIDTH, dtype=torch.float64), vectors(HEIGHT, num_blocks, plus=False)
    (rows,) = reflections.rows([side], torch.float64)
    down, up = reflections.factors(weight, None, rows)
    assert_close(weight + up @ down, official_output_side(weight, side.u), atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("magnitude", [1e-30, 1e-20, 1e-6, 1.0, 1e6, 1e18])
def test_directions_survive_any_magnitude_in_float32(magnitude: float) -> None:
    u = torch.randn(4, 6)
    unit = reflections.units(Vectors(u * magnitude, None)).u
    if magnitude >= 1e-11:  # below MIN_NORM the vector shrinks to nothing instead of blowing up
        assert_close(unit, u / u.norm(dim=1, keepdim=True))
    assert torch.isfinite(unit).all()


@pytest.mark.parametrize("plus", [False, True])
def test_a_zero_vector_gives_finite_outputs_and_gradients(plus: bool) -> None:
    u = torch.zeros(2, 4, requires_grad=True)
    v = torch.zeros(2, 4, requires_grad=True) if plus else None
    (rows,) = reflections.rows([Vectors(u, v)], torch.float32)
    down, up = reflections.factors(torch.randn(5, 8), rows, None)
    (up @ down).sum().backward()
    assert u.grad is not None
    assert torch.isfinite(up @ down).all()
    assert torch.isfinite(u.grad).all()


def test_rows_made_together_equal_rows_made_alone() -> None:
    sides = [vectors(w, n, plus=p) for w in (24, 40) for n in (1, 4) for p in (False, True)] * 2
    together = reflections.rows(sides, torch.float64)
    for side, rows in zip(sides, together, strict=True):
        assert torch.equal(rows.stack, reflections.rows([side], torch.float64)[0].stack)


def test_a_scale_of_zero_merges_to_the_weight_bit_for_bit() -> None:
    weight = torch.randn(5, 8).bfloat16()
    weight[0, 0] = -0.0
    merged = reflections.merged_weight(weight, [(torch.randn(2, 8), torch.randn(5, 2), 0.0)])
    assert torch.equal(merged.view(torch.int16), weight.view(torch.int16))
