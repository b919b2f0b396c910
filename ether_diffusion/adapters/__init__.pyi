from .format import (
    FORMAT_VERSION,
    Adapter,
    AdapterMetadata,
    AdapterPart,
    BaseFingerprint,
    BaseMatch,
    fingerprint,
)
from .load import LoadReport, attach, load_any, load_ether
from .models import Pipeline, base_fingerprint
from .read import read_adapter
from .save import detach_adapter, save_ether, write_adapter

__all__ = [
    "Adapter",
    "AdapterMetadata",
    "AdapterPart",
    "BaseFingerprint",
    "BaseMatch",
    "FORMAT_VERSION",
    "LoadReport",
    "Pipeline",
    "attach",
    "base_fingerprint",
    "detach_adapter",
    "fingerprint",
    "load_any",
    "load_ether",
    "read_adapter",
    "save_ether",
    "write_adapter",
]
