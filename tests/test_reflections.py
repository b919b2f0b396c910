"""Factors and the fast Linear against the paper's dense matrices, autograd, PEFT and the authors' code."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import dense_blocks, dense_weight, in_float64
from peft import HRAConfig, get_peft_model
from torch import Tensor, nn
from torch.testing import assert_close

from ether_diffusion import reflections
from ether_diffusion.fast_linear import reflected_linear
from ether_diffusion.reflections import Rows, Vectors

WIDTH, HEIGHT = 24, 40
FEW, MANY = 3, 80
"""Numbers of tokens below and above where reflecting the weight becomes the faster way."""
ROUNDING = 1e-12

all_maps = pytest.mark.parametrize(
    ("plus", "sides", "num_blocks"),
    list(itertools.product([False, True], ["input", "output", "both"], [1, 2, 4, 8])),
)


def vectors(width: int, num_blocks: int, plus: bool, dtype: torch.dtype = torch.float64) -> Vectors:
    u = torch.randn(num_blocks, width // num_blocks, dtype=dtype).requires_grad_()
    return Vectors(u, torch.randn_like(u).requires_grad_() if plus else None)


def both_sides(plus: bool, sides: str, num_blocks: int) -> tuple[Vectors | None, Vectors | None]:
    return (
        vectors(WIDTH, num_blocks, plus) if sides != "output" else None,
        vectors(HEIGHT, num_blocks, plus) if sides != "input" else None,
    )


def rows(side: Vectors | None, dtype: torch.dtype = torch.float64) -> Rows | None:
    return None if side is None else reflections.rows([side], dtype)[0]


def leaves(*sides: Vectors | None) -> list[Tensor]:
    return [vector for side in sides if side is not None for vector in side if vector is not None]


def same_gradients(y: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    grad = torch.randn_like(y)
    found = torch.autograd.grad(y, inputs, grad)
    for ours, theirs in zip(found, torch.autograd.grad(expected, inputs, grad), strict=True):
        assert_close(ours, theirs, atol=1e-11, rtol=1e-11)


@all_maps
def test_factors_give_the_papers_weight_at_their_rank(plus: bool, sides: str, num_blocks: int) -> None:
    weight = torch.randn(HEIGHT, WIDTH, dtype=torch.float64)
    first, second = both_sides(plus, sides, num_blocks)
    down, up = reflections.factors(weight, rows(first), rows(second))
    assert_close(weight + up @ down, dense_weight(weight, first, second), atol=ROUNDING, rtol=0)
    assert down.shape == (num_blocks * (2 if plus else 1) * (2 if sides == "both" else 1), WIDTH)


@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("num_blocks", [1, 2, 4, 8])
def test_reflect_is_a_product_with_the_papers_matrix(plus: bool, num_blocks: int) -> None:
    side, x = vectors(WIDTH, num_blocks, plus), torch.randn(3, 5, WIDTH, dtype=torch.float64)
    reflected = reflections.reflect(x, reflections.units(side))
    assert_close(reflected, x @ dense_blocks(side), atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_ether_plus_with_parallel_vectors_is_the_identity_bit_for_bit(sign: float) -> None:
    u = torch.randn(4, WIDTH // 4)
    (given,) = reflections.rows([Vectors(u, sign * u)], torch.float32)
    nothing = given._replace(stack=torch.zeros(12, HEIGHT))
    down, up = reflections.factors(torch.randn(HEIGHT, WIDTH), given, nothing)
    assert torch.count_nonzero(up @ down) == 0


def test_one_block_on_the_input_side_is_pefts_hra_of_rank_one() -> None:
    projection = nn.Linear(WIDTH, HEIGHT, dtype=torch.float64)
    weight = projection.weight.detach().clone()
    model: Any = nn.Sequential(projection)
    with pytest.warns(UserWarning, match="symmetric initialization"):
        hra: Any = get_peft_model(model, HRAConfig(r=1, target_modules=["0"]), autocast_adapter_dtype=False)
    u = hra.base_model.model[0].hra_u["default"].detach()  # (WIDTH, 1)
    down, up = reflections.factors(weight, rows(Vectors(u.t(), None)), None)
    merged = hra.merge_and_unload()[0].weight.detach()
    assert_close(weight + up @ down, merged, atol=1e-7, rtol=0)  # PEFT makes u / |u| in float32


def official_output_side(weight: Tensor, raw: Tensor) -> Tensor:
    """The map of the authors' language-model code on its transposed side: one H per block of output rows."""
    num_blocks, size = raw.shape
    h = torch.stack([torch.eye(size, dtype=raw.dtype) - 2 * torch.outer(r, r) / (r @ r) for r in raw])
    return torch.einsum("rnm,rmd->rnd", h, weight.reshape(num_blocks, size, -1)).reshape(weight.shape)


@pytest.mark.parametrize("num_blocks", [1, 8])
def test_the_output_side_is_the_official_codes_map(num_blocks: int) -> None:
    weight, side = torch.randn(HEIGHT, WIDTH, dtype=torch.float64), vectors(HEIGHT, num_blocks, False)
    down, up = reflections.factors(weight, None, rows(side))
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
    side = Vectors(u, torch.zeros(2, 4, requires_grad=True) if plus else None)
    down, up = reflections.factors(torch.randn(5, 8), rows(side, torch.float32), None)
    (up @ down).sum().backward()
    assert torch.isfinite(up @ down).all()
    assert all(vector.grad is not None and torch.isfinite(vector.grad).all() for vector in leaves(side))


