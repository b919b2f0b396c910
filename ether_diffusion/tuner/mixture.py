"""A batch whose samples carry different adapters: their factors stacked, applied by two batched products."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Mixture(NamedTuple):
    """One layer's adapters by sample: A (samples, r, in), B (samples, out, r), W'_i = W + B_i A_i."""

    down: Tensor
    up: Tensor
    repeats: bool = True
    """Whether a batch may hold the samples several times over, one set after the other."""

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return x_i W'_iᵀ + b (batch, ..., out) for x (batch, ..., in).

        Raises:
            ValueError: the batch is not the samples, or a multiple of them.
        """
        batch, samples = len(x), len(self.down)
        if batch % samples or (batch != samples and not self.repeats):
            raise ValueError(
                f"the batch has {batch} rows and mixed_adapters names {samples} adapters; name one per sample"
                " (classifier-free guidance may double the batch)"
            )
        down, up = self.down.to(x.dtype), self.up.to(x.dtype)
        if batch > samples:
            down, up = down.repeat(batch // samples, 1, 1), up.repeat(batch // samples, 1, 1)
        tokens = x.reshape(batch, -1, weight.shape[1])
        if tokens.shape[1] >= 2 * weight.shape[0]:
            weights = torch.baddbmm(weight.expand(batch, -1, -1), up, down)
            y = torch.bmm(tokens, weights.transpose(1, 2))
            y = y if bias is None else y.add_(bias)
        else:
            along = torch.bmm(tokens, down.transpose(1, 2))
            y = torch.baddbmm(F.linear(tokens, weight, bias), along, up.transpose(1, 2))
        return y.view(*x.shape[:-1], weight.shape[0])
