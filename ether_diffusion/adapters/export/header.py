"""What the header of an exported file says: kohya's entries, the model spec's, and our own under `ether.`."""

from torch import nn

from ether_diffusion.adapters.format import AdapterPart, metadata_header
from ether_diffusion.tuner import EtherConfig

NOTE = "ether.note"
"""The entry by which a file is known as an export."""


def lora_header(adapter: AdapterPart, *, rank: int, title: str, denoiser: nn.Module) -> dict[str, str]:
    """Return the entries for an adapter whose metadata names the base that the file is made on."""
    config, trigger = adapter.config, adapter.metadata.trigger
    assert isinstance(config, EtherConfig)
    entries = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(float(rank)),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": title,
        "ether.variant": config.variant,
        "ether.num_blocks": str(config.num_blocks),
        "ether.sides": str(config.sides),
        NOTE: "exact on this base only: the factors hold its weights; export again for another base",
    }
    if trigger:
        entries["modelspec.trigger_phrase"] = trigger
    return metadata_header(adapter.metadata) | entries | _family(denoiser)


def _family(denoiser: nn.Module) -> dict[str, str]:
    """Return the entries that name a Stable Diffusion family; none for a denoiser of no known one."""
    config = getattr(denoiser, "config", None)
    widths = tuple(getattr(config, "block_out_channels", ()))
    context = getattr(config, "cross_attention_dim", None)
    if widths == (320, 640, 1280) and context == 2048:
        return _entries("sdxl_base_v1-0", "stable-diffusion-xl-v1-base")
    if widths != (320, 640, 1280, 1280):
        return {}
    if context == 768:
        return _entries("sd_v1", "stable-diffusion-v1")
    if context == 1024 and getattr(config, "sample_size", None) == 96:
        return _entries("sd_v2_v", "stable-diffusion-v2-768-v")
    return _entries("sd_v2", "stable-diffusion-v2-512") if context == 1024 else {}


def _entries(version: str, architecture: str) -> dict[str, str]:
    # A1111 asks ss_v2, not the version, whether a file is of Stable Diffusion 2
    second = {"ss_v2": "True"} if version.startswith("sd_v2") else {}
    return {"ss_base_model_version": version, "modelspec.architecture": f"{architecture}/lora"} | second
