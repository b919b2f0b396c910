"""A batch of eight samples with eight different adapters, against one for all: SD 1.5's UNet, forward.

python -m tools.bench_mixture [--latent 32] [--rounds 3] [--dtype float32|bfloat16]
"""

import argparse
import copy
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from ether_diffusion import EtherConfig, mixed_adapters
from ether_diffusion.tuner.config import Variant
from tools import benchmark
from tools.bench_reflections import make_unet

SAMPLES = 8
NAMES = [f"subject{index}" for index in range(SAMPLES)]


def ether_unet(base: UNet2DConditionModel, variant: Variant) -> UNet2DConditionModel:
    unet = share_weights(base)
    for name in NAMES:
        unet.add_adapter(EtherConfig(variant=variant, init_weights=False), name)
    return unet


def share_weights(base: UNet2DConditionModel) -> UNet2DConditionModel:
    """Copy the modules of a UNet but not its parameters, so that several contenders fit into memory."""
    memo = {id(parameter): parameter for parameter in base.parameters()}
    return copy.deepcopy(base, memo)


def lora_model(base: UNet2DConditionModel) -> nn.Module:
    config = LoraConfig(r=4, target_modules=benchmark.ATTENTION, init_lora_weights=False)
    model = get_peft_model(share_weights(base), config, adapter_name=NAMES[0])
    for name in NAMES[1:]:
        model.add_adapter(name, copy.deepcopy(config))
    result: nn.Module = model.eval()
    return result


@torch.no_grad()
def forward(model: nn.Module, inputs: tuple[Tensor, ...], **options: object) -> None:
    model(*inputs, **options)


def enter(contexts: ExitStack, unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Mix the adapters for as long as the contexts are open, as a sampling loop does over its steps."""
    taken = benchmark.seconds(lambda: contexts.enter_context(mixed_adapters(unet, NAMES)))
    print(f"entering mixed_adapters took {taken:.2f} s")
    return unet


def contenders(latent: int, dtype: torch.dtype, contexts: ExitStack) -> dict[str, Callable[[], None]]:
    base, _ = make_unet(latent)
    base = base.eval().to(dtype)
    inputs = (
        torch.randn(SAMPLES, 4, latent, latent, dtype=dtype),
        torch.full((SAMPLES,), 500),
        torch.randn(SAMPLES, 77, 768, dtype=dtype),
    )
    ether, plus, lora = ether_unet(base, "ether"), ether_unet(base, "ether_plus"), lora_model(base).to(dtype)
    return {
        "one adapter, merged": partial(forward, base, inputs),
        "8 ETHER adapters": partial(forward, enter(contexts, ether), inputs),
        "8 ETHER+ adapters": partial(forward, enter(contexts, plus), inputs),
        "8 PEFT LoRA r=4 adapters": partial(forward, lora, inputs, adapter_names=NAMES),
    }


def main() -> None:
    """Parse the command line and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--latent", type=int, default=32, help="side of the latents")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the UNet")
    parser.add_argument("--threads", type=int, default=1, help="processor threads")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore")  # PEFT's, at every further adapter
    with ExitStack() as contexts:
        running = contenders(given.latent, getattr(torch, given.dtype), contexts)
        times = benchmark.interleave(running, rounds=given.rounds)
    title = f"SD 1.5 UNet forward, batch {SAMPLES}, {given.latent}×{given.latent} latents, {given.dtype}"
    ratios = benchmark.ratios(times, "one adapter, merged")
    print(benchmark.machine())
    print(benchmark.table({name: {"÷ one adapter": ratio} for name, ratio in ratios.items()}, title))


if __name__ == "__main__":
    main()
