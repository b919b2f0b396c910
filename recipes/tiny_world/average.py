"""The moving average of a model's weights, which is what Tiny World ships."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Average:
    """Exponential moving average of a module's whole state, kept in the state's own dtypes.

    average_t = d_t * average_(t-1) + (1 - d_t) * weights_t, where d_t = min(decay, (1 + t) / (10 + t)).
    """

    def __init__(self, model: torch.nn.Module, decay: float) -> None:
        self.decay = decay
        self.tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: torch.nn.Module, step: int) -> None:
        """Move the average towards the model's weights."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        averages, tensors = [], []
        for name, tensor in model.state_dict().items():
            average = self.tensors[name] = self.tensors[name].to(tensor.device)
            if average.is_floating_point():
                averages.append(average)
                tensors.append(tensor)
            else:
                average.copy_(tensor)
        torch._foreach_lerp_(averages, tensors, weight)

    @contextmanager
    def swapped_in(self, model: torch.nn.Module) -> Iterator[None]:
        """Give the model the averaged weights inside the block, and its own back after it."""
        own = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        model.load_state_dict(self.tensors)
        try:
            yield
        finally:
            model.load_state_dict(own)
