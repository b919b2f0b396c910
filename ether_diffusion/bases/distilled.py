"""Bases that were distilled to few steps: what to train on in their place."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ether_diffusion.bases.files import read_config

_SDXL, _SD15 = "stabilityai/stable-diffusion-xl-base-1.0", "stable-diffusion-v1-5/stable-diffusion-v1-5"
_NAMES = {
    r"sdxl[-_]?turbo|sdxl[-_]?(lightning|flash)|lcm[-_]sdxl|hyper[-_]?sdxl|dmd2|dreamshaper-xl.*turbo": _SDXL,
    r"sd[-_]?turbo": "stabilityai/stable-diffusion-2-1",
    r"lcm|hyper[-_]?sd(15|1\.5)?$|instaflow": _SD15,
    r"stable-diffusion-3\.5-large-turbo": "stabilityai/stable-diffusion-3.5-large",
    r"flux\.?1[-_]schnell": "black-forest-labs/FLUX.1-dev",
    r"flux\.?2[-_]klein[-_](?!base)4b": "black-forest-labs/FLUX.2-klein-base-4B",
    r"flux\.?2[-_]klein[-_](?!base)9b": "black-forest-labs/FLUX.2-klein-base-9B",
    r"z[-_]?image[-_]turbo": "Tongyi-MAI/Z-Image",
    r"qwen[-_]?image[-_](lightning|distill)": "Qwen/Qwen-Image",
    r"sana[-_]?sprint": "Efficient-Large-Model/Sana_1600M_1024px_diffusers",
    r"chroma.*flash": "lodestones/Chroma1-HD",
}
"""By patterns of a name's last part: the base that was distilled."""


def distilled_from(name: str, folder: Path | None = None) -> str | None:
    """Return the base to train on in the place of a distilled one, by its name or its configs, else None.

    What a few steps were distilled into is undone by training on it: pictures blur, or fall back to many
    steps.
    """
    last = name.rstrip("/").rpartition("/")[2].lower()
    for pattern, instead in _NAMES.items():
        if re.search(pattern, last):
            return instead
    if folder is None or not (folder / "model_index.json").is_file():
        return None
    return _by_configs(folder, read_config(folder, "model_index.json"))


def _by_configs(folder: Path, index: Mapping[str, Any]) -> str | None:
    kind = index.get("_class_name")
    part = "unet" if "unet" in index else "transformer"
    config = read_config(folder, f"{part}/config.json") if (folder / part / "config.json").is_file() else {}
    if index.get("is_distilled") is True:
        return f"black-forest-labs/FLUX.2-klein-base-{'9B' if config.get('num_layers', 5) > 5 else '4B'}"
    if kind == "FluxPipeline" and config.get("guidance_embeds") is False:
        return "black-forest-labs/FLUX.1-dev"
    if kind == "SanaSprintPipeline":
        return "Efficient-Large-Model/Sana_1600M_1024px_diffusers"
    if config.get("time_cond_proj_dim") is not None:  # the guidance scale that LCM's UNets are told
        return _SDXL if "XL" in str(kind) else _SD15
    return None


def distilled_doubt(name: str, folder: Path | None = None) -> str | None:
    """Say in one sentence why a base is not one to train on, and which is."""
    instead = distilled_from(name, folder)
    if instead is None:
        return None
    return f"{name} was distilled to draw in a few steps, which training undoes; train on {instead}"
