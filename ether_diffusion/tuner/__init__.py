"""ETHER as a method of PEFT, and full fine-tuning to compare with; importing this package registers both."""

from peft.utils import register_peft_method

from ether_diffusion.tuner.config import TARGET_PRESETS, EtherConfig
from ether_diffusion.tuner.contexts import chosen_adapters, mixed_adapters, prepared_adapters
from ether_diffusion.tuner.full import FullConfig, FullLayer, FullModel
from ether_diffusion.tuner.layer import EtherLayer
from ether_diffusion.tuner.linear import EtherLinear
from ether_diffusion.tuner.model import EtherModel

__all__ = [
    "EtherConfig",
    "EtherLayer",
    "EtherLinear",
    "EtherModel",
    "FullConfig",
    "FullLayer",
    "FullModel",
    "TARGET_PRESETS",
    "chosen_adapters",
    "mixed_adapters",
    "prepared_adapters",
]

register_peft_method(name="ether", config_cls=EtherConfig, model_cls=EtherModel)
register_peft_method(name="full", config_cls=FullConfig, model_cls=FullModel)
