"""ETHER adapters (Bini et al. 2024, arXiv:2405.20271) for diffusion models, as a PEFT method."""

from ether_diffusion.adapter_file import load_ether, save_ether
from ether_diffusion.tuner import TARGET_PRESETS, EtherConfig, EtherModel, mixed_adapters, prepared_adapters

__all__ = [
    "EtherConfig",
    "EtherModel",
    "TARGET_PRESETS",
    "load_ether",
    "mixed_adapters",
    "prepared_adapters",
    "save_ether",
]
__version__ = "0.1.0"
