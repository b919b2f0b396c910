"""Adapters of several models on one frozen base, each trained on its own rows of a batch."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ether_diffusion import reflections
from ether_diffusion.tuner.hooked import is_hooked
from ether_diffusion.tuner.linear import EtherLinear, Mixture
from ether_diffusion.tuner.quantized import is_plain

M = TypeVar("M", bound=nn.Module)


def share_weights(model: M) -> M:
    """Copy a model but not its parameters and buffers: what is added to the copy is not in the model."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


@dataclass(eq=False)
class _Part:
    """Rows of a batch that a layer treats alike: those of `layers` in turn, equally many of each."""

    layers: Sequence[nn.Module]
    num_rows: int
    kind: object
    mixture: Mixture | None = None


class JoinedLinear(nn.Module):
    """The Linears of several models at one place: each computes its own rows of what comes in."""

    def __init__(self, base_layer: nn.Module, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.layers = list(layers)  # not as modules: they are the models' own
        self.parts: list[_Part] = []

    @property
    def weight(self) -> Tensor:
        """The frozen weight underneath."""
        weight: Tensor = self.base_layer.weight  # type: ignore[assignment]
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """Return what the layers make of their rows, for x (batch, ..., in)."""
        if len(self.parts) == 1:
            return self._of(self.parts[0], x)
        rows = torch.split(x, [part.num_rows for part in self.parts])
        return torch.cat([self._of(part, own) for part, own in zip(self.parts, rows, strict=True)])

    def _of(self, part: _Part, x: Tensor) -> Tensor:
        assert len(x) == part.num_rows, f"a layer sees {len(x)} rows, and its runs have {part.num_rows}"
        if part.kind is None:
            own: Tensor = part.layers[0](x)
            return own
        y: Tensor = self.base_layer(x)
        if part.mixture is None:
            return y
        tokens, outputs = (each.reshape(len(part.layers), -1, each.shape[-1]) for each in (x, y))
        return part.mixture.beside(tokens, outputs).view(y.shape)

    def divide(self, members: Sequence[int], num_rows: Sequence[int]) -> list[_Part]:
        """Return the parts of a batch with so many rows of each member, neighbours that are alike as one."""
        parts = list[_Part]()
        for member, count in zip(members, num_rows, strict=True):
            layer = self.layers[member]
            kind = _kind(layer)
            before = parts[-1] if parts else None
            is_alike = before is not None and kind is not None and before.kind == kind
            if before is not None and is_alike and before.num_rows == count * len(before.layers):
                parts[-1] = _Part([*before.layers, layer], before.num_rows + count, kind)
            else:
                parts.append(_Part([layer], count, kind))
        return parts


class Joined:
    """A frozen model in which the adapters of several others, which share its weights, are all in force.

    `model` is a copy of it in the same way; `at_work` says which rows are whose.
    """

    def __init__(self, base: M, models: Sequence[M]) -> None:
        self.model, self._layers = share_weights(base), list[JoinedLinear]()
        self._divided = dict[tuple[tuple[int, ...], ...], list[list[_Part]]]()
        named = (each.named_modules() for each in models)
        paths = {name: None for each in named for name, m in each if isinstance(m, BaseTunerLayer)}
        for path in paths:
            parent, _, name = path.rpartition(".")
            layer = JoinedLinear(
                self.model.get_submodule(path), [each.get_submodule(path) for each in models]
            )
            setattr(self.model.get_submodule(parent), name, layer)
            self._layers.append(layer)

    @contextmanager
    def at_work(self, members: Sequence[int], num_rows: Sequence[int]) -> Iterator[None]:
        """Let batches hold num_rows[i] rows of the model members[i], in that order, inside.

        Put it around one forward and its backward; gradients reach the adapters of these models.
        """
        divided = self._divided.setdefault((tuple(members), tuple(num_rows)), [])
        if not divided:
            divided += [layer.divide(members, num_rows) for layer in self._layers]
        try:
            for layer, parts in zip(self._layers, divided, strict=True):
                layer.parts = parts
            _prepare(divided)
            yield
        finally:
            for layer in self._layers:
                layer.parts = []
            for part in (part for parts in divided for part in parts):
                part.mixture = None


def _kind(layer: nn.Module) -> object:
    """Return what layers have in common whose adapters are multiplied as one; None for one by itself."""
    if not isinstance(layer, BaseTunerLayer):
        return "the base"
    names, base = [str(name) for name in layer.active_adapters], layer.get_base_layer()
    if len(names) != 1 or type(base) is not nn.Linear or not is_plain(base) or is_hooked(base):
        return None
    if isinstance(layer, EtherLinear) and list(layer.active_scales().values()) == [1.0]:
        sides = layer.vectors(names[0])
        shapes = [None if side is None else (side.u.shape, side.v is not None) for side in sides]
        return None if layer.dropout[names[0]] else (EtherLinear, *shapes)
    if type(layer) is lora.Linear and not (layer.lora_variant or layer.lora_bias[names[0]]):
        is_dropped = not isinstance(layer.lora_dropout[names[0]], nn.Identity)
        return None if is_dropped else (lora.Linear, layer.r[names[0]])
    return None


def _prepare(divided: Sequence[Sequence[_Part]]) -> None:
    """Make the factors of all parts, those of as many adapters and one dtype of W in one go."""
    reflected = dict[tuple[int, torch.dtype], list[tuple[_Part, list[EtherLinear]]]]()
    for part in (part for parts in divided for part in parts):
        ours = [layer for layer in part.layers if isinstance(layer, EtherLinear)]
        others: list[Any] = [layer for layer in part.layers if isinstance(layer, lora.Linear)]
        if part.kind is not None and ours:
            reflected.setdefault((len(ours), ours[0].base_linear.weight.dtype), []).append((part, ours))
        elif part.kind is not None and others:
            named = [(layer, _active(layer)) for layer in others]
            down = torch.stack([layer.lora_A[name].weight for layer, name in named])
            up = torch.stack([layer.scaling[name] * layer.lora_B[name].weight for layer, name in named])
            part.mixture = Mixture(down, up)
    for (together, dtype), group in reflected.items():
        pairs = [[layer.vectors(_active(layer)) for layer in ours] for _, ours in group]
        sides = [([own.input for own in each], [own.output for own in each]) for each in pairs]
        flat = [side for each in sides for own in each for side in own if side is not None]
        made = iter(reflections.rows(flat, dtype, together=together))
        for (part, ours), (first, second) in zip(group, sides, strict=True):
            input_side = None if first[0] is None else next(made)
            output_side = None if second[0] is None else next(made)
            down, up = reflections.factors(ours[0].base_linear.weight, input_side, output_side)
            part.mixture = Mixture(down, up) if together > 1 else Mixture(down[None], up[None])


def _active(layer: Any) -> str:
    return str(layer.active_adapters[0])
