"""What the code is compared with: the paper's matrices written densely, without our factors."""

import torch
from torch import Tensor

from ether_diffusion.reflections import Vectors


def in_float64(side: Vectors) -> Vectors:
    """The same vectors, exactly, in the dtype of the oracles."""
    return Vectors(side.u.double(), None if side.v is None else side.v.double())


def dense_blocks(side: Vectors) -> Tensor:
    """The paper's H (v is None) or H⁺ as a dense block-diagonal d×d matrix, in the vectors' dtype."""
    blocks = []
    for index, row in enumerate(side.u):
        u = row / row.norm()
        block = torch.eye(len(u), dtype=u.dtype)
        if side.v is None:
            block = block - 2 * torch.outer(u, u)
        else:
            v = side.v[index] / side.v[index].norm()
            block = block - torch.outer(u, u) + torch.outer(v, v)
        blocks.append(block)
    return torch.block_diag(*blocks)


def dense_weight(weight: Tensor, input_side: Vectors | None, output_side: Vectors | None) -> Tensor:
    """W' = H_out W H_in with dense matrices."""
    if input_side is not None:
        weight = weight @ dense_blocks(input_side)
    return weight if output_side is None else dense_blocks(output_side) @ weight


def hyperspherical_energy(weight: Tensor) -> Tensor:
    """Σ over pairs of neurons (rows) of 1 / distance on the unit sphere (Liu et al. 2018, s = 1)."""
    neurons = weight / weight.norm(dim=1, keepdim=True)
    distances = torch.pdist(neurons)
    return (1 / distances).sum()
