"""Reading adapters of the methods beside ETHER, as strictly: all that can be checked without a model."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ether_diffusion.adapters import tensor_file
from ether_diffusion.adapters.adapter import Adapter, AdapterMetadata
from ether_diffusion.adapters.config_schema import MAX_CONFIG_BYTES
from ether_diffusion.adapters.methods import Method, MethodConfig, Shape, parse_method_config
from ether_diffusion.adapters.reader import read_from, refuse_missing
from ether_diffusion.adapters.schema import parse_metadata
from ether_diffusion.adapters.source import CONFIG_NAME, TENSORS_NAME, Source, find_source
from ether_diffusion.adapters.tensor_file import PEFT_PREFIX, parse_exact_tensors, parse_layout
from ether_diffusion.wording import listed, printable

PARTS = (None, "text_encoder", "text_encoder_2")
"""The subfolders that adapters lie in: the denoiser's in the folder itself."""
_MODULE = re.compile(r"[A-Za-z0-9_]{1,64}(?:\.[A-Za-z0-9_]{1,64}){0,31}")


@dataclass(frozen=True)
class MethodAdapter:
    """An adapter of a method beside ETHER: tensors are named as in the model, `….to_q.lora_A.weight`."""

    config: MethodConfig
    tensors: dict[str, Tensor]
    metadata: AdapterMetadata

    @property
    def method(self) -> Method:
        """What its configuration and its tensors may be."""
        return self.config.method

    def modules(self) -> dict[str, dict[str, Shape]]:
        """Return the shapes of each adapted module's tensors, by sorted name."""
        shapes = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}
        return dict(sorted(_by_module(shapes, self.method)[0].items()))


AnyAdapter = Adapter | MethodAdapter


def read_any(
    path_or_hub_id: str | Path, *, revision: str | None = None, local_files_only: bool = False
) -> dict[str, AnyAdapter]:
    """Return the adapters of a folder or a model of the Hub by component, of ETHER or another method.

    Raises:
        FileNotFoundError: there is no such folder, model or file.
        ValueError: a file is not a whole, finite adapter of a method that is read.
    """
    source = find_source(path_or_hub_id, revision=revision, local_files_only=local_files_only)
    found = {part or "unet": one for part in PARTS if (one := read_any_from(source, part)) is not None}
    if not found:
        refuse_missing(source, None, CONFIG_NAME)
    return found


def read_any_from(source: Source, subfolder: str | None) -> AnyAdapter | None:
    """Read the adapter in a subfolder of a source; None where there is no adapter_config.json.

    Raises:
        FileNotFoundError, ValueError: as `read_any`.
    """
    data = source.read(subfolder, CONFIG_NAME, MAX_CONFIG_BYTES)
    if data is None:
        return None
    place = printable("/".join(filter(None, (source.name, subfolder))), 300)
    config = parse_method_config(data, f"{place}/{CONFIG_NAME}")
    if config is None:
        return read_from(source, subfolder)
    tensors_data = source.read(subfolder, TENSORS_NAME, tensor_file.MAX_FILE_BYTES)
    if tensors_data is None:
        refuse_missing(source, subfolder, TENSORS_NAME)
    return parse_method_adapter(config, tensors_data, f"{place}/{TENSORS_NAME}")


def parse_method_adapter(config: MethodConfig, data: bytes, where: str) -> MethodAdapter:
    """Return the adapter of a configuration whose file has these bytes.

    Raises:
        ValueError: it is no whole, finite safetensors file of just what the configuration speaks of.
    """
    shapes, header = parse_layout(data, where)
    prefixed = [name for name in shapes if name.startswith(PEFT_PREFIX)]
    if len(prefixed) not in (0, len(shapes)):
        raise ValueError(
            f"{where} holds tensors both with and without the prefix {PEFT_PREFIX}; keep one set"
        )
    plain = {name.removeprefix(PEFT_PREFIX): shape for name, shape in shapes.items()}
    _check_modules(config, plain, where)
    loaded = parse_exact_tensors(data, where, shapes)
    tensors = {name.removeprefix(PEFT_PREFIX): loaded[name] for name in sorted(loaded)}
    _check_directions(tensors, where)
    metadata = parse_metadata(header, where)
    if metadata.base_model is None:
        metadata = replace(metadata, base_model=config.base_model)
    if metadata.trigger is None:
        metadata = replace(metadata, trigger=header.get("trigger"))
    return MethodAdapter(config, tensors, metadata)


def _by_module(shapes: Mapping[str, Shape], method: Method) -> tuple[dict[str, dict[str, Shape]], list[str]]:
    """Return the shapes of tensors by module and by name after it, and the names of those that are others."""
    modules: dict[str, dict[str, Shape]] = {}
    strange = []
    for name, shape in shapes.items():
        end = next((end for end in method.tensor_names() if name.endswith(f".{end}")), None)
        module = name if end is None else name.removesuffix(f".{end}")
        if end is None or not _MODULE.fullmatch(module):
            strange.append(name)
        else:
            modules.setdefault(module, {})[end] = shape
    return modules, strange


def _check_modules(config: MethodConfig, shapes: Mapping[str, Shape], where: str) -> None:
    method = config.method
    modules, strange = _by_module(shapes, method)
    if strange:
        raise ValueError(
            f"{where} holds tensors that are not those of {method.title} ({listed(strange)}); save the "
            "adapter again, without other weights"
        )
    if not modules:
        raise ValueError(f"{where} holds no tensors; save the adapter again")
    missing = [
        f"{m}.{end}" for m, found in modules.items() for end in method.tensor_names() if end not in found
    ]
    if missing:
        raise ValueError(f"{where} lacks {listed(missing)}; fetch or save it again")
    targets = set(config.targets)
    untargeted = [module for module in modules if not is_target(module, targets)]
    if untargeted:
        raise ValueError(
            f"{where} holds tensors of {listed(untargeted)}, which the configuration does not target; the "
            "two files do not belong together"
        )
    for module, found in modules.items():
        _check_shapes(config, module, found, where)


def _check_shapes(config: MethodConfig, module: str, found: Mapping[str, Shape], where: str) -> None:
    """Check that there are widths of a Linear for which the configuration gives these shapes."""
    method = config.method
    dimensions = {end: len(shape) for end, shape in method.shapes(config.settings, 1, 1).items()}
    fits = all(len(shape) == dimensions[end] and min(shape) >= 1 for end, shape in found.items())
    if fits:
        needed = method.shapes(config.settings, *method.widths(found))
        fits = needed == found
    if not fits:
        shown = ", ".join(f"{end} {shape}" for end, shape in sorted(found.items()))
        settings = ", ".join(f"{name}={value}" for name, value in config.settings.items())
        raise ValueError(
            f"{where}: {module} has {printable(shown, 200)}, which no {method.title} of "
            f"{printable(settings, 200)} has; the two files do not belong together"
        )


def is_target(module: str, targets: Collection[str]) -> bool:
    """Say whether a module is among targets, each its name or the end of it after a dot."""
    words = module.split(".")
    return any(".".join(words[start:]) in targets for start in range(len(words)))


def _check_directions(tensors: Mapping[str, Tensor], where: str) -> None:
    """Refuse a reflection's vector that has no direction: it would become NaN."""
    for name, tensor in tensors.items():
        if name.endswith(".hra_u") and bool((torch.linalg.vector_norm(tensor, dim=0) == 0).any()):
            raise ValueError(f"{where}: a vector of {name} is zero and has no direction; use another save")
