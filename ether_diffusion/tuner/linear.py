"""EtherLinear: an nn.Linear seen through its adapters, one for all rows or each its own, and merged."""

import warnings
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from ether_diffusion import reflections
from ether_diffusion.fast_linear import reflected_linear
from ether_diffusion.reflections import SideRows
from ether_diffusion.tuner.config import EtherConfig
from ether_diffusion.tuner.hooked import called, is_hooked, weight_of, write_weight
from ether_diffusion.tuner.layer import EtherLayer
from ether_diffusion.tuner.quantized import is_plain, plain_linear


class Mixture(NamedTuple):
    """One layer's adapters by sample: A (samples, r, in), B (samples, out, r), W'_i = W + B_i A_i."""

    down: Tensor
    up: Tensor
    repeats: bool = True
    """Whether a batch may hold the samples several times over, one set after the other."""

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return x_i W'_iᵀ + b (batch, ..., out) for x (batch, ..., in).

        Raises:
            ValueError: the batch is not the samples, or a multiple of them.
        """
        tokens, down, up = self._by_row(x)
        if tokens.shape[1] < 2 * weight.shape[0]:
            return self.beside(x, F.linear(x, weight, bias))
        weights = torch.baddbmm(weight.expand(len(x), -1, -1), up, down)
        y = torch.bmm(tokens, weights.transpose(1, 2))
        y = y if bias is None else y.add_(bias)
        return y.view(*x.shape[:-1], weight.shape[0])

    def beside(self, x: Tensor, y: Tensor) -> Tensor:
        """Return x_i W'_iᵀ + b (batch, ..., out) for x (batch, ..., in), given y = x Wᵀ + b.

        Raises:
            ValueError: as `linear`.
        """
        tokens, down, up = self._by_row(x)
        along = torch.bmm(tokens, down.transpose(1, 2))
        return torch.baddbmm(y.reshape(len(x), -1, y.shape[-1]), along, up.transpose(1, 2)).view(y.shape)

    def _by_row(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, samples = len(x), len(self.down)
        if batch % samples or (batch != samples and not self.repeats):
            raise ValueError(
                f"the batch has {batch} rows and mixed_adapters names {samples} adapters; name one per sample"
                " (classifier-free guidance may double the batch)"
            )
        down, up = self.down.to(x.dtype), self.up.to(x.dtype)
        if batch > samples:
            down, up = down.repeat(batch // samples, 1, 1), up.repeat(batch // samples, 1, 1)
        return x.reshape(batch, -1, x.shape[-1]), down, up


class EtherLinear(nn.Module, EtherLayer):
    """A Linear with W' = Σ over active adapters of s (W'_a - W), added to W.

    W'_a is the weight as adapter a alone makes it: H_out W H_in. Several adapters add up, as their exported
    LoRA files do, so neither their order nor the tool matters.
    """

    def __init__(
        self, base_layer: nn.Linear, adapter_name: str, *, config: EtherConfig, num_blocks: int
    ) -> None:
        super().__init__()
        self._init_adapters(base_layer)
        self.register_buffer("pristine_weight", None, persistent=False)
        self.pristine_weight: Tensor | None
        self.merged_updates: list[tuple[Tensor, Tensor, float]] = []
        self.merged_content: tuple[int, int] | None = None
        self.is_quantized = not is_plain(base_layer)
        self.quantized: list[nn.Linear] = []
        """The base's own layer while adapters are merged into a plain one; no part of the model."""
        self.prepared_rows: dict[str, SideRows] = {}
        self.mixture: Mixture | None = None
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, num_blocks)

    @property
    def is_changed(self) -> bool:
        """Whether the layer computes with anything but the base's own weight now."""
        in_force = self.mixture is not None or bool(self.active_scales())
        return bool(self.merged) or (in_force and not self._disable_adapters)

    def forward(self, x: Tensor) -> Tensor:
        """Return x W'ᵀ + b (..., out) for x (..., in)."""
        if self._disable_adapters and self.merged:
            self.unmerge()
        active = {} if self._disable_adapters or self.merged else self.active_scales()
        mixture = None if self._disable_adapters else self.mixture
        if not active and mixture is None:
            result: Tensor = self.base_layer(x)
            return result
        if mixture is None and self.training and (p := max(self.dropout[name] for name in active)):
            x = F.dropout(x, p)
        base = self.base_linear
        if self.is_quantized:
            return self._around(x, active)
        if is_hooked(base):
            return called(base, x, partial(self._adapted, active=active))
        return self._adapted(x, base.weight, base.bias, active)

    def _around(self, x: Tensor, active: dict[str, float]) -> Tensor:
        """Reflect what goes into the base's own product and what comes out: so with quantized weights."""
        if self.mixture is None and list(active.values()) == [1.0]:
            return self._reflected(x, next(iter(active)))
        y: Tensor = self.base_layer(x)
        if self.mixture is not None:
            return self.mixture.beside(x, y)
        return y + sum(scale * (self._reflected(x, name) - y) for name, scale in active.items())

    def _reflected(self, x: Tensor, name: str) -> Tensor:
        input_side, output_side = self.vectors(name)
        if input_side is not None:
            x = reflections.reflect(x, reflections.units(input_side))
        y: Tensor = self.base_layer(x)
        if output_side is None:
            return y
        bias = self.base_linear.bias
        side = reflections.units(output_side)
        if bias is None:
            return reflections.reflect(y, side)
        return reflections.reflect(y - bias, side) + bias

    def _adapted(self, x: Tensor, weight: Tensor, bias: Tensor | None, active: dict[str, float]) -> Tensor:
        if self.mixture is not None:
            return self.mixture.linear(x, weight, bias)
        device = x.device.type
        if not torch.is_autocast_enabled(device):
            return self._summed(x, weight, bias, active)
        dtype = torch.get_autocast_dtype(device)
        bias = None if bias is None else bias.to(dtype)
        with torch.autocast(device, enabled=False):
            return self._summed(x.to(dtype), weight.to(dtype), bias, active)

    def _summed(self, x: Tensor, weight: Tensor, bias: Tensor | None, active: dict[str, float]) -> Tensor:
        if list(active.values()) != [1.0]:
            down, up = self._summed_factors(weight, active)
            return F.linear(x, weight, bias) + F.linear(F.linear(x, down), up)
        (name,) = active
        if torch.compiler.is_compiling() or weight.requires_grad:
            # a compiler fuses the plain form just as well; autograd differentiates it for W too
            return reflections.plain_linear(x, weight, bias, *self.vectors(name))
        input_side, output_side = self.rows(name, weight.dtype)
        return reflected_linear(x, weight, bias, input_side=input_side, output_side=output_side)

    def rows(self, adapter_name: str, dtype: torch.dtype) -> SideRows:
        """Return the rows of an adapter's two sides in `dtype`: the prepared ones, or made here."""
        prepared = self.prepared_rows.get(adapter_name)
        if prepared is not None and all(side is None or side.stack.dtype == dtype for side in prepared):
            return prepared
        return reflections.with_rows([self.vectors(adapter_name)], dtype)[0]

    def factors(self, adapter_name: str, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return A (r, in) and B (out, r) with W'_a = W + B A for the given W (out, in), in its dtype."""
        return reflections.factors(weight, *self.rows(adapter_name, weight.dtype))

    def _summed_factors(self, weight: Tensor, scales: dict[str, float]) -> tuple[Tensor, Tensor]:
        pairs = [(self.factors(name, weight), scale) for name, scale in scales.items()]
        return torch.cat([down for (down, _), _ in pairs]), torch.cat([up * s for (_, up), s in pairs], dim=1)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return W'_a - W (out, in) of an adapter at scale 1, in float32; needed by PEFT's converters."""
        pristine = self.pristine_weight
        weight = weight_of(self.base_linear) if pristine is None else pristine
        down, up = self.factors(adapter, weight.float())
        return up @ down

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Replace the base's weight by W', keeping the weight itself for `unmerge`.

        A quantized base becomes a plain Linear, exact for the numbers that its weights stood for.

        Raises:
            ValueError: with `safe_merge`, W' is not finite; or W' would be lost, see `write_weight`.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.r]
        if not names:
            return
        weight = weight_of(self.base_linear)
        pristine = weight if self.pristine_weight is None else self.pristine_weight
        base = reflections.wide(pristine)
        updates = [(*self.factors(name, base), self.scale(name)) for name in names]
        merged = reflections.merged_weight(weight, updates)
        if safe_merge and not torch.isfinite(reflections.wide(merged)).all():
            raise ValueError(f"merging adapter(s) {', '.join(names)} would give weights that are not finite")
        if self.is_quantized:
            self._unquantize(merged)
        else:
            write_weight(self, self.base_linear, merged)
        self.pristine_weight = pristine.cpu() if self.base_linear.weight.is_meta else pristine
        self.merged_updates += updates
        self.merged_content = _content(self.base_linear.weight)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Put the base's own weight back: the very tensor, so nothing drifts.

        Only where a LoRA has been merged on top, in place, is it W' less its updates: PEFT subtracts the LoRA
        when its turn comes, before or after.

        Raises:
            ValueError: it would be lost, see `write_weight`.
        """
        if self.pristine_weight is None:
            warnings.warn("no adapter is merged here; nothing to unmerge", stacklevel=2)
            return
        if self.quantized:
            self.base_layer = self.quantized.pop().to(self.base_linear.weight.device)
            self.is_quantized = True
            self._forget_merging()
            return
        weight, before = self.base_linear.weight, self.merged_content
        now = _content(weight)
        if before is not None and now is not None and before[0] == now[0] and before != now:
            updates = [
                (down.to(weight.device), up.to(weight.device), -scale)
                for down, up, scale in self.merged_updates
            ]
            write_weight(self, self.base_linear, reflections.merged_weight(weight.detach(), updates))
        else:
            write_weight(self, self.base_linear, self.pristine_weight)
        self._forget_merging()

    def _unquantize(self, weight: Tensor) -> None:
        self.quantized.append(self.base_linear)
        self.base_layer, self.is_quantized = plain_linear(self.base_linear, weight), False

    def _forget_merging(self) -> None:
        self.pristine_weight = self.merged_content = None
        self.merged_updates = []
        self.merged_adapters.clear()
        for pushed in self.scales.values():  # diffusers' fuse_lora(lora_scale) leaves its factor behind
            del pushed[1:]

    def extra_repr(self) -> str:
        """Say what is adapted: sizes, and blocks and scale of every adapter."""
        adapters = ", ".join(
            f"{name}: {blocks} blocks at {self.scale(name):g}" for name, blocks in self.r.items()
        )
        return f"in_features={self.in_features}, out_features={self.out_features}, adapters=({adapters})"


def _content(weight: Tensor) -> tuple[int, int] | None:
    """Return where a weight lies and what it holds, in short; None where nothing can be added in place."""
    if weight.is_meta or weight.dtype.itemsize == 1:
        return None
    return weight.data_ptr(), int(torch.hash_tensor(weight.detach()).item())
