"""The one reader and writer of adapters: format, metadata, the base's fingerprint, caps on hostile files."""

from ether_diffusion.adapter_file.adapter import FORMAT_VERSION, Adapter, AdapterMetadata
from ether_diffusion.adapter_file.attach import detach_adapter
from ether_diffusion.adapter_file.fingerprint import BaseFingerprint, BaseMatch, fingerprint
from ether_diffusion.adapter_file.loading import LoadReport, load_ether, save_ether
from ether_diffusion.adapter_file.models import base_fingerprint
from ether_diffusion.adapter_file.parts import Pipeline
from ether_diffusion.adapter_file.reader import read_adapter
from ether_diffusion.adapter_file.writer import write_adapter

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
