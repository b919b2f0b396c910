"""ETHER as a method of PEFT, and full fine-tuning to compare with; importing this package registers both."""

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from ether_diffusion.tuner.config import PEFT_TYPE, TARGET_PRESETS, EtherConfig
from ether_diffusion.tuner.contexts import chosen_adapters, mixed_adapters, prepared_adapters
from ether_diffusion.tuner.full import FULL_PEFT_TYPE, FullConfig, FullLayer, FullModel
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

# peft.utils.register_peft_method insists on a member of its PeftType enum, which only PEFT itself can add to
PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = EtherConfig
PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = EtherModel
PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = EtherModel.prefix
PEFT_TYPE_TO_CONFIG_MAPPING[FULL_PEFT_TYPE] = FullConfig
PEFT_TYPE_TO_TUNER_MAPPING[FULL_PEFT_TYPE] = FullModel
PEFT_TYPE_TO_PREFIX_MAPPING[FULL_PEFT_TYPE] = FullModel.prefix
