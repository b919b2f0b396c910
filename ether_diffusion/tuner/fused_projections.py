"""Adapted projections beside the fused ones that diffusers puts in their place.

`fuse_qkv_projections` copies the weights of to_q, to_k and to_v into one Linear, and an attention calls only
that from then on, so that adapters on the three would do nothing.
"""

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ether_diffusion.tuner.hooked import is_hooked
from ether_diffusion.tuner.linear import EtherLinear

_FUSED = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
    "to_added_kv": ("add_k_proj", "add_v_proj"),
}


def follow_fusing(attention: nn.Module) -> None:
    """Let an attention whose projections are adapted call these, also once diffusers has fused them."""
    if hasattr(attention, "fused_projections") and _follow not in attention._forward_pre_hooks.values():
        attention.register_forward_pre_hook(_follow)


def _follow(attention: nn.Module, inputs: Any) -> None:
    if not attention.fused_projections:
        return
    for name, parts in _FUSED.items():
        fused, projections = attention._modules.get(name), _parts(attention, parts)
        if type(fused) is nn.Linear and any(isinstance(part, BaseTunerLayer) for part in projections):
            attention._modules[name] = FusedProjections(attention, fused, parts)


def _parts(attention: nn.Module, names: tuple[str, ...]) -> list[nn.Module]:
    return [part for name in names if (part := attention._modules.get(name)) is not None]


class FusedProjections(nn.Linear):
    """The fused Linear where no adapter changes its parts, else the parts themselves."""

    attention: nn.Module

    def __init__(self, attention: nn.Module, fused: nn.Linear, parts: tuple[str, ...]) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = fused.in_features, fused.out_features
        self.weight, self.bias, self.parts = fused.weight, fused.bias, parts
        self.requires_grad_(False)  # a copy of what is frozen
        self.__dict__["attention"] = attention  # not as a module, which it would then be within itself
        weights = [_base_weight(part) for part in _parts(attention, parts)]
        # not so if it was fused while adapters were merged into the parts, which it would keep for good
        self.is_base = (
            not any(map(is_hooked, (fused, *_parts(attention, parts))))
            and not any(weight.is_meta for weight in weights)
            and torch.equal(torch.cat(weights), fused.weight)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the projections of x (..., in) side by side (..., Σ out)."""
        projections = _parts(self.attention, self.parts)
        if self.is_base and not any(map(_is_changed, projections)):
            return super().forward(x)
        return torch.cat([projection(x) for projection in projections], dim=-1)


def _is_changed(projection: nn.Module) -> bool:
    if isinstance(projection, EtherLinear):
        return projection.is_changed
    return isinstance(projection, BaseTunerLayer)


def _base_weight(projection: nn.Module) -> Tensor:
    pristine = projection.pristine_weight if isinstance(projection, EtherLinear) else None
    weight: Tensor = projection.weight if pristine is None else pristine  # type: ignore[assignment]
    return weight.detach()
