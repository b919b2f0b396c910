"""Forward and backward of one projection and of a whole UNet: frozen, ETHER, the paper's way, PEFT's methods.

    python -m tools.bench_reflections layers [--dtype float32|bfloat16] [--rounds 9]
    python -m tools.bench_reflections unet   [--latent 64] [--rounds 3]

Everything runs in one process, interleaved in shuffled rounds; the figures are medians over the frozen floor.
"""

import argparse
import copy
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from diffusers import UNet2DConditionModel
from peft import PeftConfig, inject_adapter_in_model
from torch import Tensor, nn

from ether_diffusion import prepared_adapters
from ether_diffusion.tuner import EtherLinear
from tools import benchmark

COPIES = 16
"""Projections per measurement: weights are as cold as in a UNet, and preparation is shared as there."""

SHAPES = {  # tokens, in, out, whether the input wants a gradient
    "8192 · 320→320": (8192, 320, 320, True),
    "2048 · 640→640": (2048, 640, 640, True),
    "512 · 1280→1280": (512, 1280, 1280, True),
    "154 · 768→320": (154, 768, 320, True),
    "128 · 1280→1280": (128, 1280, 1280, True),
    "k,v 154 · 768→320": (154, 768, 320, False),
    "k,v 154 · 768→640": (154, 768, 640, False),
    "k,v 154 · 768→1280": (154, 768, 1280, False),
}
SLOW_ALONE = ("PEFT HRA r=8", "PEFT BOFT 4 blocks")


def make_layers(width: int, height: int, dtype: torch.dtype) -> list[nn.Linear]:
    return [nn.Linear(width, height, bias=False).to(dtype).requires_grad_(False) for _ in range(COPIES)]


def step(stack: nn.ModuleList, x: Tensor, grad: Tensor, prepared: bool) -> None:
    with prepared_adapters(stack) if prepared else nullcontext():
        outputs = [layer(x) for layer in stack]
        if outputs[0].requires_grad:
            torch.autograd.backward(outputs, [grad] * COPIES)


