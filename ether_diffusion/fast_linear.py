"""A Linear with a reflected frozen weight whose forward and backward cost little more than the frozen one.

With W' = H_out W H_in and H = I + c Lᵀ R (see `reflections`), one autograd function computes the same map in
one of three ways and never forms dL/dW':

    x wants no gradient          add the update:       y = x Wᵀ + (x Aᵀ) Bᵀ, no product with W in the backward
    few tokens for the width     reflect activations:  x₁ = x + c (x Lᵀ) R, y₀ = x₁ Wᵀ, y = y₀ + c (y₀ Lᵀ) R
    many tokens                  reflect the weight:   W' = W + B A, rebuilt in the backward by one product
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ether_diffusion import reflections
from ether_diffusion.reflections import Rows, along_rows


def reflected_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, input_side: Rows | None, output_side: Rows | None
) -> Tensor:
    """Return x W'ᵀ + b (..., out) with W' = H_out W H_in, for x (..., in), W (out, in) and b (out,).

    Gradients reach x, the bias and the rows; W is taken as frozen.

    Raises:
        RuntimeError: x, W and the rows differ in dtype, as for any Linear.
    """
    stacks = [None if side is None else side.stack for side in (input_side, output_side)]
    is_plus = [side is not None and side.is_plus for side in (input_side, output_side)]
    result: Tensor = _ReflectedLinear.apply(x, weight, bias, *stacks, *is_plus)  # type: ignore[no-untyped-call]
    return result


class _ReflectedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stack_in: Tensor | None,
        stack_out: Tensor | None,
        is_plus_in: bool,
        is_plus_out: bool,
    ) -> Tensor:
        tokens = x.reshape(-1, weight.shape[1])
        input_side = None if stack_in is None else Rows(stack_in, is_plus_in)
        output_side = None if stack_out is None else Rows(stack_out, is_plus_out)
        x_alone_is_frozen = not ctx.needs_input_grad[0] and any(ctx.needs_input_grad[3:5])
        if x_alone_is_frozen:
            forward, ctx.way_back = _factored_forward, _factored_backward
        elif len(tokens) >= _crossing(weight, input_side, output_side):
            forward, ctx.way_back = _weight_forward, _weight_backward
        else:
            forward, ctx.way_back = _activation_forward, _activation_backward
        y, kept = forward(tokens, weight, bias, input_side, output_side)
        ctx.x_shape, ctx.is_plus = x.shape, (is_plus_in, is_plus_out)
        ctx.save_for_backward(tokens, weight, stack_in, stack_out, *kept)
        # no view, as which autograd would refuse to let a module that follows change it in place
        return y.view(*x.shape[:-1], weight.shape[0]).data

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tokens, weight, stack_in, stack_out, *kept = ctx.saved_tensors
        grad = grad.reshape(len(tokens), -1)
        stacks = zip((stack_in, stack_out), ctx.is_plus, strict=True)
        sides = [None if stack is None else Rows(stack, is_plus) for stack, is_plus in stacks]
        grad_x, *grad_stacks = ctx.way_back(grad, tokens, weight, kept, *sides)
        grad_bias = grad.sum(0) if ctx.needs_input_grad[2] else None
        return None if grad_x is None else grad_x.view(ctx.x_shape), None, grad_bias, *grad_stacks, None, None


def _crossing(weight: Tensor, input_side: Rows | None, output_side: Rows | None) -> int:
    """Return the number of tokens from which reflecting the weight is faster than reflecting activations.

    Reflecting x or y costs per token, reflecting W per row or column; where they cross was measured.
    """
    out_features, in_features = weight.shape
    if input_side is None:
        return 2 * in_features
    if output_side is None:
        return 2 * out_features
    return max(in_features, out_features)


def _activation_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, input_side: Rows | None, output_side: Rows | None
) -> tuple[Tensor, list[Tensor]]:
    kept = []
    if input_side is not None:
        along = along_rows(x, input_side.left)
        kept.append(along)
        x = torch.addmm(x, along, input_side.right, alpha=input_side.scale)
    if output_side is None:
        return F.linear(x, weight, bias), kept
    y = F.linear(x, weight)
    along = along_rows(y, output_side.left)
    kept.append(along)
    y = torch.addmm(y, along, output_side.right, alpha=output_side.scale)
    return y if bias is None else y.add_(bias), kept


def _activation_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    kept: Sequence[Tensor],
    input_side: Rows | None,
    output_side: Rows | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    grad_in = grad_out = None
    if output_side is not None:
        *kept, along = kept
        across = along_rows(grad, output_side.right)
        through_x = across.t() @ x  # y is not kept: acrossᵀ y is (acrossᵀ x₁) Wᵀ, a product with few rows
        if input_side is not None:
            through_x.addmm_(across.t() @ kept[0], input_side.right, alpha=input_side.scale)
        grad_out = _stack_gradient(output_side, F.linear(through_x, weight), along.t(), grad)
        grad = torch.addmm(grad, across, output_side.left, alpha=output_side.scale)
    grad_x = grad @ weight
    if input_side is not None:
        across = along_rows(grad_x, input_side.right)
        grad_in = _stack_gradient(input_side, across.t() @ x, kept[0].t(), grad_x)
        grad_x.addmm_(across, input_side.left, alpha=input_side.scale)
    return grad_x, grad_in, grad_out


def _factored_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, input_side: Rows | None, output_side: Rows | None
) -> tuple[Tensor, list[Tensor]]:
    if input_side is None:
        y, weight_along_left = F.linear(x, weight), None
    else:  # W Lᵀ beside x Wᵀ, in one product: reading W a second time costs more than copying x
        both = F.linear(torch.cat((x, input_side.left)), weight)
        y, weight_along_left = both[: len(x)], both[len(x) :].t()
    down, up = reflections.factors(weight, input_side, output_side, weight_along_left=weight_along_left)
    along = along_rows(x, down)
    y.addmm_(along, up.t())
    return y if bias is None else y.add_(bias), [along, up]


def _factored_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    kept: Sequence[Tensor],
    input_side: Rows | None,
    output_side: Rows | None,
) -> tuple[None, Tensor | None, Tensor | None]:
    along, up = kept
    grad_down = along_rows(grad, up.t()).t() @ x
    return None, *_factor_gradients(weight, up, grad_down, along.t() @ grad, input_side, output_side)


def _weight_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, input_side: Rows | None, output_side: Rows | None
) -> tuple[Tensor, list[Tensor]]:
    down, up = reflections.factors(weight, input_side, output_side)
    return F.linear(x, torch.addmm(weight, up, down), bias), [down, up]


def _weight_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    kept: Sequence[Tensor],
    input_side: Rows | None,
    output_side: Rows | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    down, up = kept
    grad_x = grad @ torch.addmm(weight, up, down)
    grad_down = (grad @ up).t() @ x  # (r, in)
    grad_up = (x @ down.t()).t() @ grad  # (r, out), transposed
    return grad_x, *_factor_gradients(weight, up, grad_down, grad_up, input_side, output_side)


def _factor_gradients(
    weight: Tensor,
    up: Tensor,
    grad_down: Tensor,
    grad_up: Tensor,
    input_side: Rows | None,
    output_side: Rows | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Carry gradients of A (r, in) and Bᵀ (r, out) back through `reflections.factors` to the stacked rows."""
    if output_side is None:
        assert input_side is not None
        return _add_left(input_side, grad_down, grad_up, weight), None
    if input_side is None:
        return None, _add_right(output_side, grad_up, grad_down, weight)
    rank, scale = len(input_side.right), output_side.scale
    up_in, grad_reached = up[:, :rank], grad_down[rank:]
    # reached = c_out R_out (W + B_in A_in)
    across = grad_reached @ input_side.right.t()  # (k_out, k_in)
    grad_out = _add_right(output_side, grad_up[rank:], grad_reached, weight)
    Rows(grad_out, output_side.is_plus).right.addmm_(across, up_in.t(), alpha=scale)
    grad_down_in = torch.addmm(grad_down[:rank], (output_side.right @ up_in).t(), grad_reached, alpha=scale)
    grad_up_in = torch.addmm(grad_up[:rank], across.t(), output_side.right, alpha=scale)
    return _add_left(input_side, grad_down_in, grad_up_in, weight), grad_out


