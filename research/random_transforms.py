"""Random transforms of growing strength on a frozen UNet, without training: what a geometry itself does.

ETHER, Bini et al. 2024, arXiv:2405.20271, fig. 3. T multiplies each attention projection, W' = W T or T W T'
on both sides, in `NUM_BLOCKS` diagonal blocks. Strength s runs from 0, the identity, to 1:

    ETHER    T = I − 2ûûᵀ, which has no strength: the same at every s
    ETHER+   T = I − ûûᵀ + v̂v̂ᵀ with sin∠(û, v̂) = s: at 1 as far as it reaches, ‖T − I‖ = √2 a block
    OFT      T = (I − S)(I + S)⁻¹, S = s / (1 − s) · S₀ with S₀ skew, ‖S₀‖₂ = 1: towards −I,
             whose signs cancel in q kᵀ and in v with out, so that the end is like the beginning
    Naive    T = I + s / (1 − s) · N₀, ‖N₀‖₂ = 1: without bound
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ether_diffusion.reflections import Vectors, factors, merged_weight, rows
from research.distances import distance_to_identity

METHODS = ("ether", "ether_plus", "ether_plus_one_sided", "oft", "naive")
STRENGTHS = (0.1, 0.25, 0.5, 0.75, 0.97)
"""Without 1, where OFT and Naive end at infinity."""
NUM_BLOCKS = 4


def check_strength(strength: float) -> None:
    """Raise ValueError for a strength that OFT or Naive do not reach."""
    if not 0 <= strength < 1:
        raise ValueError(f"a strength is from 0, the identity, to below 1; found {strength:g}")


def random_transform(
    weight: Tensor, method: str, strength: float, generator: torch.Generator
) -> tuple[Tensor, float]:
    """Return W' (out, in) under a random transform, and ‖T − I‖, in quadrature over the sides.

    Equal generators give the same directions at every strength.
    """
    if method in ("oft", "naive"):
        blocks = _dense_blocks(weight.shape[1], method, strength, generator)
        columns = weight.view(len(weight), NUM_BLOCKS, -1)
        made: Tensor = torch.einsum("onk,nkm->onm", columns, blocks).reshape_as(weight)
        return made, float((blocks - torch.eye(blocks.shape[1])).norm())
    both = method == "ether_plus"
    widths = (weight.shape[1], weight.shape[0]) if both else (weight.shape[1],)
    sides = rows([_vectors(width, method, strength, generator) for width in widths], weight.dtype)
    update = factors(weight, sides[0], sides[1] if both else None)
    distance = sum(distance_to_identity(side) ** 2 for side in sides) ** 0.5
    return merged_weight(weight, [(*update, 1.0)]), distance


@contextmanager
@torch.no_grad()
def transformed(
    layers: Sequence[nn.Linear], method: str, strength: float, *, seed: int
) -> Iterator[Mapping[str, float]]:
    """Put random transforms on layers' weights inside, and the very tensors back after; give mean distances.

    `weight_distance` is ‖W' − W‖ / ‖W‖, `transform_distance` ‖T − I‖ (Frobenius), means over layers.
    """
    check_strength(strength)
    generator = torch.Generator().manual_seed(seed)
    kept = [layer.weight for layer in layers]
    weight_distances, distances = [], []
    try:
        for layer in layers:
            weight, distance = random_transform(layer.weight, method, strength, generator)
            weight_distances.append(float((weight - layer.weight).norm() / layer.weight.norm()))
            distances.append(distance)
            layer.weight = nn.Parameter(weight, requires_grad=False)
        yield {
            "weight_distance": sum(weight_distances) / len(layers),
            "transform_distance": sum(distances) / len(layers),
        }
    finally:
        for layer, weight in zip(layers, kept, strict=True):
            layer.weight = weight


def _vectors(width: int, method: str, strength: float, generator: torch.Generator) -> Vectors:
    """Return random u and, for ETHER+, v at the angle whose sine is the strength: (num_blocks, width / n)."""
    shape = (NUM_BLOCKS, width // NUM_BLOCKS)
    u = nn.functional.normalize(torch.randn(shape, generator=generator), dim=1)
    if method == "ether":
        return Vectors(u, None)
    other = torch.randn(shape, generator=generator)
    other = nn.functional.normalize(other - (other * u).sum(1, keepdim=True) * u, dim=1)
    return Vectors(u, (1 - strength**2) ** 0.5 * u + strength * other)


def _dense_blocks(width: int, method: str, strength: float, generator: torch.Generator) -> Tensor:
    side = width // NUM_BLOCKS
    raw = torch.randn(NUM_BLOCKS, side, side, generator=generator)
    direction = raw - raw.mT if method == "oft" else raw
    direction = direction / torch.linalg.matrix_norm(direction, ord=2)[:, None, None]
    scaled, one = strength / (1 - strength) * direction, torch.eye(side)
    if method == "naive":
        grown: Tensor = one + scaled
        return grown
    turned: Tensor = torch.linalg.solve(one + scaled, one - scaled, left=False)
    return turned
