"""Which base model is adapted."""

from dataclasses import dataclass

from ether_diffusion.options import option
from ether_diffusion.training.config.section import Section


@dataclass(frozen=True)
class BaseConfig(Section):
    """The frozen model that an adapter is trained for."""

    pretrained_model_name_or_path: str = option(
        "tiny_world", 'Folder or hub id of a Stable Diffusion pipeline, or "tiny_world", which is built in.'
    )
    revision: str | None = option(None, "Branch, tag or commit of the base and its tokenizer on the hub.")
    variant: str | None = option(None, "Variant of the base's files, e.g. fp16.")
    pretrained_vae_model_name_or_path: str | None = option(
        None, "Folder or hub id of another VAE, e.g. one that holds in float16 for SDXL."
    )
    tokenizer_name: str | None = option(None, "Folder or hub id of another tokenizer than the base's own.")
    local_files_only: bool = option(False, "Never ask the hub: use only files that are here.")
