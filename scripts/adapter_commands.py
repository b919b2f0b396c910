"""The commands that take an adapter: parse, then one call into the library."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ether_diffusion.adapters import AdapterPart
    from ether_diffusion.control import ControlEncoder

# The library is imported inside the commands: `ether --help` must not wait for torch.


def add_adapter_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add inspect, export, merge and convert to the commands of `ether`."""
    _add_inspect(commands)
    _add_export(commands)
    _add_merge(commands)
    _add_convert(commands)


def _add_inspect(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("inspect", help="say what an adapter holds; loads no model")
    parser.add_argument("adapter", help="folder or hub id of an adapter")
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")
    parser.set_defaults(run=_inspect)


def _add_export(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("export", help="write an adapter as a LoRA file, exactly, for other tools")
    _add_adapter_and_base(parser)
    parser.add_argument("--output", type=Path, help="folder to write into (default: the adapter's own)")
    parser.add_argument(
        "--dtype", choices=("float16", "float32"), default="float16", help="numbers in the file (float16)"
    )
    parser.add_argument(
        "--export_name", help="file name (pytorch_lora_weights.safetensors, which diffusers finds by itself)"
    )
    parser.set_defaults(run=_export)


def _add_merge(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("merge", help="write a whole model with the adapter merged into its weights")
    _add_adapter_and_base(parser)
    parser.add_argument("--output", type=Path, required=True, help="new folder for the model")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="strength: 1 as trained (default), 0 the base"
    )
    parser.set_defaults(run=_merge)


def _add_convert(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "convert", help="turn a language-model checkpoint of ETHER's authors into an adapter"
    )
    parser.add_argument("checkpoint", type=Path, help="lit_model_ether_finetuned.pth of their training")
    parser.add_argument("--output", type=Path, required=True, help="new folder for the adapter")
    parser.add_argument(
        "--architecture",
        choices=("llama", "phi"),
        required=True,
        help="whose module names to use; llama also for Mistral and Gemma",
    )
    parser.add_argument("--side", choices=("input", "output"), help="take the projections of one side only")
    parser.add_argument("--base_model", help="folder or hub id of the base, to be noted in the adapter")
    parser.set_defaults(run=_convert)


def _add_adapter_and_base(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", help="folder or hub id of an adapter")
    parser.add_argument("--base", required=True, help="folder or hub id of the base model, or tiny_world")
    parser.add_argument(
        "--rebake", action="store_true", help="apply the reflections to other weights than those trained on"
    )


def _inspect(arguments: argparse.Namespace) -> None:
    from ether_diffusion.adapters import read_adapter

    adapter = read_adapter(arguments.adapter, with_encoder=True)
    described = {
        component: _described(part, Path(arguments.adapter, "" if component == "unet" else component))
        for component, part in adapter.parts.items()
    }
    if adapter.encoder is not None:
        described["control"] = _encoder_facts(adapter.encoder)
    if arguments.json:
        print(json.dumps(described, indent=2))
        return
    for component, facts in described.items():
        print(f"{component}:")
        for name, value in facts.items():
            print(f"  {name.replace('_', ' ')}: {_shown(value)}")


def _described(part: "AdapterPart", folder: Path) -> dict[str, object]:
    from ether_diffusion.adapters.format import TENSORS_NAME, content_hash
    from ether_diffusion.adapters.methods import settings_of, title_of
    from ether_diffusion.tuner import EtherConfig

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


def _encoder_facts(encoder: "ControlEncoder") -> dict[str, object]:
    from ether_diffusion.adapters.format import content_hash

    return {
        "control_type": encoder.config.control_type,
        "scale_factor": encoder.config.scale_factor,
        "parameters": sum(parameter.numel() for parameter in encoder.parameters()),
        "sha256": content_hash(encoder.state_dict()),
    }


def _shown(value: object) -> str:
    from ether_diffusion.wording import printable

    if isinstance(value, dict):
        return ", ".join(f"{printable(key)}={printable(fact)}" for key, fact in value.items()) or "none"
    return "unknown" if value is None else printable(value)


def _export(arguments: argparse.Namespace) -> None:
    from ether_diffusion.adapters.format import EXPORT_NAME
    from ether_diffusion.bases import load_base
    from ether_diffusion.export import EXPORT_DTYPES, export_lora, lora_path, read_ether

    if arguments.output is None and not Path(arguments.adapter).is_dir():
        raise ValueError(f"{arguments.adapter} is no folder here; say with --output where to write")
    folder = arguments.output or Path(arguments.adapter)
    export_name = arguments.export_name or EXPORT_NAME
    lora_path(folder, export_name)  # refused now rather than after the base is loaded
    adapters = read_ether(arguments.adapter)
    path = export_lora(
        adapters,
        load_base(arguments.base),
        folder,
        dtype=EXPORT_DTYPES[arguments.dtype],
        export_name=export_name,
        rebake=arguments.rebake,
    )
    print(path)


def _merge(arguments: argparse.Namespace) -> None:
    from ether_diffusion.bases import load_base
    from ether_diffusion.export import check_new_folder, export_merged, read_ether

    check_new_folder(arguments.output)  # refused now rather than after the base is loaded
    adapters = read_ether(arguments.adapter)
    base = load_base(arguments.base)
    print(export_merged(adapters, base, arguments.output, scale=arguments.scale, rebake=arguments.rebake))


def _convert(arguments: argparse.Namespace) -> None:
    from ether_diffusion.adapters.convert import convert_checkpoint

    folder = convert_checkpoint(
        arguments.checkpoint,
        arguments.output,
        architecture=arguments.architecture,
        side=arguments.side,
        base_model=arguments.base_model,
    )
    print(folder)
