"""The custom autograd function against dense matrices, autograd and finite differences."""

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from oracles import dense_weight, in_float64
from torch import Tensor
from torch.testing import assert_close

from ether_diffusion import reflections
from ether_diffusion.fast_linear import reflected_linear
from ether_diffusion.reflections import Rows, Vectors

WIDTH, HEIGHT = 8, 12
FEW, MANY = 3, 40
"""Numbers of tokens below and above where reflecting the weight becomes the faster way."""

CASES = list(itertools.product([False, True], ["input", "output", "both"], [1, 2, 4], [FEW, MANY]))
IDS = [f"{'plus' if p else 'ether'}-{s}-{n}-{t}" for p, s, n, t in CASES]


def make_side(width: int, num_blocks: int, plus: bool, dtype: torch.dtype = torch.float64) -> Vectors:
    u = torch.randn(num_blocks, width // num_blocks, dtype=dtype).requires_grad_()
    return Vectors(u, torch.randn_like(u).requires_grad_() if plus else None)


def make_sides(plus: bool, sides: str, num_blocks: int) -> tuple[Vectors | None, Vectors | None]:
    return (
        make_side(WIDTH, num_blocks, plus) if sides != "output" else None,
        make_side(HEIGHT, num_blocks, plus) if sides != "input" else None,
    )


def rows(side: Vectors | None, dtype: torch.dtype = torch.float64) -> Rows | None:
    return None if side is None else reflections.rows([side], dtype)[0]


def leaves(*sides: Vectors | None) -> list[Tensor]:
    return [vector for side in sides if side is not None for vector in side if vector is not None]


@pytest.mark.parametrize(("plus", "sides", "num_blocks", "tokens"), CASES, ids=IDS)
@pytest.mark.parametrize("x_wants_grad", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
def test_outputs_and_gradients_are_those_of_dense_matrices(
    plus: bool, sides: str, num_blocks: int, tokens: int, x_wants_grad: bool, has_bias: bool
) -> None:
    x = torch.randn(2, tokens, WIDTH, dtype=torch.float64, requires_grad=x_wants_grad)
    weight = torch.randn(HEIGHT, WIDTH, dtype=torch.float64)
    bias = torch.randn(HEIGHT, dtype=torch.float64, requires_grad=True) if has_bias else None
    first, second = make_sides(plus, sides, num_blocks)
    y = reflected_linear(x, weight, bias, input_side=rows(first), output_side=rows(second))
    expected = F.linear(x, dense_weight(weight, first, second), bias)
    assert_close(y, expected, atol=1e-12, rtol=0)
    inputs = leaves(first, second) + ([x] if x_wants_grad else []) + ([] if bias is None else [bias])
    grad = torch.randn_like(y)
    for ours, theirs in zip(
        torch.autograd.grad(y, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True
    ):
        assert_close(ours, theirs, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize(("plus", "sides", "num_blocks", "tokens"), CASES, ids=IDS)
def test_gradients_are_those_of_finite_differences(
    plus: bool, sides: str, num_blocks: int, tokens: int
) -> None:
    x = torch.randn(tokens, WIDTH, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(HEIGHT, WIDTH, dtype=torch.float64), torch.randn(HEIGHT, dtype=torch.float64)
    first, second = make_sides(plus, sides, num_blocks)

    def function(x: Tensor, *raw: Tensor) -> Tensor:
        left = iter(raw)
        given = [
            None if side is None else Vectors(next(left), None if side.v is None else next(left))
            for side in (first, second)
        ]
        return reflected_linear(x, weight, bias, input_side=rows(given[0]), output_side=rows(given[1]))

    assert torch.autograd.gradcheck(function, (x, *leaves(first, second)), fast_mode=True)


@pytest.mark.parametrize(("plus", "sides", "num_blocks", "tokens"), CASES, ids=IDS)
def test_the_plain_form_is_the_same_map(plus: bool, sides: str, num_blocks: int, tokens: int) -> None:
    x, weight = (
        torch.randn(tokens, WIDTH, dtype=torch.float64),
        torch.randn(HEIGHT, WIDTH, dtype=torch.float64),
    )
    bias = torch.randn(HEIGHT, dtype=torch.float64)
    first, second = make_sides(plus, sides, num_blocks)
    fast = reflected_linear(x, weight, bias, input_side=rows(first), output_side=rows(second))
    plain = reflections.plain_linear(x, weight, bias, first, second)
    assert_close(fast, plain, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [FEW, MANY])
def test_sixteen_bits_stay_within_their_rounding_of_float64(dtype: torch.dtype, tokens: int) -> None:
    x, weight = torch.randn(tokens, 64).to(dtype), (torch.randn(96, 64) / 8).to(dtype)
    first, second = make_side(64, 4, True, torch.float32), make_side(96, 4, True, torch.float32)
    y = reflected_linear(x, weight, None, input_side=rows(first, dtype), output_side=rows(second, dtype))
    expected = F.linear(x.double(), dense_weight(weight.double(), in_float64(first), in_float64(second)))
    assert y.dtype == dtype
    error = (y.double() - expected).norm() / expected.norm()
    assert error < 4 * torch.finfo(dtype).eps  # three roundings of sums, measured 1.3 to 2


def test_the_fast_path_forms_no_gradient_for_the_weight() -> None:
    weight = torch.randn(HEIGHT, WIDTH, requires_grad=True)
    side = make_side(WIDTH, 2, False, torch.float32)
    reflected_linear(
        torch.randn(5, WIDTH), weight, None, input_side=rows(side, torch.float32), output_side=None
    ).sum().backward()
    assert weight.grad is None
    assert side.u.grad is not None


@pytest.mark.parametrize("sides", ["input", "output", "both"])
def test_nothing_as_large_as_the_weight_or_the_input_is_kept_for_the_backward(sides: str) -> None:
    width, tokens = 256, 1024
    weight, x = torch.randn(width, width), torch.randn(tokens, width, requires_grad=True)
    side = make_side(width, 4, True, torch.float32)
    given = rows(side, torch.float32)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        reflected_linear(
            x,
            weight,
            None,
            input_side=given if sides != "output" else None,
            output_side=given if sides != "input" else None,
        )
    extra = [t for t in kept if t.data_ptr() not in (x.data_ptr(), weight.data_ptr())]
    assert sum(t.numel() for t in extra) < width * width


IN_PLACE = {
    "relu": lambda y: F.relu(y, inplace=True),
    "add": lambda y: y.add_(1),
    "masked": lambda y: y.masked_fill_(y < 0.5, -1.0),
    "a slice": lambda y: y[..., 1:3].mul_(2) + y[..., 2:4],
}


@pytest.mark.parametrize("after", IN_PLACE.values(), ids=IN_PLACE)
@pytest.mark.parametrize("shape", [(FEW,), (2, FEW), (2, MANY)], ids=str)
@pytest.mark.parametrize("x_wants_grad", [True, False])
def test_what_comes_out_may_be_changed_in_place(
    after: Callable[[Tensor], Tensor], shape: tuple[int, ...], x_wants_grad: bool
) -> None:
    x = torch.randn(*shape, WIDTH, dtype=torch.float64, requires_grad=x_wants_grad)
    weight, bias = torch.randn(HEIGHT, WIDTH, dtype=torch.float64), torch.randn(HEIGHT, dtype=torch.float64)
    first, second = make_sides(True, "both", 2)
    inputs = leaves(first, second) + ([x] if x_wants_grad else [])
    y = after(reflected_linear(x, weight, bias, input_side=rows(first), output_side=rows(second)))
    expected = after(F.linear(x, dense_weight(weight, first, second), bias).clone())
    assert_close(y, expected, atol=1e-12, rtol=0)
    grad = torch.randn_like(y)
    for ours, theirs in zip(
        torch.autograd.grad(y, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True
    ):
        assert_close(ours, theirs, atol=1e-12, rtol=0)
