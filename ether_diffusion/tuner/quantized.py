"""Linears with quantized weights (bitsandbytes, torchao): their own product is used, never their weight.

Reflections act on what goes in and what comes out, so that a frozen product is all that training needs:
QETHER, as QLoRA (Dettmers et al. 2023, arXiv:2305.14314) is to LoRA. What needs W itself takes the
dequantized one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, Literal

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from ether_diffusion.reflections import wide

ROUNDING = {"Params4bit": 1e-2, "Int8Params": 1e-3}
"""How far a weight's norm may be from that of its quantized form, by bitsandbytes' classes."""

NORM = "unquantized_norm"
"""The attribute of a Linear that was quantized here for the norm that its weight had."""
Kind = Literal["nf4", "int8"]
MULTIPLE = 64
"""What divides the inputs of a Linear that is quantized: bitsandbytes' blocks are of so many weights."""


def quantizer_of(kind: Kind) -> str | None:
    """Return the library that is installed and quantizes so: bitsandbytes, or for int8 else torchao."""
    known = ("bitsandbytes", "torchao") if kind == "int8" else ("bitsandbytes",)
    return next((name for name in known if find_spec(name) is not None), None)


def quantize(model: nn.Module, kind: Kind, dtype: torch.dtype) -> int:
    """Replace the Linears of a model by quantized ones of a kind, and return how many; it computes in dtype.

    bitsandbytes quantizes when the model is moved to its device, a layer at a time, and torchao at once.
    """
    makers = {"bitsandbytes": _of_bitsandbytes, "torchao": _of_torchao}
    make, count = makers[quantizer_of(kind) or "bitsandbytes"], 0
    for parent in list(model.modules()):
        for name, linear in parent.named_children():
            if type(linear) is nn.Linear and linear.in_features % MULTIPLE == 0:
                norm = norm_of(linear.weight)
                made = make(linear, kind, dtype).requires_grad_(False).train(linear.training)
                setattr(made, NORM, norm)
                setattr(parent, name, made)
                count += 1
    return count


def _of_bitsandbytes(linear: nn.Linear, kind: Kind, dtype: torch.dtype) -> nn.Linear:
    import bitsandbytes

    size = (linear.in_features, linear.out_features, linear.bias is not None)
    with torch.device("meta"):  # or billions of numbers would be drawn, and thrown away
        if kind == "nf4":
            made = bitsandbytes.nn.Linear4bit(*size, quant_type="nf4", compute_dtype=dtype)
        else:
            made = bitsandbytes.nn.Linear8bitLt(*size, has_fp16_weights=False)
    if kind == "nf4":
        made.support_avx512bf16_for_cpu = False  # that packs weights anew to draw, and fails after
        made.weight = bitsandbytes.nn.Params4bit(linear.weight.data, False, quant_type="nf4")
    else:
        made.weight = bitsandbytes.nn.Int8Params(linear.weight.data, requires_grad=False)
    made.bias = linear.bias
    plain: nn.Linear = made
    return plain


def _of_torchao(linear: nn.Linear, kind: Kind, dtype: torch.dtype) -> nn.Linear:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(linear, Int8WeightOnlyConfig())
    return linear


def plain_linear(linear: nn.Linear, weight: Tensor) -> nn.Linear:
    """Return a Linear of a weight (out, in), with the bias of a quantized one."""
    plain = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
    plain.weight, plain.bias = nn.Parameter(weight, requires_grad=False), linear.bias
    return plain.train(linear.training)


@contextmanager
def plain_linears(model: nn.Module) -> Iterator[None]:
    """Have Linears inside of what a model's quantized ones stand for, in their places."""
    places = [
        (parent, name, layer)
        for parent in list(model.modules())
        for name, layer in parent.named_children()
        if isinstance(layer, nn.Linear) and is_quantized(layer)
    ]
    try:
        for parent, name, layer in places:
            setattr(parent, name, plain_linear(layer, dequantized(layer)))
        yield
    finally:
        for parent, name, layer in places:
            setattr(parent, name, layer)


def norm_of(weight: Tensor) -> float:
    """Return the Frobenius norm of a weight, with nine digits."""
    weight = weight.cpu() if weight.device.type == "mps" else weight  # which has no float64
    # float8 promotes to nothing
    return float(f"{torch.linalg.vector_norm(wide(weight.detach()), dtype=torch.float64):.9g}")


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
