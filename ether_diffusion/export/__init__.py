"""Exact export of ETHER adapters: LoRA files and merged models, for tools that have never heard of ETHER."""

from ether_diffusion.export.factors import read_ether
from ether_diffusion.export.lora_file import EXPORT_DTYPES, export_lora, lora_path
from ether_diffusion.export.merged import check_new_folder, export_merged

__all__ = [
    "EXPORT_DTYPES",
    "check_new_folder",
    "export_lora",
    "export_merged",
    "lora_path",
    "read_ether",
]
