"""The mathematics of ETHER: block reflections, their tied low-rank factors, and one fast Linear on them.

ETHER, Bini et al. 2024, arXiv:2405.20271, sections 3.2 to 3.4, with torch's weight W (out, in):

    ETHER    H  = blockdiag(I - 2 û ûᵀ)          W' = W H
    ETHER+   H⁺ = blockdiag(I - û ûᵀ + v̂ v̂ᵀ)     W' = H⁺_out W H⁺_in

Every block matrix is written H = I + c Lᵀ R with rows L, R (k, d) that hold one block each:

    ETHER    L = R = Û,                    c = -2    k = num_blocks
    ETHER+   L = [E; V̂],    R = [Û; E],    c = 1     k = 2 num_blocks,   E = V̂ - Û

The second is exact (v̂v̂ᵀ - ûûᵀ = e ûᵀ + v̂ eᵀ, with v̂'s sign chosen towards û, which v̂v̂ᵀ cannot see), and
it is exactly the identity at v = ±u, where [Û; V̂] would leave rounding noise. H itself is never built.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_NORM = 1e-12
"""Norms are clamped here, so that a zero vector gives a finite direction (zero) and never NaN."""


class Vectors(NamedTuple):
    """The raw vectors of one side: u and, for ETHER+, v (num_blocks, d / num_blocks), of any norm."""

    u: Tensor
    v: Tensor | None


class Transform(NamedTuple):
    """What an adapter does to one W: the raw vectors of its sides, None where it has none."""

    input: Vectors | None
    output: Vectors | None

    def to(self, where: torch.device | torch.dtype) -> "Transform":
        """Return it on a device or in a dtype."""
        first, second = (
            None if side is None else Vectors(side.u.to(where), None if side.v is None else side.v.to(where))
            for side in (self.input, self.output)
        )
        return Transform(first, second)


class Units(NamedTuple):
    """Unit vectors û and v̂ (..., num_blocks, d / num_blocks); v̂ points towards û."""

    u: Tensor
    v: Tensor | None


class Rows(NamedTuple):
    """H = I + scale · leftᵀ right for one side, from one stack of rows: [Û] (k, d) or [Û; E; V̂] (3k/2, d).

    Those of several adapters lie along an axis before.
    """

    stack: Tensor
    is_plus: bool

    @property
    def left(self) -> Tensor:
        return self.stack[..., self.stack.shape[-2] // 3 :, :] if self.is_plus else self.stack

    @property
    def right(self) -> Tensor:
        return self.stack[..., : 2 * self.stack.shape[-2] // 3, :] if self.is_plus else self.stack

    @property
    def scale(self) -> float:
        return 1.0 if self.is_plus else -2.0


class SideRows(NamedTuple):
    """The rows of an adapter's two sides, None where it has none."""

    input: Rows | None
    output: Rows | None


def wide(tensor: Tensor) -> Tensor:
    """Return a tensor in float32, or in its own dtype where that is wider."""
    return tensor if tensor.dtype.itemsize > 4 else tensor.float()


def _unit(raw: Tensor) -> Tensor:
    raw = wide(raw)
    norm: Tensor = torch.linalg.vector_norm(raw, dim=-1, keepdim=True)
    return raw / norm.clamp_min(MIN_NORM)


def units(vectors: Vectors) -> Units:
    """Normalise the vectors of one side in float32 or wider, differentiably."""
    u = _unit(vectors.u)
    if vectors.v is None:
        return Units(u, None)
    v = _unit(vectors.v)
    return Units(u, torch.where((u * v).sum(-1, keepdim=True) < 0, -v, v))


def _spread(blocks: Tensor) -> Tensor:
    """Put each block (..., n, m) into its own row of a block diagonal (..., n, n * m)."""
    return torch.diag_embed(blocks.transpose(-1, -2), dim1=-3, dim2=-2).flatten(-2)


