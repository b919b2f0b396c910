"""The update of a weight as LoRA factors: exact in closed form, then rounded for a file."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ether_diffusion import reflections
from ether_diffusion.reflections import Vectors
from ether_diffusion.tuner.linear import make_rows


class LoraFactors(NamedTuple):
    """ΔW = up @ down of one module: down (rank, in) and up (out, rank)."""

    down: Tensor
    up: Tensor


def lora_factors(weight: Tensor, input_side: Vectors | None, output_side: Vectors | None) -> LoraFactors:
    """Return the exact update H_out W H_in - W of a weight W (out, in) as LoRA factors in float64.

    The rows of `down` are orthonormal: adapters far from the base would otherwise be sums of large terms
    that cancel, which 16 bits cannot hold (1.4e-3 of ΔW instead of 0.7e-3). The rank is num_blocks for a
    side of ETHER and 2 num_blocks for a side of ETHER+, summed over the sides, and at most `in`.
    """
    vectors = [_in_float64(side) for side in (input_side, output_side)]
    down, up = reflections.factors(weight.double(), *make_rows([vectors], torch.float64)[0])
    basis, coordinates = torch.linalg.qr(down.t())  # down = coordinatesᵀ basisᵀ
    return LoraFactors(basis.t(), up @ coordinates.t())


def stored_factors(factors: LoraFactors, dtype: torch.dtype) -> LoraFactors:
    """Round factors to `dtype`, each row of down as large as its column of up, so that neither underflows.

    The balance moves powers of two only, which are exact: float16 keeps ΔW within 1e-3 of its largest
    entry however close the adapter is to the identity, down to entries of about 1e-8.

    Raises:
        ValueError: an entry is too large for `dtype`, or not finite.
    """
    down, up = factors
    halves = (up.abs().amax(0).log2() - down.abs().amax(1).log2()) / 2
    exponents = torch.where(halves.isfinite(), halves.round(), 0.0)
    stored = LoraFactors((down * exponents.exp2()[:, None]).to(dtype), (up * (-exponents).exp2()).to(dtype))
    if not any(factor.is_meta for factor in stored):
        for factor in stored:
            if not factor.isfinite().all():
                raise ValueError(f"an update is too large for {dtype} or not finite; export in float32")
    return stored


def lora_tensors(factors: Mapping[str, LoraFactors], *, kohya: bool = True) -> tuple[dict[str, Tensor], int]:
    """Return a LoRA file's tensors and their rank from factors by key, in kohya's names or in PEFT's.

    All have one rank, by rows of zeros, and alpha = rank: some readers take the first module's for all.
    """
    rank = max(len(down) for down, _ in factors.values())
    down_name, up_name = ("lora_down", "lora_up") if kohya else ("lora_A", "lora_B")
    tensors = {}
    for key, (down, up) in factors.items():
        missing = rank - len(down)
        tensors[f"{key}.{down_name}.weight"] = nn.functional.pad(down, (0, 0, 0, missing)).contiguous()
        tensors[f"{key}.{up_name}.weight"] = nn.functional.pad(up, (0, missing)).contiguous()
        if kohya:  # without it, alpha is the rank
            tensors[f"{key}.alpha"] = torch.tensor(float(rank), dtype=down.dtype)
    return tensors, rank


def _in_float64(side: Vectors | None) -> Vectors | None:
    return None if side is None else Vectors(side.u.double(), None if side.v is None else side.v.double())
