"""The commands that look into an adapter or write it in another form: one call into the library each."""

import json
from pathlib import Path
from typing import Any

from ether_diffusion import export as exporting
from ether_diffusion.adapters import AdapterPart, read_adapter
from ether_diffusion.adapters.convert import convert_checkpoint
from ether_diffusion.adapters.format import EXPORT_NAME, TENSORS_NAME, content_hash
from ether_diffusion.adapters.methods import settings_of, title_of
from ether_diffusion.adapters.save import folder_files
from ether_diffusion.bases import load_base
from ether_diffusion.durable_files import write_folder
from ether_diffusion.mixing import Ingredient, mix_adapters
from ether_diffusion.scripts import command_options as told
from ether_diffusion.scripts import drawing
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
            shown = "unknown" if value is None else printable(value)
            if isinstance(value, dict):
                pairs = [f"{printable(key)}={printable(fact)}" for key, fact in value.items()]
                shown = ", ".join(pairs) or "none"
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
    folder, name = options.output or Path(options.adapter), options.export_name or EXPORT_NAME
    exporting.lora_path(folder, name)  # refused now rather than after the base is loaded
    adapter, dtype = exporting.read_ether(options.adapter), exporting.EXPORT_DTYPES[options.dtype]
    how: Any = {"dtype": dtype, "export_name": name, "rebake": options.rebake}
    print(exporting.export_lora(adapter, load_base(options.base), folder, **how))


def merge(options: told.Merge) -> None:
    """Write a base with an adapter merged into it, and print its folder."""
    exporting.check_new_folder(options.output)  # refused now rather than after the base is loaded
    adapter, base = exporting.read_ether(options.adapter), load_base(options.base)
    how: Any = {"scale": options.scale, "rebake": options.rebake}
    print(exporting.export_merged(adapter, base, options.output, **how))


def mix(options: told.Mix) -> None:
    """Write several adapters as one LoRA in PEFT's layout, and print its folder."""
    drawing.hush_libraries()
    exporting.check_new_folder(options.output)
    given = {each: read_adapter(each, with_encoder=None) for each in options.adapter}
    names, strengths = drawing.adapter_names(options.adapter), options.strength or (1.0,)
    if len(strengths) not in (1, len(names)):
        found = f"found {len(strengths)} strengths for {len(names)} adapters"
        raise ValueError(f"{found}; give one for each or one for all")
    strengths = strengths * (len(names) if len(strengths) == 1 else 1)
    ingredients = [*map(Ingredient, names, (given[each] for each in options.adapter), strengths)]
    base = load_base(drawing.find_base(options.base, given) if given else "tiny_world")
    write_folder(options.output, folder_files(mix_adapters(ingredients, base, rebake=options.rebake)))
    print(options.output)


def convert(options: told.Convert) -> None:
    """Write the adapter of a checkpoint of ETHER's authors, and print its folder."""
    how: Any = {"architecture": options.architecture, "side": options.side, "base_model": options.base_model}
    print(convert_checkpoint(options.checkpoint, options.output, **how))
