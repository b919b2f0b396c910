"""Whether an adapter fits a base, asked of the base's files: only adapted weights are read, none is kept."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from ether_diffusion.adapters import Adapter, AdapterPart
from ether_diffusion.adapters.models import Fit, check_fit
from ether_diffusion.bases import Base, Denoiser
from ether_diffusion.control.conditioning import check_encoder


class BaseFit:
    """Compares adapters with a base that is opened and not loaded."""

    def __init__(self, base: Base) -> None:
        self.base = base
        self._lock = threading.RLock()

    def fit(self, adapter: Adapter) -> Fit:
        """Say how the base compares with that of an adapter and its control encoder, if it has one.

        Of a text encoder's adapter, only whether the base has that text encoder is looked at.

        Raises:
            ValueError: they do not fit; the message says why.
        """
        lacking = [name for name in adapter.parts if not (self.base.folder / name).is_dir()]
        if lacking:
            raise ValueError(f"the adapter changes the {lacking[0]}, which {self.base.name} has not")
        if adapter.encoder is not None:
            with self._lock:
                check_encoder(self._skeleton, adapter.encoder)
        if "unet" not in adapter.parts:
            return Fit("unknown")
        with self.adapted_unet(adapter.parts["unet"]) as unet:
            return check_fit(unet, adapter.parts["unet"], "asked")

    @contextmanager
    def adapted_unet(self, adapter: AdapterPart) -> Iterator[Denoiser]:
        """Give the UNet with the weights that an adapter changes, as they are stored, and no others.

        One visitor has it at a time.
        """
        with self._lock, self._filled(adapter) as unet:
            yield unet

    @contextmanager
    def _filled(self, adapter: AdapterPart) -> Iterator[Denoiser]:
        modules = dict(self._skeleton.named_modules())
        filled = [name for name in adapter.modules() if isinstance(modules.get(name), nn.Linear)]
        with ExitStack() as stack:
            for name, weight in self._weights(filled).items():
                module = modules[name]
                assert isinstance(module, nn.Linear)
                stack.callback(setattr, module, "weight", module.weight)
                module.weight = nn.Parameter(weight, requires_grad=False)
            yield self._skeleton

    @cached_property
    def _skeleton(self) -> Denoiser:
        unet = self.base.empty_denoiser()
        unet.register_to_config(_name_or_path=str(self.base.folder))
        return unet

    @cached_property
    def _places(self) -> dict[str, Path]:
        """The file of each of the UNet's tensors by its name."""
        variant = self.base.variant
        pattern = "*.safetensors" if variant is None else f"*.{variant}*.safetensors"
        places: dict[str, Path] = {}
        for path in sorted((self.base.folder / self.base.denoiser).glob(pattern)):
            with safe_open(path, framework="pt") as file:
                places |= dict.fromkeys(file.keys(), path)
        return places

    def _weights(self, names: list[str]) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        by_path: dict[Path, list[str]] = {}
        for name in names:
            path = self._places.get(f"{name}.weight")
            if path is not None:
                by_path.setdefault(path, []).append(name)
        for path, inside in by_path.items():
            with safe_open(path, framework="pt") as file:
                found |= {name: file.get_tensor(f"{name}.weight") for name in inside}
        return found
