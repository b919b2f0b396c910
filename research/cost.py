"""What methods cost on Stable Diffusion 1.5: parameters and file sizes by counting, no weights needed."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from peft import PeftConfig, get_peft_model_state_dict, inject_adapter_in_model

from ether_diffusion.adapters.tensor_file import PEFT_PREFIX, safetensors_bytes
from ether_diffusion.metrics.plots import new_figure, png_of

PANELS = {
    "parameters": "trained parameters",
    "file_bytes": "file, bytes",
    "step_over_frozen": "step ÷ frozen step",
    "peak_mib_over_frozen": "peak over the frozen step, MiB",
}
LOGARITHMIC = ("parameters", "file_bytes", "peak_mib_over_frozen")
NAME = "default"


def count_parameters(config: PeftConfig) -> Mapping[str, int]:
    """Return trained parameters of SD 1.5's UNet under a method, and bytes of their file in float32."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768, attention_head_dim=8
        ).requires_grad_(False)
        inject_adapter_in_model(config, unet, NAME)
    stored = get_peft_model_state_dict(unet, adapter_name=NAME)
    tensors = {f"{PEFT_PREFIX}{name}": torch.zeros(tensor.shape) for name, tensor in stored.items()}
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    return {
        "parameters": sum(parameter.numel() for parameter in trained),
        "file_bytes": len(safetensors_bytes(tensors, {"format": "pt"})),
    }


def draw_costs(methods: Mapping[str, Mapping[str, Any]]) -> bytes:
    """Return a PNG: a panel of bars for every cost that was measured.

    Raises:
        ValueError: matplotlib is not installed.
    """
    shown = [name for name in PANELS if any(name in costs for costs in methods.values())]
    figure = new_figure(1.4 + 3.4 * len(shown), 1.3 + 0.4 * len(methods))
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, shown, strict=True):
        there = {method: _middle(costs[name]) for method, costs in methods.items() if name in costs}
        bars = axes.barh(list(there), list(there.values()), color="#5b8ff9")
        axes.bar_label(bars, [_short(value) for value in there.values()], padding=3)
        if name in LOGARITHMIC:
            axes.set_xscale("log")
        axes.margins(x=0.25)
        axes.set_title(PANELS[name])
    panels[0].invert_yaxis()
    return png_of(figure)


def _middle(cost: Any) -> float:
    return float(cost["median"] if isinstance(cost, Mapping) else cost)


def _short(value: float) -> str:
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"
