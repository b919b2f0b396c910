"""Full fine-tuning as a method of PEFT: every weight of a model, as its difference from the frozen base.

What DreamBooth (Ruiz et al. 2023) does to a whole UNet, in the form of an adapter, so that it is trained,
switched off, stored, resumed and loaded as every other method, and compared with them on equal terms.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from ether_diffusion.tuner.config import peft_type
from ether_diffusion.tuner.layer import VectorDict

FULL_PEFT_TYPE = peft_type("FULL")
_OWN = ("weight", "bias")


@dataclass
class FullConfig(PeftConfig):
    """Configuration of full fine-tuning: all modules unless target_modules says which."""

    target_modules: list[str] | set[str] | str | None = field(
        default=".*", metadata={"help": "Names or a regex of the modules to train; all of them by default."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = FULL_PEFT_TYPE
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)


class FullLayer(BaseTunerLayer):
    """Differences by adapter name, D of the weight and of the bias, and which of them are in force."""

    adapter_layer_names = ("full_weight", "full_bias")
    other_param_names: tuple[str, ...] = ()
    cast_input_dtype_enabled = True  # PEFT and diffusers switch this; nothing is cast here

    base_layer: nn.Module
    full_weight: VectorDict
    full_bias: VectorDict
    merged_adapters: list[str]
    pristine: dict[str, Tensor]
    """The base's own weights while adapters are merged into them."""

    def update_layer(self, adapter_name: str, *, inference_mode: bool = False) -> None:
        """Add an adapter that changes nothing yet."""
        for name, own in self.own().items():
            self._differences(name)[adapter_name] = nn.Parameter(torch.zeros_like(own, dtype=torch.float32))
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def adapters_in_force(self) -> list[str]:
        """Return the active adapters that this layer has, or none where they are switched off or merged."""
        if self._disable_adapters or self.merged:
            return []
        return [name for name in self.active_adapters if name in self.full_weight]

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write W' into the layer; a copy of W is kept for `unmerge`.

        Raises:
            ValueError: with safe_merge, a weight would not be finite; the layer is as before.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.full_weight]
        if not names:
            return
        changed = self.changed(names)
        if safe_merge and not all(bool(tensor.isfinite().all()) for tensor in changed.values()):
            raise ValueError(f"adapter {names[0]!r} has differences that are not finite; it is not merged")
        if not self.merged:
            self.pristine = {name: own.detach().clone() for name, own in self.own().items()}
        for name, own in self.own().items():
            own.copy_(changed[name])
        self.merged_adapters += names

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put W back, bit for bit."""
        for name, pristine in self.pristine.items():
            self.own()[name].copy_(pristine)
        self.pristine = {}
        self.merged_adapters = []

    def own(self) -> dict[str, nn.Parameter]:
        """Return the base's weight, and its bias if it has one."""
        return dict(self.base_layer.named_parameters(recurse=False))

    def changed(self, adapters: list[str]) -> dict[str, Tensor]:
        """Return W' = W + Σ D, summed in float32, in the base's dtype."""
        totals = {}
        for name, own in self.own().items():
            total = own.float()
            for adapter in adapters:
                total = total + self._differences(name)[adapter]
            totals[name] = total.to(own.dtype)
        return totals

    def _differences(self, name: str) -> VectorDict:
        return self.full_weight if name == "weight" else self.full_bias


class FullModule(nn.Module, FullLayer):
    """A layer of any kind with W' in place of W.

    D is float32 whatever the base's dtype: half a precision could not take AdamW's small steps.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.full_weight, self.full_bias = VectorDict(), VectorDict()
        self.pristine = {}
        self._disable_adapters = False
        self.merged_adapters = []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Return what the layer makes of its inputs."""
        if self._disable_adapters and self.merged:
            self.unmerge()
        names = self.adapters_in_force()
        if not names:
            return self.base_layer(*inputs, **named)
        return torch.func.functional_call(self.base_layer, self.changed(names), inputs, named)


class FullModel(BaseTuner):
    """Attaches a difference to every layer that has weights of its own."""

    prefix = "full_"
    tuner_layer_cls = FullLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def _prepare_model(self, peft_config: FullConfig, model: nn.Module) -> None:
        """Check every layer before the first is replaced, so that a refusal leaves the model as it was."""
        for name, module in model.named_modules():
            other = [own for own, _ in module.named_parameters(recurse=False) if own not in _OWN]
            is_ours = name.rpartition(".")[2] in FullLayer.adapter_layer_names
            if other and not is_ours:
                raise ValueError(
                    f"{name or 'the model'} has a parameter {other[0]}; full fine-tuning knows layers with "
                    "weight and bias"
                )

    def _create_and_replace(
        self,
        peft_config: FullConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        if isinstance(target, FullLayer):
            target.update_layer(adapter_name, inference_mode=peft_config.inference_mode)
        elif isinstance(target, BaseTunerLayer):
            raise ValueError(f"{current_key} already carries an adapter of another method; unload it first")
        elif any(True for _ in target.parameters(recurse=False)):
            layer = FullModule(target, adapter_name)
            layer.train(target.training)
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)
