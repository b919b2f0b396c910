"""The commands that look into an adapter or write it in another form: one call into the library each."""

import json
from pathlib import Path

from ether_diffusion.adapters import AdapterPart, read_adapter
from ether_diffusion.adapters.convert import convert_checkpoint
from ether_diffusion.adapters.format import EXPORT_NAME, TENSORS_NAME, content_hash
from ether_diffusion.adapters.methods import settings_of, title_of
from ether_diffusion.bases import load_base
from ether_diffusion.export import (
    EXPORT_DTYPES,
    check_new_folder,
    export_lora,
    export_merged,
    lora_path,
    read_ether,
)
from ether_diffusion.scripts import command_options as told
from ether_diffusion.tuner import EtherConfig
from ether_diffusion.wording import printable


def inspect(options: told.Inspect) -> None:
    """Print what an adapter holds."""
    adapter = read_adapter(options.adapter, with_encoder=True)
    described = {
        component: _described(part, Path(options.adapter, "" if component == "unet" else component))
        for component, part in adapter.parts.items()
    }
    if adapter.encoder is not None:
        described["control"] = {
            "control_type": adapter.encoder.config.control_type,
            "scale_factor": adapter.encoder.config.scale_factor,
            "parameters": sum(parameter.numel() for parameter in adapter.encoder.parameters()),
            "sha256": content_hash(adapter.encoder.state_dict()),
        }
    if options.json_:
        print(json.dumps(described, indent=2))
        return
    for component, facts in described.items():
        print(f"{component}:")
        for name, value in facts.items():
            if isinstance(value, dict):
                pairs = ", ".join(f"{printable(key)}={printable(fact)}" for key, fact in value.items())
                shown = pairs or "none"
            else:
                shown = "unknown" if value is None else printable(value)
            print(f"  {name.replace('_', ' ')}: {shown}")


def _described(part: AdapterPart, folder: Path) -> dict[str, object]:
    metadata, config, file = part.metadata, part.config, folder / TENSORS_NAME
    form: dict[str, object] = {"method": title_of(config), "settings": settings_of(config)}
    if isinstance(config, EtherConfig):
        form = {name: getattr(config, name) for name in ("variant", "sides", "num_blocks")}
        form["num_blocks_pattern"] = dict(config.num_blocks_pattern)
    return {
        **form,
        "projections": len(part.modules()),
        "parameters": sum(tensor.numel() for tensor in part.tensors.values()),
        "sha256": content_hash(part.tensors),
        "trigger": metadata.trigger,
        "base_model": metadata.base_model,
        "base_fingerprint": None if metadata.base_fingerprint is None else metadata.base_fingerprint.id,
        "training": dict(metadata.training),
        "file_bytes": file.stat().st_size if file.is_file() else None,
    }


def export(options: told.Export) -> None:
    """Write an adapter as a LoRA file, and print its path."""
    if options.output is None and not Path(options.adapter).is_dir():
        raise ValueError(f"{options.adapter} is no folder here; say with --output where to write")
    folder, export_name = options.output or Path(options.adapter), options.export_name or EXPORT_NAME
    lora_path(folder, export_name)  # refused now rather than after the base is loaded
    path = export_lora(
        read_ether(options.adapter),
        load_base(options.base),
        folder,
        dtype=EXPORT_DTYPES[options.dtype],
        export_name=export_name,
        rebake=options.rebake,
    )
    print(path)


def merge(options: told.Merge) -> None:
    """Write a base with an adapter merged into it, and print its folder."""
    check_new_folder(options.output)  # refused now rather than after the base is loaded
    adapter, base = read_ether(options.adapter), load_base(options.base)
    print(export_merged(adapter, base, options.output, scale=options.scale, rebake=options.rebake))


def convert(options: told.Convert) -> None:
    """Write the adapter of a checkpoint of ETHER's authors, and print its folder."""
    folder = convert_checkpoint(
        options.checkpoint,
        options.output,
        architecture=options.architecture,
        side=options.side,
        base_model=options.base_model,
    )
    print(folder)