def contenders(shape: tuple[int, int, int, bool], dtype: torch.dtype) -> dict[str, Callable[[], None]]:
    tokens, width, height, wants_grad = shape
    layers = make_layers(width, height, dtype)
    base = nn.ModuleList(layers)
    x = torch.randn(2, tokens // 2, width, dtype=dtype, requires_grad=wants_grad)
    run = partial(step, x=x, grad=torch.randn(2, tokens // 2, height, dtype=dtype))
    names = [str(index) for index in range(COPIES)]
    result: dict[str, Callable[[], None]] = {"frozen": partial(run, base, prepared=False)}
    for name, config in benchmark.ether_methods(names).items():
        adapted = inject_adapter_in_model(config, copy.deepcopy(base))
        result[name] = partial(run, adapted, prepared=True)
        result[f"{name}, not prepared"] = partial(run, adapted, prepared=False)
    for plus in (False, True):
        paper = nn.ModuleList(benchmark.PaperLinear(layer, plus=plus) for layer in layers)
        result[f"paper's way, ETHER{'+' if plus else ''}"] = partial(run, paper, prepared=False)
    for name, config in benchmark.peft_methods(names).items():
        if name not in SLOW_ALONE:
            adapted = inject_adapter_in_model(config, copy.deepcopy(base))
            adapted.to(dtype)  # PEFT's own float32 adapters on a bfloat16 base are several times slower
            result[name] = partial(run, adapted, prepared=False)
    return result


def bench_layers(dtype: torch.dtype, rounds: int) -> None:
    columns: dict[str, dict[str, str]] = {}
    for label, shape in SHAPES.items():
        running = contenders(shape, dtype)
        repeats = max(1, int(0.05 / benchmark.seconds(running["frozen"])))
        times = benchmark.interleave(running, rounds=rounds, repeats=min(repeats, 5))
        for name, ratio in benchmark.ratios(times, "frozen").items():
            columns.setdefault(name, {})[label] = ratio
    print(benchmark.table(columns, f"{dtype} forward+backward ÷ frozen"))


@contextmanager
def attached(unet: UNet2DConditionModel, config: PeftConfig | None, paper: bool | None) -> Iterator[None]:
    """Adapt a UNet for a while: by a PEFT config, by the paper's way (True: ETHER+), or not at all."""
    replaced: list[tuple[nn.Module, str, nn.Module]] = []
    if config is not None:
        inject_adapter_in_model(copy.deepcopy(config), unet)
    if paper is not None:
        for name, module in list(unet.named_modules()):
            if name.endswith(tuple(f".{target}" for target in benchmark.ATTENTION)) and isinstance(
                module, nn.Linear
            ):
                parent = unet.get_submodule(name.rpartition(".")[0])
                replaced.append((parent, name.rpartition(".")[2], module))
                setattr(parent, replaced[-1][1], benchmark.PaperLinear(module, plus=paper))
    try:
        yield
    finally:
        for parent, name, module in replaced:
            setattr(parent, name, module)
        if config is not None:
            unet.unload_lora()


def unet_step(unet: UNet2DConditionModel, inputs: tuple[Tensor, ...]) -> None:
    trained = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5) if trained else None
    is_ours = any(isinstance(module, EtherLinear) for module in unet.modules())
    with prepared_adapters(unet) if is_ours else nullcontext():
        unet(*inputs)[0].square().mean().backward()
    if optimizer is not None:
        optimizer.step()


def make_unet(latent: int) -> tuple[UNet2DConditionModel, tuple[Tensor, ...]]:
    """Build SD 1.5's UNet at random weights; its input wants a gradient, so that the floor has a backward."""
    unet = UNet2DConditionModel(
        sample_size=latent,
        block_out_channels=(320, 640, 1280, 1280),
        cross_attention_dim=768,
        attention_head_dim=8,
    ).requires_grad_(False)
    sample = torch.randn(1, 4, latent, latent, requires_grad=True)
    return unet.train(), (sample, torch.tensor([500]), torch.randn(1, 77, 768))


def time_unet(latent: int, rounds: int) -> dict[str, list[float]]:
    """Return seconds of training steps by method, taken in turn; the frozen one is the floor."""
    unet, inputs = make_unet(latent)
    methods: dict[str, tuple[PeftConfig | None, bool | None]] = {"frozen": (None, None)}
    methods |= {name: (config, None) for name, config in benchmark.ether_methods(benchmark.ATTENTION).items()}
    methods |= {f"paper's way, ETHER{'+' if plus else ''}": (None, plus) for plus in (False, True)}
    methods |= {name: (config, None) for name, config in benchmark.peft_methods(benchmark.ATTENTION).items()}
    del methods["PEFT BOFT 4 blocks"]
    times: dict[str, list[float]] = {name: [] for name in methods}
    unet_step(unet, inputs)
    for _ in range(rounds):
        for name in torch.randperm(len(methods)).tolist():
            name = list(methods)[name]
            with attached(unet, *methods[name]):
                times[name].append(benchmark.seconds(partial(unet_step, unet, inputs)))
    return times


def bench_unet(latent: int, rounds: int) -> None:
    times = time_unet(latent, rounds)
    rows = {
        n: {"step ÷ frozen": r, "seconds": f"{min(times[n]):.2f}"}
        for n, r in benchmark.ratios(times, "frozen").items()
    }
    print(benchmark.table(rows, f"SD 1.5 UNet, {latent}×{latent} latents, float32"))


def main() -> None:
    """Parse the command line and run one bench."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["layers", "unet"])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the layers")
    parser.add_argument("--latent", type=int, default=64, help="side of the UNet's latents")
    parser.add_argument("--rounds", type=int, default=None, help="interleaved rounds; default 9 and 3")
    parser.add_argument("--threads", type=int, default=1, help="processor threads")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore")  # PEFT's, of methods compared with
    logging.disable(logging.WARNING)
    print(benchmark.machine())
    if given.what == "layers":
        bench_layers(getattr(torch, given.dtype), given.rounds or 9)
    else:
        bench_unet(given.latent, given.rounds or 3)


if __name__ == "__main__":
    main()
