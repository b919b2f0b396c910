"""ETHER adapters (Bini et al. 2024, arXiv:2405.20271) for diffusion models, as a PEFT method."""

from ether_diffusion.tuner import TARGET_PRESETS, EtherConfig, EtherModel, mixed_adapters, prepared_adapters

__all__ = ["EtherConfig", "EtherModel", "TARGET_PRESETS", "mixed_adapters", "prepared_adapters"]
__version__ = "0.1.0"
