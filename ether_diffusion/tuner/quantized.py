"""Linears with quantized weights (bitsandbytes, torchao): their own product is used, never their weight.

Reflections act on what goes in and what comes out, so that a frozen product is all that training needs:
QETHER, as QLoRA (Dettmers et al. 2023, arXiv:2305.14314) is to LoRA. What needs W itself takes the
dequantized one.
"""

from typing import Any, Literal

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

ROUNDING = {"Params4bit": 1e-2, "Int8Params": 1e-3}
"""How far a weight's norm may be from that of its quantized form, by bitsandbytes' classes."""


Kind = Literal["nf4", "int8"]
MULTIPLE = 64
"""What divides the inputs of a Linear that is quantized: bitsandbytes' blocks are of so many weights."""


def quantize(model: nn.Module, kind: Kind, dtype: torch.dtype) -> int:
    """Replace the Linears of a model by bitsandbytes' of a kind, and return how many; it computes in dtype.

    They are quantized when the model is moved to its device, a layer at a time.
    """
    import bitsandbytes

    count = 0
    for parent in list(model.modules()):
        for name, linear in parent.named_children():
            if type(linear) is not nn.Linear or linear.in_features % MULTIPLE:
                continue
            size = (linear.in_features, linear.out_features, linear.bias is not None)
            if kind == "nf4":
                made = bitsandbytes.nn.Linear4bit(*size, quant_type="nf4", compute_dtype=dtype)
                made.support_avx512bf16_for_cpu = False  # that packs weights anew to draw, and fails after
                weight = bitsandbytes.nn.Params4bit(linear.weight.data, False, quant_type="nf4")
            else:
                made = bitsandbytes.nn.Linear8bitLt(*size, has_fp16_weights=False)
                weight = bitsandbytes.nn.Int8Params(linear.weight.data, requires_grad=False)
            made.weight = weight
            made.bias = linear.bias
            setattr(parent, name, made.requires_grad_(False).train(linear.training))
            count += 1
    return count


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
    if getattr(getattr(linear.weight, "quant_state", None), "packing_format_for_cpu", False):
        eye = torch.eye(linear.in_features + 1, linear.in_features)  # packed for a CPU, PEFT reads noise
        product: Tensor = linear(eye)
        return (product[:-1] - product[-1]).t()
    weight: Tensor = dequantize_module_weight(linear)
    return weight.detach()


def rounding_of(linear: nn.Module) -> float:
    """Return how far, relatively, the norm of a Linear's weight may be from that before quantizing."""
    weight = getattr(linear, "weight", None)
    if not isinstance(linear, nn.Linear) or is_plain(linear) or weight is None:
        return 0.0
    return ROUNDING.get(type(weight).__name__, 1e-3)