def rows(sides: Sequence[Vectors], dtype: torch.dtype, *, together: int = 1) -> list[Rows]:
    """Return the rows of H for many sides, differentiably; sides of one shape are computed in one go.

    With `together`, so many sides in turn, which are of one shape, have their rows in one stack.
    """
    alike: dict[tuple[torch.Size, torch.device, bool], list[int]] = defaultdict(list)
    for index, (u, v) in enumerate(sides):
        alike[u.shape, u.device, v is not None].append(index)
    result: dict[int, Rows] = {}
    for (_, _, is_plus), indices in alike.items():
        v = torch.stack([v for index in indices if (v := sides[index].v) is not None]) if is_plus else None
        unit = units(Vectors(torch.stack([sides[index].u for index in indices]), v))
        blocks = unit.u if unit.v is None else torch.stack((unit.u, unit.v - unit.u, unit.v), 1)
        stacks = _spread(blocks.to(dtype)).flatten(1, -2)
        if together > 1:
            stacks = stacks.view(-1, together, *stacks.shape[1:])
        firsts = zip(indices[::together], stacks.unbind(), strict=True)
        result.update((index, Rows(stack, is_plus)) for index, stack in firsts)
    return [result[index] for index in range(0, len(sides), together)]


def reflect(x: Tensor, side: Units) -> Tensor:
    """Return x H (..., d), block by block and elementwise: the definition, in a form a compiler fuses."""
    blocks = x.reshape(*x.shape[:-1], *side.u.shape)  # (..., num_blocks, d / num_blocks)
    u = side.u.to(x.dtype)
    along_u = (blocks * u).sum(-1, keepdim=True)
    if side.v is None:
        return (blocks - 2 * along_u * u).flatten(-2)
    v, difference = side.v.to(x.dtype), (side.v - side.u).to(x.dtype)
    along_difference = (blocks * difference).sum(-1, keepdim=True)
    return (blocks + along_difference * v + along_u * difference).flatten(-2)


def along_rows(x: Tensor, rows: Tensor) -> Tensor:
    """Return x rowsᵀ (tokens, k) for x (tokens, d) and a few rows (k, d)."""
    if x.dtype == torch.float32 and x.numel() <= 2**19:  # up to three times faster this way round: measured
        return (rows @ x.t()).t()
    return x @ rows.t()


def factors(
    weight: Tensor,
    input_side: Rows | None,
    output_side: Rows | None,
    *,
    weight_along_left: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return A (r, in) and B (out, r) with H_out W H_in = W + B A, exactly and differentiably.

    The rank r is num_blocks for a side of ETHER and 2 num_blocks for a side of ETHER+, summed over the
    sides. Two skinny passes over W (W Lᵀ and R W) are all the work; a caller that has W Lᵀ (out, k) already
    gives it as `weight_along_left`. Factors of several adapters lie along an axis before, as their rows do.
    """
    if input_side is None:
        assert output_side is not None
        return (output_side.right @ weight) * output_side.scale, output_side.left.mT
    if weight_along_left is None:
        left = input_side.left
        weight_along_left = along_rows(weight, left.flatten(0, -2))
        weight_along_left = weight_along_left.reshape(-1, *left.shape[:-1]).movedim(0, -2)
    up = weight_along_left * input_side.scale
    if output_side is None:
        return input_side.right, up
    reached = (output_side.right @ weight) * output_side.scale
    reached = reached + (output_side.right @ up) @ input_side.right * output_side.scale
    up = torch.cat((up, output_side.left.mT), dim=-1)
    return torch.cat((input_side.right, reached), dim=-2), up


def with_rows(transforms: Sequence[Transform], dtype: torch.dtype) -> list[SideRows]:
    """Return the rows of many adapters' sides in a dtype, all made in one go."""
    flat = [side for each in transforms for side in (each.input, each.output) if side is not None]
    made = iter(rows(flat, dtype))
    return [
        SideRows(None if first is None else next(made), None if second is None else next(made))
        for first, second in transforms
    ]


def merged_weight(weight: Tensor, updates: list[tuple[Tensor, Tensor, float]]) -> Tensor:
    """Return W + Σ scale · B A over `updates` (A, B, scale), summed in float32 or wider, in W's dtype.

    A scale of 0 adds nothing, not even a signed zero, so that the result is W bit for bit.
    """
    merged = wide(weight)
    for down, up, scale in updates:
        if scale != 0:
            merged = torch.addmm(merged, up.to(merged.dtype), down.to(merged.dtype), alpha=scale)
    return merged.to(weight.dtype)


def plain_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, input_side: Vectors | None, output_side: Vectors | None
) -> Tensor:
    """Return x W'ᵀ + b (..., out), W' = H_out W H_in, by reflecting activations; autograd does the rest."""
    if input_side is not None:
        x = reflect(x, units(input_side))
    if output_side is None:
        return F.linear(x, weight, bias)
    y = reflect(F.linear(x, weight), units(output_side))
    return y if bias is None else y + bias
