"""A good adapter to spoil, the ways to spoil it, and what must hold when it is refused."""

import hashlib
import json
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from small_models import adapted_unet
from torch import Tensor, nn

from ether_diffusion.adapters import load_ether, save_ether

TENSORS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
FIRST = "base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k.ether_input_u"

Spoil = Callable[[Path], object]


@cache
def good_files() -> dict[str, bytes]:
    with TemporaryDirectory() as folder:
        save_ether(adapted_unet(), folder, base_model="stable/base", trigger="a photo of sks dog")
        return {name: (Path(folder) / name).read_bytes() for name in (TENSORS, CONFIG)}


def good_adapter(folder: Path) -> Path:
    """Write a good adapter, for a test to spoil."""
    folder.mkdir()
    for name, data in good_files().items():
        (folder / name).write_bytes(data)
    return folder


def state(model: nn.Module) -> list[object]:
    """Everything that loading could change: values, modules, flags, what is said to be loaded."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    return [
        [(n, hashlib.sha256(t.numpy().tobytes()).hexdigest()) for n, t in model.state_dict().items()],
        [(name, id(module), module.training) for name, module in model.named_modules()],
        [(name, parameter.requires_grad) for name, parameter in model.named_parameters()],
        [(list(layer.active_adapters), layer.disable_adapters) for layer in layers],
        sorted(getattr(model, "peft_config", {})),
        model._hf_peft_config_loaded,
    ]


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """The size and the time of the last change of each file; what is inside may be large."""
    found = {path: path.lstat() for path in folder.rglob("*")}
    return {str(path): (stat.st_size, stat.st_mtime_ns) for path, stat in found.items()}


def refusal(
    model: nn.Module,
    source: str | Path,
    kind: type[Exception] = ValueError,
    *,
    by: Callable[..., object] = load_ether,
    **options: Any,
) -> str:
    """Return the message that loading is refused with, having checked that nothing changed."""
    folder = Path(source) if isinstance(source, Path) and source.is_dir() else None
    before, files_before = state(model), files(folder) if folder else {}
    with pytest.raises(kind) as caught:
        by(model, source, **options)
    assert caught.type is kind  # not a library's error that happens to derive from it
    message = str(caught.value)
    assert message.isprintable(), message  # one line, nothing that a terminal obeys
    assert len(message) < 700, message
    assert state(model) == before
    assert (files(folder) if folder else {}) == files_before
    return message


def rewrite_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object], **metadata: str) -> None:
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS, metadata or None)


def rewrite_header(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = (folder / TENSORS).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    (folder / TENSORS).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def rewrite_config(folder: Path, name: str = CONFIG, /, **changes: Any) -> None:
    config = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(config | changes))


def config(name: str = CONFIG, /, **changes: Any) -> Spoil:
    return lambda folder: rewrite_config(folder, name, **changes)


def tensors(change: Callable[[dict[str, Tensor]], object], **metadata: str) -> Spoil:
    return lambda folder: rewrite_tensors(folder, change, **metadata)


def header(change: Callable[[dict[str, Any]], object]) -> Spoil:
    return lambda folder: rewrite_header(folder, change)


def metadata(**entries: str) -> Spoil:
    """Leave this of the metadata, under the adapter's own prefix."""
    return tensors(lambda _: None, **{f"ether.{name}": text for name, text in entries.items()})


def written(data: str | bytes, name: str = TENSORS) -> Spoil:
    found = data.encode() if isinstance(data, str) else data
    return lambda folder: (folder / name).write_bytes(found)


def truncated(size: int, name: str = TENSORS) -> Spoil:
    """Give a file a size; what it did not have takes no place on the disk."""

    def change(folder: Path) -> None:
        with (folder / name).open("r+b") as file:
            file.truncate(size)

    return change
