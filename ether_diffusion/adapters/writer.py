"""Writing an adapter, so that a crash at any moment leaves whole files."""

import logging
from pathlib import Path

from ether_diffusion.adapters.adapter import Adapter
from ether_diffusion.adapters.config_schema import config_bytes, parse_config
from ether_diffusion.adapters.model_card import is_ours, model_card
from ether_diffusion.adapters.reader import LORA_NAME, check_consistent
from ether_diffusion.adapters.schema import metadata_header, parse_metadata
from ether_diffusion.adapters.source import CONFIG_NAME, TENSORS_NAME
from ether_diffusion.adapters.tensor_file import parse_tensors, tensor_bytes
from ether_diffusion.durable_files import write_files
from ether_diffusion.wording import printable

CARD_NAME = "README.md"

logger = logging.getLogger(__name__)


def write_adapter(folder: str | Path, adapter: Adapter, *, card: bool = True) -> None:
    """Write adapter_config.json, adapter_model.safetensors and, with `card`, README.md into `folder`.

    The folder is made where it is missing; other files in it stay. An adapter that is there is replaced, the
    tensors last. A README.md is replaced only if it was written here and nobody edited it since.

    Raises:
        ValueError: `read_adapter` would refuse what was to be written; nothing is written then.
        NotADirectoryError: `folder` is a file.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{printable(folder)} is a file; give a folder to write the adapter into")
    files = check_writable(adapter)
    readme = folder / CARD_NAME
    if card and readme.exists() and not is_ours(readme):
        logger.info("left %s as it is: it was edited, or not written by ether-diffusion", printable(readme))
    elif card:
        text = model_card(adapter, has_lora_export=(folder / LORA_NAME).exists())
        files = {CARD_NAME: text.encode(), **files}
    folder.mkdir(parents=True, exist_ok=True)
    write_files(folder, files)


def check_writable(adapter: Adapter) -> dict[str, bytes]:
    """Return the files of an adapter, which `read_adapter` reads.

    Raises:
        ValueError: it would refuse them.
    """
    where = "the adapter to be written"
    config_file = config_bytes(adapter.config)
    config = parse_config(config_file, where)
    if config.modules_to_save:
        raise ValueError(f"{where} has modules_to_save, which is not part of the format; use save_pretrained")
    tensors_file = tensor_bytes(adapter.tensors, metadata_header(adapter.metadata))
    tensors, header = parse_tensors(tensors_file, where)
    check_consistent(config, tensors, parse_metadata(header, where), where)
    return {CONFIG_NAME: config_file, TENSORS_NAME: tensors_file}
