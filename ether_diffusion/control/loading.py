"""load_control and save_control: one folder holds an adapter and the encoder that was trained with it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from ether_diffusion.adapters import Adapter, AdapterMetadata, LoadReport, write_adapter
from ether_diffusion.adapters.content_hash import content_hash
from ether_diffusion.adapters.method_loading import load_any
from ether_diffusion.adapters.method_reader import AnyAdapter, read_any_from
from ether_diffusion.adapters.model_card import CONTROL_PIPELINE, encoder_card, is_ours, model_card
from ether_diffusion.adapters.parts import Pipeline, find_parts
from ether_diffusion.adapters.reader import LORA_NAME
from ether_diffusion.adapters.source import CONFIG_NAME, find_source
from ether_diffusion.adapters.tensor_file import safetensors_bytes
from ether_diffusion.adapters.writer import CARD_NAME
from ether_diffusion.control.conditioning import check_encoder
from ether_diffusion.control.encoder import ControlEncoder
from ether_diffusion.control.reader import (
    CONTROL_CONFIG_NAME,
    ENCODER_NAME,
    control_config_bytes,
    parse_control_config,
    parse_encoder,
    read_control_from,
)
from ether_diffusion.durable_files import write_files
from ether_diffusion.wording import printable


@dataclass(frozen=True)
class LoadedControl:
    """An encoder, and what `load_any` says of the adapter beside it; None for an encoder by itself."""

    encoder: ControlEncoder
    report: LoadReport | None


def load_control(
    pipeline_or_unet: Pipeline | nn.Module,
    path_or_hub_id: str | Path,
    *,
    adapter_name: str = "control",
    revision: str | None = None,
    local_files_only: bool = False,
    require_same_base: bool = False,
    activate: bool = True,
) -> LoadedControl:
    """Load an adapter and its control encoder: the adapter into the model, the encoder beside it.

    The adapter may be of any method that `load_any` reads; an encoder by itself changes nothing in the model.

    The encoder is in force inside `controlled`. Nothing is loaded unless all of it fits.

    Raises:
        FileNotFoundError: there is no such folder, model or file.
        ValueError: a file is not whole, not one of this model, or adapter and encoder are of different saves.
    """
    encoder, adapter = read_control_folder(
        path_or_hub_id, revision=revision, local_files_only=local_files_only
    )
    check_encoder(find_parts(pipeline_or_unet, None)[0].model, encoder)
    if adapter is None:
        return LoadedControl(encoder, None)
    report = load_any(
        pipeline_or_unet,
        path_or_hub_id,
        adapter_name=adapter_name,
        revision=revision,
        local_files_only=local_files_only,
        require_same_base=require_same_base,
        activate=activate,
    )
    return LoadedControl(encoder, report)


def read_control_folder(
    path_or_hub_id: str | Path, *, revision: str | None = None, local_files_only: bool = False
) -> tuple[ControlEncoder, AnyAdapter | None]:
    """Read a control encoder and the adapter that was saved with it, None where there is none.

    Raises:
        FileNotFoundError: there is no such folder, model or file.
        ValueError: a file is not whole, or adapter and encoder are of different saves.
    """
    source = find_source(path_or_hub_id, revision=revision, local_files_only=local_files_only)
    encoder, adapter_sha256 = read_control_from(source)
    place = printable(source.name, 300)
    adapter = read_any_from(source, None)
    if adapter is None and adapter_sha256 is not None:
        raise FileNotFoundError(
            f"{place} has no {CONFIG_NAME}, the adapter that its control encoder was trained with; fetch or "
            "save both again"
        )
    if adapter is not None and content_hash(adapter.tensors) != adapter_sha256:
        raise ValueError(
            f"{place} holds an adapter and a control encoder that were not saved together; fetch or save "
            "both again"
        )
    return encoder, adapter


def save_control(folder: str | Path, encoder: ControlEncoder, *, adapter: Adapter | None = None) -> None:
    """Write an encoder and the adapter that was trained with it; `load_control` reads them back.

    Raises:
        ValueError: it would be refused on reading, or without `adapter` the folder holds one; nothing is
            written then.
        NotADirectoryError: `folder` is a file.
    """
    folder = Path(folder)
    files = control_files(encoder, adapter)
    if adapter is None and (folder / CONFIG_NAME).exists():
        raise ValueError(f"{printable(folder)} holds an adapter; save the encoder with it, or elsewhere")
    if adapter is not None:
        write_adapter(folder, adapter, card=False)
    folder.mkdir(parents=True, exist_ok=True)
    readme = folder / CARD_NAME
    if not readme.exists() or is_ours(readme):
        has_lora_export = (folder / LORA_NAME).exists()
        text = (
            encoder_card(AdapterMetadata())
            if adapter is None
            else model_card(adapter, has_lora_export=has_lora_export, control=CONTROL_PIPELINE)
        )
        files = {CARD_NAME: text.encode(), **files}
    write_files(folder, files)


def control_files(
    encoder: ControlEncoder, adapter: Adapter | Mapping[str, Tensor] | None
) -> dict[str, bytes]:
    """Return the files of an encoder in float32, which name their adapter, or the one of these tensors.

    Raises:
        ValueError: they would be refused on reading.
    """
    tensors = {
        name: tensor.detach().to("cpu").float().contiguous() for name, tensor in encoder.state_dict().items()
    }
    data = safetensors_bytes(dict(sorted(tensors.items())), {"format": "pt"})
    beside = adapter.tensors if isinstance(adapter, Adapter) else adapter
    config = control_config_bytes(encoder.config, None if beside is None else content_hash(beside))
    where = "the control encoder to be written"
    parse_control_config(config, where)
    parse_encoder(data, encoder.config, where)
    return {CONTROL_CONFIG_NAME: config, ENCODER_NAME: data}
