"""Stopping at any operation of a computation, long ones included."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

LONG_FLOP = 4e9  # for each thread: longer operations on a CPU are done in parts, each of a tenth of a second
_BLOCK, _FEWEST = 256, 768  # queries that torch's attention on a CPU takes at a time, and the fewest for that


class StopInside(TorchFunctionMode):
    """Lets `check` raise at the next operation of this thread, once: then is tidied up.

    Attention and convolutions of large pictures are computed in parts, of queries or of rows. Each number is
    computed from the same numbers in the same order, so that pictures do not change by a bit.
    """

    def __init__(self, check: Callable[[], None], long_flop: float = LONG_FLOP) -> None:
        super().__init__()
        self._own_check, self._was_told = check, False
        self._long = long_flop * torch.get_num_threads()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self._check()
        if func is F.scaled_dot_product_attention and not torch.is_grad_enabled():
            return self._attend(*args, **(kwargs or {}))
        if func is F.conv2d and not kwargs and len(args) == 7 and not torch.is_grad_enabled():
            return self._convolve(*args)
        return func(*args, **(kwargs or {}))

    def _check(self) -> None:
        if not self._was_told:
            try:
                self._own_check()
            except BaseException:
                self._was_told = True
                raise

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Attend with queries (b, heads, n, c) to keys and values (b, heads, m, c)."""
        flop = 4 * query.numel() * key.shape[-2]
        is_plain = not args and kwargs.get("attn_mask") is None and not kwargs.get("is_causal")
        if flop <= self._long or query.device.type != "cpu" or not is_plain or query.dim() != 4:
            return F.scaled_dot_product_attention(query, key, value, *args, **kwargs)
        num_queries, num_keys = query.shape[-2], key.shape[-2]
        rows = max(_FEWEST, int(self._long / (4 * num_keys * query.shape[-1])) // _BLOCK * _BLOCK)
        starts = range(0, max(1, num_queries - rows + 1), rows)
        ends = [*starts[1:], num_queries]  # the last part has the rest, too
        attended = query.new_empty(*query.shape[:-1], value.shape[-1])
        for picture, head in itertools.product(range(len(query)), range(query.shape[1])):
            one = slice(picture, picture + 1), slice(head, head + 1)
            for start, end in zip(starts, ends, strict=True):
                self._check()
                part = (*one, slice(start, end))
                attended[part] = F.scaled_dot_product_attention(query[part], key[one], value[one], **kwargs)
        return attended

    def _convolve(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, *rest: Any
    ) -> Tensor:
        """Convolve pictures (b, c, h, w)."""
        flop = 2 * x.shape[-1] * x.shape[-2] * len(x) * weight.numel()
        is_plain = stride == (1, 1) and rest == ((1, 1), 1) and isinstance(padding, tuple)
        if flop <= self._long or x.device.type != "cpu" or not is_plain:
            return F.conv2d(x, weight, bias, stride, padding, *rest)
        (above, beside), reach = padding, weight.shape[-2] - 1
        height = x.shape[-2] + 2 * above - reach
        rows, parts = max(1, math.ceil(height * self._long / flop)), []
        for top in range(0, height, rows):
            self._check()
            first, last = top - above, min(top + rows, height) + reach - above
            seen = x[..., max(0, first) : last, :]
            seen = F.pad(seen, (0, 0, max(0, -first), max(0, last - x.shape[-2])))
            parts.append(F.conv2d(seen, weight, bias, stride, (0, beside), *rest))
        return torch.cat(parts, dim=-2)
