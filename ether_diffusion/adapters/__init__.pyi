from .adapter import FORMAT_VERSION, Adapter, AdapterMetadata
from .attach import detach_adapter
from .fingerprint import BaseFingerprint, BaseMatch, fingerprint
from .loading import LoadReport, load_ether, save_ether
from .models import base_fingerprint
from .parts import Pipeline
from .reader import read_adapter
from .writer import write_adapter

__all__ = [
    "Adapter",
    "AdapterMetadata",
    "BaseFingerprint",
    "BaseMatch",
    "FORMAT_VERSION",
    "LoadReport",
    "Pipeline",
    "base_fingerprint",
    "detach_adapter",
    "fingerprint",
    "load_ether",
    "read_adapter",
    "save_ether",
    "write_adapter",
]
