"""Whether an adapter fits a base, asked of the base's files: only adapted weights are read, none is kept."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property

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
        changed, variant = adapter.modules(), self.base.variant
        with self._lock, ExitStack() as stack:
            modules = {name: m for name, m in self._skeleton.named_modules() if name in changed}
            weights = {f"{name}.weight": m for name, m in modules.items() if isinstance(m, nn.Linear)}
            pattern = "*.safetensors" if variant is None else f"*.{variant}*.safetensors"
            for path in sorted((self.base.folder / self.base.denoiser).glob(pattern)):
                with safe_open(path, framework="pt") as file:
                    for name in weights.keys() & set(file.keys()):
                        stack.callback(setattr, weights[name], "weight", weights[name].weight)
                        weights[name].weight = nn.Parameter(file.get_tensor(name), requires_grad=False)
            yield self._skeleton

    @cached_property
    def _skeleton(self) -> Denoiser:
        unet = self.base.empty_denoiser()
        unet.register_to_config(_name_or_path=str(self.base.folder))
        return unet
