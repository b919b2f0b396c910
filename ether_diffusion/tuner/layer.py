"""EtherLayer: what PEFT and diffusers ask of a layer that holds ETHER adapters by name."""

import math
from collections.abc import Callable

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ether_diffusion.reflections import Transform, Vectors
from ether_diffusion.tuner.config import EtherConfig
from ether_diffusion.tuner.hooked import device_of, is_hooked


class VectorDict(nn.ParameterDict):
    """Parameters by adapter name that follow their module's device but never lose precision.

    `unet.to(torch.bfloat16)` moves the base; an adapter in bfloat16 could not take AdamW's small steps.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "VectorDict":
        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if torch.finfo(moved.dtype).bits >= torch.finfo(tensor.dtype).bits:
                return moved
            return moved.to(tensor.dtype) if tensor.is_meta else tensor.to(moved.device)

        super()._apply(keep_precision, recurse)  # type: ignore[no-untyped-call]
        return self

    def forward(self, adapter_name: str) -> Tensor:
        """Return an adapter's parameter, so that it outlasts a call that brings it and takes it away."""
        parameter: Tensor = self[adapter_name]
        return parameter.view_as(parameter)

    def take(self, adapter_name: str) -> Tensor:
        """Return an adapter's parameter, as the hooks on this module present it."""
        # torch's ParameterDict forbids the call, but accelerate and diffusers hang their hooks around it
        parameter: Tensor = nn.Module.__call__(self, adapter_name) if is_hooked(self) else self[adapter_name]
        return parameter


class EtherLayer(BaseTunerLayer):
    """Adapters by name: their vectors, their scales, and which of them are in force."""

    adapter_layer_names = (
        "ether_input_u",
        "ether_input_v",
        "ether_output_u",
        "ether_output_v",
    )
    other_param_names = ("r", "scales", "dropout")
    cast_input_dtype_enabled = True
    """PEFT and diffusers switch this; nothing is cast here, as rows are made in the dtype of W."""

    ether_input_u: VectorDict
    ether_input_v: VectorDict
    ether_output_u: VectorDict
    ether_output_v: VectorDict
    in_features: int
    out_features: int
    r: dict[str, int]
    """Blocks per side by adapter; the name is the one diffusers looks for."""
    scales: dict[str, list[float]]
    """By adapter: what `set_scale` set, then what each open `scale_layer` multiplies it by."""
    dropout: dict[str, float]

    def _init_adapters(self, base_layer: nn.Linear) -> None:
        self.base_layer = base_layer
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        for name in self.adapter_layer_names:
            setattr(self, name, VectorDict())
        self.r, self.scales, self.dropout = {}, {}, {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    def update_layer(self, adapter_name: str, config: EtherConfig, num_blocks: int) -> None:
        """Add an adapter with `num_blocks` blocks a side, initialised as `config` says."""
        self.r[adapter_name] = num_blocks
        self.scales[adapter_name] = [1.0]
        self.dropout[adapter_name] = config.dropout
        if config.has_input_side:
            u, v = _initial_vectors(config, num_blocks, self.in_features)
            self._add(adapter_name, self.ether_input_u, u, self.ether_input_v, v)
        if config.has_output_side:
            u, v = _initial_vectors(config, num_blocks, self.out_features)
            self._add(adapter_name, self.ether_output_u, u, self.ether_output_v, v)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @staticmethod
    def _add(name: str, us: VectorDict, u: Tensor, vs: VectorDict, v: Tensor | None) -> None:
        us[name] = nn.Parameter(u)
        if v is not None:
            vs[name] = nn.Parameter(v)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """Move an adapter to its base's device; unlike PEFT's own, in float32 whatever the base's dtype."""
        device = device or device_of(self.base_linear)
        for layer_name in self.adapter_layer_names:
            vectors = getattr(self, layer_name)
            if adapter_name in vectors and not vectors[adapter_name].is_meta:
                vectors[adapter_name] = vectors[adapter_name].to(device)

    @property
    def base_linear(self) -> nn.Linear:
        """The frozen Linear underneath."""
        base: nn.Linear = self.base_layer  # EtherModel wraps nothing else
        return base

    def vectors(self, adapter_name: str) -> Transform:
        """Return an adapter's raw vectors."""

        def side(us: VectorDict, vs: VectorDict) -> Vectors | None:
            if adapter_name not in us:
                return None
            return Vectors(us.take(adapter_name), vs.take(adapter_name) if adapter_name in vs else None)

        return Transform(
            side(self.ether_input_u, self.ether_input_v),
            side(self.ether_output_u, self.ether_output_v),
        )

    def active_scales(self) -> dict[str, float]:
        """Return the scale of every adapter in force here, without those at 0."""
        active = {}
        for name in self.active_adapters:
            if name in self.scales:
                scale = math.prod(self.scales[name])
                if scale != 0:
                    active[name] = scale
        return active

    def scale(self, adapter: str) -> float:
        """Return the scale s an adapter has now: W + s (W' - W)."""
        return math.prod(self.scales[adapter])

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the scale of an adapter, as diffusers' `set_adapters(names, weights)` does.

        Raises:
            ValueError: the scale is not finite.
        """
        _check_finite(scale)
        if adapter in self.r:
            # diffusers ends a scale_layer(0) by set_scale(1.0); the scale set before must survive that
            ends_zero = scale == 1.0 and 0.0 in self.scales[adapter][1:]
            self.scales[adapter] = [self.scales[adapter][0] if ends_zero else float(scale)]

    def scale_layer(self, scale: float) -> None:
        """Multiply the scales of the active adapters until `unscale_layer`.

        Raises:
            ValueError: the scale is not finite.
        """
        _check_finite(scale)
        for name in self.active_adapters:
            if name in self.scales:
                self.scales[name].append(float(scale))

    def unscale_layer(self, scale: float | None = None) -> None:
        """Take back the last `scale_layer(scale)`, exactly; with None, every one."""
        for name in self.active_adapters:
            pushed = self.scales.get(name, [1.0])
            if scale is None:
                del pushed[1:]
            elif scale in pushed[1:]:
                del pushed[len(pushed) - 1 - pushed[::-1].index(scale)]

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Return True: W' - W is low-rank; `export` writes it exactly, PEFT's own converter by SVD."""
        return True


def _initial_vectors(config: EtherConfig, num_blocks: int, width: int) -> tuple[Tensor, Tensor | None]:
    def kaiming() -> Tensor:
        # a = √5 on (num_blocks, width / num_blocks): the paper's learning rates depend on this norm
        return nn.init.kaiming_uniform_(torch.empty(num_blocks, width // num_blocks), a=math.sqrt(5))

    u = kaiming()
    if config.variant == "ether":
        return u, None
    return u, -u.clone() if config.init_weights else kaiming()


def _check_finite(scale: float) -> None:
    if not math.isfinite(scale):
        raise ValueError(f"an adapter's scale must be a finite number; found {scale}")