def _stack_gradient(side: Rows, left: Tensor, q: Tensor, b: Tensor) -> Tensor:
    """Return the gradient of the stacked rows, whose left part has gradient c left and whose right c q b."""
    if not side.is_plus:
        return torch.addmm(left, q, b).mul_(side.scale)
    grad = F.pad(q @ b, (0, 0, 0, len(side.stack) // 3))
    Rows(grad, True).left.add_(left)
    return grad


def _add_left(side: Rows, grad_right: Tensor, grad_up: Tensor, weight: Tensor) -> Tensor:
    """Stack the gradient of A = R with that of Bᵀ = c L Wᵀ."""
    if not side.is_plus:
        return torch.addmm(grad_right, grad_up, weight, alpha=side.scale)
    grad = F.pad(grad_right, (0, 0, 0, len(side.stack) // 3))
    Rows(grad, True).left.addmm_(grad_up, weight)
    return grad


def _add_right(side: Rows, grad_left: Tensor, grad_reached: Tensor, weight: Tensor) -> Tensor:
    """Stack the gradient of Bᵀ = L with that of A = c R W."""
    if not side.is_plus:
        return torch.addmm(grad_left, grad_reached, weight.t(), alpha=side.scale)
    grad = F.pad(grad_left, (0, 0, len(side.stack) // 3, 0))
    Rows(grad, True).right.addmm_(grad_reached, weight.t())
    return grad
