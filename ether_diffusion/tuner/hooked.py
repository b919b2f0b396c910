"""Layers whose weights come and go: what offloading, layerwise casting and others hang around a forward.

accelerate and diffusers replace the `forward` of a leaf, torch calls its hooks around it; what they do to the
weights (load, move, cast) they do for the time of that call. So an adapter computes in there.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import onload_layer
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ether_diffusion.reflections import wide
from ether_diffusion.tuner.quantized import dequantized, is_plain

Compute = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""What is made of x, W and b."""


def is_hooked(module: nn.Module) -> bool:
    """Say whether something has been hung around the forward of a module."""
    return "forward" in module.__dict__ or bool(
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
    )


def called(base: nn.Linear, x: Tensor, compute: Compute) -> Tensor:
    """Call a Linear with `compute` in the place of its product: within its hooks, on what these give it.

    Raises:
        RuntimeError: the hooks let nothing through to the layer.
    """
    with _InPlaceOfTheProduct(base, compute) as place:
        y: Tensor = base(x)
    if not place.was_reached:
        raise RuntimeError(f"a hook on {base} computes without it, so that an adapter has no place there")
    return y


def weight_of(base: nn.Linear) -> Tensor:
    """Return the weight that a Linear computes with: its own, dequantized, or what hooks make of it."""
    if not is_plain(base):
        return dequantized(base)
    found = [base.weight]

    def keep(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        found.append(weight)
        return x.new_zeros(len(x), base.out_features)

    if is_hooked(base):
        called(base, torch.zeros(1, base.in_features), keep)
    return found[-1].detach()


def device_of(base: nn.Linear) -> torch.device:
    """Return the device that a Linear computes on: its weight's, or where accelerate brings that."""
    hook = getattr(base, "_hf_hook", None)
    if base.weight.is_meta and getattr(hook, "execution_device", None) is not None:
        return torch.device(hook.execution_device)  # type: ignore[union-attr]
    return base.weight.device


def lies_on_disk(model: nn.Module) -> bool:
    """Say whether diffusers keeps whole blocks on disk, whose tensors hold nothing between calls."""
    groups = [
        hook.group
        for module in model.modules()
        if (hooks := getattr(module, "_diffusers_hook", None)) is not None
        and (hook := hooks.get_hook("group_offloading")) is not None
    ]
    return any(
        group.offload_to_disk_path and any(True for block in group.modules for _ in block.children())
        for group in groups
    )


def write_weight(layer: nn.Module, base: nn.Linear, weight: Tensor) -> None:
    """Replace the weight of the Linear under a layer, also where accelerate has offloaded it.

    Raises:
        ValueError: the next call would not compute with it.
    """
    with onload_layer(layer) if base.weight.is_meta else nullcontext():
        written = weight.to(base.weight.device, base.weight.dtype)
        base.weight.data = written
    found = weight_of(base)
    expected = written.to(found.device, found.dtype)
    if not found.is_meta and not torch.allclose(wide(found), wide(expected), rtol=0, atol=0, equal_nan=True):
        raise ValueError(
            "the weight under an adapter is loaded or made anew for every call (group offloading to disk or "
            "with streams, weight_norm), so that fusing would be lost; fuse or unfuse before that is set up"
        )


class _InPlaceOfTheProduct(TorchFunctionMode):
    def __init__(self, base: nn.Linear, compute: Compute) -> None:
        super().__init__()
        self.base, self.compute, self.was_reached = base, compute, False

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not F.linear or args[1] is not self.base.weight:
            return func(*args, **(kwargs or {}))
        self.was_reached = True
        x, weight, bias = args
        # the hooks exchange the parameter's data once the call is over: the backward needs those of now
        return self.compute(x, weight if weight.requires_grad else weight.detach(), bias)
