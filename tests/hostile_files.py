"""A good adapter to spoil, and what must hold when it is refused."""

import hashlib
import json
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from small_models import small_unet
from torch import Tensor, nn

from ether_diffusion import EtherConfig
from ether_diffusion.adapters import load_ether, save_ether
from ether_diffusion.tuner import EtherLinear

TENSORS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
FIRST = "base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k.ether_input_u"


@cache
def good_files() -> dict[str, bytes]:
    unet = small_unet()
    unet.add_adapter(EtherConfig())
    with TemporaryDirectory() as folder:
        save_ether(unet, folder, base_model="stable/base", trigger="a photo of sks dog")
        return {name: (Path(folder) / name).read_bytes() for name in (TENSORS, CONFIG)}


def good_adapter(folder: Path) -> Path:
    """Write a good adapter, for a test to spoil."""
    folder.mkdir()
    for name, data in good_files().items():
        (folder / name).write_bytes(data)
    return folder


def state(model: nn.Module) -> list[object]:
    """Everything that loading could change: values, modules, flags, what is said to be loaded."""
    values = [(n, hashlib.sha256(t.numpy().tobytes()).hexdigest()) for n, t in model.state_dict().items()]
    modules = [(name, id(module), module.training) for name, module in model.named_modules()]
    flags = [(name, parameter.requires_grad) for name, parameter in model.named_parameters()]
    active = [m.active_adapters for m in model.modules() if isinstance(m, EtherLinear)]
    return [
        values,
        modules,
        flags,
        active,
        sorted(getattr(model, "peft_config", {})),
        model._hf_peft_config_loaded,
    ]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refusal(model: nn.Module, source: str | Path, kind: type[Exception] = ValueError, **options: Any) -> str:
    """Return the message that loading is refused with, having checked that nothing changed."""
    folder = Path(source) if isinstance(source, Path) and source.is_dir() else None
    before, files_before = state(model), files(folder) if folder else {}
    with pytest.raises(kind) as caught:
        load_ether(model, source, **options)
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


def rewrite_header(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = (folder / TENSORS).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    (folder / TENSORS).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def rewrite_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))
