"""What a pipeline does otherwise for adapters that are not of ETHER: LoRA, OFT, BOFT, HRA and DeLoRA."""

from collections.abc import Sequence

from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer

from ether_diffusion.adapters.load import put_in_force, remove_adapter
from ether_diffusion.adapters.models import Pipeline
from ether_diffusion.pipelines.in_use import of_other_methods
from ether_diffusion.tuner.other_layers import other_layers
from ether_diffusion.wording import listed


def set_others(pipeline: Pipeline, names: Sequence[str], weights: Sequence[float]) -> bool:
    """Activate adapters by name that diffusers cannot weigh, and say whether they are such.

    Raises:
        ValueError: one of them is to have a strength other than 1.
    """
    others = of_other_methods(pipeline)
    layers = _layers(pipeline, [name for name in names if name in others])
    if all(isinstance(layer, LoraLayer) for layer in layers):
        return False  # diffusers weighs these, as it does ETHER's
    strange = [name for name in names if name not in others]
    if strange:
        raise ValueError(
            f"{listed(strange)} is of another method than the rest, or unknown; set one at a time"
        )
    if any(weight != 1 for weight in weights):
        raise ValueError(
            f"{listed(names)} has no strength that could be set for all calls; leave the weights out, or "
            f"choose for a call with adapters={{{names[0]!r}: 1.0}}, or {{}} for the base"
        )
    for layer in layers:
        put_in_force(layer, names)
    return True


def check_scale(pipeline: Pipeline, scale: float) -> None:
    """Check that the scale of a call reaches every adapter.

    Raises:
        ValueError: one is of a method that diffusers cannot scale.
    """
    others = list(of_other_methods(pipeline))
    if scale != 1.0 and not all(isinstance(layer, LoraLayer) for layer in _layers(pipeline, others)):
        raise ValueError(
            f"cross_attention_kwargs' scale does not reach {listed(others)}; leave it out, or choose a "
            "strength with adapters="
        )


def check_fusible(pipeline: Pipeline, names: Sequence[str]) -> None:
    """Check that adapters can be merged into the weights and these be put back, bit for bit.

    Raises:
        ValueError: one is not of ETHER, and PEFT would subtract what it added.
    """
    others = [name for name in names if name in of_other_methods(pipeline)]
    if others:
        raise ValueError(
            f"{listed(others)} is not of ETHER, and the base's weights would not come back bit for bit; draw "
            "with it as it is"
        )


def remove_others(pipeline: Pipeline, names: Sequence[str]) -> None:
    """Take those adapters of these names that are not of ETHER out of a pipeline."""
    for name, parts in of_other_methods(pipeline).items():
        if name in names:
            for part in parts:
                remove_adapter(part.model, [name])


def _layers(pipeline: Pipeline, names: Sequence[str]) -> list[BaseTunerLayer]:
    others = of_other_methods(pipeline)
    models = {id(part.model): part.model for name in names for part in others[name]}
    return [layer for model in models.values() for layer in other_layers(model)]
