from .adapters import load_ether, save_ether
from .tuner import TARGET_PRESETS, EtherConfig, EtherModel, mixed_adapters, prepared_adapters

__all__ = [
    "EtherConfig",
    "EtherModel",
    "TARGET_PRESETS",
    "load_ether",
    "mixed_adapters",
    "prepared_adapters",
    "save_ether",
]
__version__: str