def test_rows_made_together_equal_rows_made_alone() -> None:
    sides = [vectors(w, n, p) for w in (24, 40) for n in (1, 4) for p in (False, True)] * 2
    for side, together in zip(sides, reflections.rows(sides, torch.float64), strict=True):
        assert torch.equal(together.stack, reflections.rows([side], torch.float64)[0].stack)


def test_a_scale_of_zero_merges_to_the_weight_bit_for_bit() -> None:
    weight = torch.randn(5, 8).bfloat16()
    weight[0, 0] = -0.0
    merged = reflections.merged_weight(weight, [(torch.randn(2, 8), torch.randn(5, 2), 0.0)])
    assert torch.equal(merged.view(torch.int16), weight.view(torch.int16))


@all_maps
@pytest.mark.parametrize("tokens", [FEW, MANY])
@pytest.mark.parametrize("wants_grad", [True, False])
def test_outputs_and_gradients_are_those_of_dense_matrices(
    plus: bool, sides: str, num_blocks: int, tokens: int, wants_grad: bool
) -> None:
    x = torch.randn(2, tokens, WIDTH, dtype=torch.float64, requires_grad=wants_grad)
    weight = torch.randn(HEIGHT, WIDTH, dtype=torch.float64)
    bias = torch.randn(HEIGHT, dtype=torch.float64, requires_grad=True) if wants_grad else None
    first, second = both_sides(plus, sides, num_blocks)
    y = reflected_linear(x, weight, bias, input_side=rows(first), output_side=rows(second))
    expected = F.linear(x, dense_weight(weight, first, second), bias)
    for found in (y, reflections.plain_linear(x, weight, bias, first, second)):
        assert_close(found, expected, atol=1e-12, rtol=0)
        further = [] if bias is None else [x, bias]
        same_gradients(found, F.linear(x, dense_weight(weight, first, second), bias),
                       leaves(first, second) + further)  # fmt: skip


@all_maps
@pytest.mark.parametrize("tokens", [FEW, MANY])
def test_gradients_are_those_of_finite_differences(
    plus: bool, sides: str, num_blocks: int, tokens: int
) -> None:
    weight, bias = torch.randn(HEIGHT, WIDTH, dtype=torch.float64), torch.randn(HEIGHT, dtype=torch.float64)
    given = both_sides(plus, sides, num_blocks)

    def function(x: Tensor, *raw: Tensor) -> Tensor:
        left = iter(raw)
        first, second = (s and Vectors(next(left), None if s.v is None else next(left)) for s in given)
        return reflected_linear(x, weight, bias, input_side=rows(first), output_side=rows(second))

    x = torch.randn(tokens, WIDTH, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (x, *leaves(*given)), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [FEW, MANY])
def test_sixteen_bits_stay_within_their_rounding_of_float64(dtype: torch.dtype, tokens: int) -> None:
    x, weight = torch.randn(tokens, 64).to(dtype), (torch.randn(96, 64) / 8).to(dtype)
    first, second = vectors(64, 4, True, torch.float32), vectors(96, 4, True, torch.float32)
    y = reflected_linear(x, weight, None, input_side=rows(first, dtype), output_side=rows(second, dtype))
    expected = F.linear(x.double(), dense_weight(weight.double(), in_float64(first), in_float64(second)))
    assert y.dtype == dtype
    error = (y.double() - expected).norm() / expected.norm()
    assert error < 4 * torch.finfo(dtype).eps  # three roundings of sums, measured 1.3 to 2


@pytest.mark.parametrize("sides", ["input", "output", "both"])
def test_no_gradient_of_the_weight_and_nothing_as_large_is_kept_for_the_backward(sides: str) -> None:
    width, tokens = 256, 1024
    weight = torch.randn(width, width, requires_grad=True)
    x = torch.randn(tokens, width, requires_grad=True)
    given = rows(vectors(width, 4, True, torch.float32), torch.float32)
    on = {"input_side": given if sides != "output" else None}
    on["output_side"] = given if sides != "input" else None
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = reflected_linear(x, weight, None, **on)
    extra = [t for t in kept if t.data_ptr() not in (x.data_ptr(), weight.data_ptr())]
    assert sum(t.numel() for t in extra) < width * width
    y.sum().backward()
    assert weight.grad is None
    assert x.grad is not None


IN_PLACE = {
    "relu": lambda y: F.relu(y, inplace=True),
    "masked": lambda y: y.masked_fill_(y < 0.5, -1.0),
    "a slice": lambda y: y[..., 1:3].mul_(2) + y[..., 2:4],
}


@pytest.mark.parametrize("after", IN_PLACE.values(), ids=IN_PLACE)
@pytest.mark.parametrize("shape", [(FEW,), (2, MANY)], ids=str)
@pytest.mark.parametrize("wants_grad", [True, False])
def test_what_comes_out_may_be_changed_in_place(
    after: Callable[[Tensor], Tensor], shape: tuple[int, ...], wants_grad: bool
) -> None:
    x = torch.randn(*shape, WIDTH, dtype=torch.float64, requires_grad=wants_grad)
    weight, bias = torch.randn(HEIGHT, WIDTH, dtype=torch.float64), torch.randn(HEIGHT, dtype=torch.float64)
    first, second = both_sides(True, "both", 2)
    y = after(reflected_linear(x, weight, bias, input_side=rows(first), output_side=rows(second)))
    expected = after(F.linear(x, dense_weight(weight, first, second), bias).clone())
    assert_close(y, expected, atol=1e-11, rtol=1e-11)
    same_gradients(y, expected, leaves(first, second) + ([x] if wants_grad else []))
