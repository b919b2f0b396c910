"""What the benches share: interleaved timing, the contenders, and tables."""

import random
import statistics
import time
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from peft import BOFTConfig, DeloraConfig, HRAConfig, LoraConfig, OFTConfig, PeftConfig
from torch import Tensor, nn

from ether_diffusion import EtherConfig

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


def peft_methods(targets: list[str]) -> dict[str, PeftConfig]:
    """Return the methods a user would pick instead, at the settings the ETHER paper compares with."""
    return {
        "PEFT LoRA r=4": LoraConfig(r=4, target_modules=targets),
        "PEFT OFT 4 blocks": OFTConfig(r=4, oft_block_size=0, target_modules=targets),
        "PEFT HRA r=8": HRAConfig(r=8, target_modules=targets),
        "PEFT DeLoRA r=8": DeloraConfig(r=8, target_modules=targets),
        "PEFT BOFT 4 blocks": BOFTConfig(boft_block_size=0, boft_block_num=4, target_modules=targets),
    }


def ether_methods(targets: list[str]) -> dict[str, EtherConfig]:
    """Return ours: ETHER on the input side, ETHER+ on both, 4 blocks each."""
    return {
        "ETHER": EtherConfig(target_modules=targets),
        "ETHER+": EtherConfig(variant="ether_plus", target_modules=targets),
    }


class PaperLinear(nn.Module):
    """The map as the paper's code computes it: H built block by block and multiplied into W at every call."""

    def __init__(self, base: nn.Linear, *, plus: bool, num_blocks: int = 4) -> None:
        super().__init__()
        self.base = base
        widths = (base.in_features, base.out_features) if plus else (base.in_features,)
        self.u = nn.ParameterList(nn.Parameter(torch.randn(num_blocks, w // num_blocks)) for w in widths)
        self.v = nn.ParameterList(nn.Parameter(-u.detach().clone()) for u in self.u) if plus else None

    def _blocks(self, side: int) -> Tensor:
        def outer(raw: Tensor) -> Tensor:
            return torch.einsum("ni,nj->nij", raw, raw) / (raw * raw).sum(1)[:, None, None]

        u = self.u[side]
        h = torch.eye(u.shape[1], device=u.device).repeat(len(u), 1, 1)
        h = h - 2 * outer(u) if self.v is None else h - outer(u) + outer(self.v[side])
        return h.to(self.base.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        h = self._blocks(0)
        weight = self.base.weight
        columns = weight.view(len(weight), len(h), -1)
        weight = torch.einsum("fnm,nmk->fnk", columns, h).reshape_as(weight)
        if self.v is not None:
            out = self._blocks(1)
            weight = torch.einsum("nij,njd->nid", out, weight.view(len(out), -1, weight.shape[1])).reshape_as(
                weight
            )
        return F.linear(x, weight, self.base.bias)


def interleave(
    contenders: Mapping[str, Callable[[], object]], *, rounds: int, repeats: int = 1
) -> dict[str, list[float]]:
    """Time every contender `rounds` times in shuffled order; each time is the median of `repeats` seconds."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for contender in contenders.values():
        contender()
    order = list(contenders)
    for _ in range(rounds):
        random.shuffle(order)
        for name in order:
            times[name].append(statistics.median(seconds(contenders[name]) for _ in range(repeats)))
    return times


def seconds(work: Callable[[], object]) -> float:
    """Return the processor time of one call: with one thread, what its wall time is on a quiet machine.

    Beside a GPU it is the wall time until that is done.
    """
    has_gpu = torch.cuda.is_available()
    clock = time.perf_counter if has_gpu else time.process_time
    if has_gpu:
        torch.cuda.synchronize()
    start = clock()
    work()
    if has_gpu:
        torch.cuda.synchronize()
    return clock() - start


def ratios(times: Mapping[str, list[float]], floor: str) -> dict[str, str]:
    """Return each median over the floor's, with the quartiles of the ratio taken round by round."""
    result = {}
    for name, measured in times.items():
        middle = statistics.median(measured) / statistics.median(times[floor])
        by_round = sorted(t / f for t, f in zip(measured, times[floor], strict=True))
        low, high = by_round[len(by_round) // 4], by_round[-1 - len(by_round) // 4]
        result[name] = f"{middle:.2f} ({low:.2f}–{high:.2f})"
    return result


def table(rows: Mapping[str, Mapping[str, str]], first: str) -> str:
    """Return a Markdown table of rows of columns."""
    columns = list(next(iter(rows.values())))
    lines = [f"| {first} | " + " | ".join(columns) + " |", "|" + "---|" * (len(columns) + 1)]
    lines += [
        f"| {name} | " + " | ".join(row[column] for column in columns) + " |" for name, row in rows.items()
    ]
    return "\n".join(lines)


def machine() -> str:
    """Return the processor, the threads used and the versions a number depends on."""
    from pathlib import Path

    import diffusers
    import peft

    cpu = "unknown processor"
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    return (
        f"{cpu}, {torch.get_num_threads()} thread(s), torch {torch.__version__}, "
        f"diffusers {diffusers.__version__}, peft {peft.__version__}"
    )
