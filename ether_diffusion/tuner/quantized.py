"""Linears with quantized weights (bitsandbytes, torchao): their own product is used, never their weight.

Reflections act on what goes in and what comes out, so that a frozen product is all that training needs:
QETHER, as QLoRA (Dettmers et al. 2023, arXiv:2305.14314) is to LoRA. What needs W itself takes the
dequantized one.
"""

from typing import Any

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

ROUNDING = {"Params4bit": 1e-2, "Int8Params": 1e-3}
"""How far a weight's norm may be from that of its quantized form, by bitsandbytes' classes."""


def is_plain(linear: nn.Linear) -> bool:
    """Say whether a Linear multiplies by the floating-point weight that it holds."""
    # quantized layers override forward, hold integers, or wrap their weight in a tensor class of their own
    weight = linear.weight.data
    return (
        type(linear).forward is nn.Linear.forward
        and type(weight) is torch.Tensor
        and weight.is_floating_point()
    )


def is_quantized(linear: nn.Linear) -> bool:
    """Say whether PEFT can dequantize a Linear's weight."""
    kind = type(linear.weight)
    return hasattr(linear, "W_q") or kind.__name__ in ROUNDING or kind.__module__.startswith("torchao.")


@torch.no_grad()
def dequantized(linear: nn.Linear) -> Tensor:
    """Return the weight (out, in) that a quantized Linear multiplies by, in floating point."""
    if type(linear.weight).__name__ == "Int8Params":  # PEFT's way loses the rows' scales on a CPU
        holder: Any = linear.weight if getattr(linear.weight, "SCB", None) is not None else linear.state
        scales: Tensor = holder.SCB / 127
        rounded: Tensor = holder.CB.to(scales.dtype)
        return rounded * scales[:, None]
    weight: Tensor = dequantize_module_weight(linear)
    return weight.detach()


def rounding_of(linear: nn.Module) -> float:
    """Return how far, relatively, the norm of a Linear's weight may be from that before quantizing."""
    weight = getattr(linear, "weight", None)
    if not isinstance(linear, nn.Linear) or is_plain(linear) or weight is None:
        return 0.0
    return ROUNDING.get(type(weight).__name__, 1e-3)
