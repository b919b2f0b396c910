"""What training costs: a step of the loop, a whole run, and the memory of a step.

    python -m tools.bench_training step   [--latent 32] [--rounds 5]
    python -m tools.bench_training memory [--latent 64]
    python -m tools.bench_training run    [--rounds 3]

A step is train-dreambooth's, on SD 1.5's UNet at random weights, latents and embeddings cached, batch 1.
Its floor is the frozen UNet forward and backward, and AdamW over as many parameters. A run, on Tiny World, is
measured by what each further step costs, data, log and checkpoints included. --quick tries all on tiny UNets.
"""

import argparse
import gc
import io
import logging
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image
from torch import Tensor, nn

from ether_diffusion.bases import PromptEmbeddings
from ether_diffusion.bases.stable_diffusion import SMALL_ATTENTION, DiscreteNoise, StableDiffusion
from ether_diffusion.strict_json import Json
from ether_diffusion.training.batches import Batch
from ether_diffusion.training.config import AdapterConfig, ComputeConfig, DreamBoothConfig, OptimizationConfig
from ether_diffusion.training.loop import Progress, Trainer
from ether_diffusion.training.methods import TrainedPart, attach_new, peft_config
from ether_diffusion.training.objective import Denoising
from ether_diffusion.training.processes import make_accelerator
from ether_diffusion.training.run import train_dreambooth
from ether_diffusion.training.setup import check_run, load_run
from tools import benchmark
from tools.bench_memory import MIB, resident
from tools.bench_mixture import share_weights
from tools.bench_reflections import make_unet

METHODS = {
    "ETHER": AdapterConfig(adapter="ether"),
    "ETHER+": AdapterConfig(adapter="ether_plus"),
    "PEFT LoRA r=4": AdapterConfig(adapter="lora", rank=4),
}
FLOOR, BARE, WHOLE = "frozen + AdamW", "bare steps", "whole run"
NUM_TOKENS = 77


def make_base(latent: int, *, quick: bool) -> UNet2DConditionModel:
    """Build the UNet, with the attention that training chooses on a CPU."""
    if quick:
        unet = UNet2DConditionModel(
            block_out_channels=(32, 64),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=32,
            attention_head_dim=8,
            norm_num_groups=8,
        )
        unet.requires_grad_(False).train()
    else:
        unet, _ = make_unet(latent)
    if latent <= SMALL_ATTENTION:
        unet.set_attn_processor(AttnProcessor())
    return unet


def make_trainer(unet: UNet2DConditionModel, config: AdapterConfig) -> Trainer:
    """Attach an adapter and return what trains it."""
    accelerator = make_accelerator(ComputeConfig())
    adapter = peft_config(config, "unet", StableDiffusion)
    added = attach_new(unet, adapter, seed=0, part="unet")
    context = torch.randn(1, NUM_TOKENS, unet.config.cross_attention_dim)

    def encode(prompts: Sequence[str]) -> PromptEmbeddings:
        return PromptEmbeddings(context, None)

    return Trainer(
        accelerator,
        [TrainedPart("unet", unet, adapter, added, 1e-5)],
        Denoising(unet, StableDiffusion, encode, DiscreteNoise(DDPMScheduler()), OptimizationConfig(), 0),
        Progress(10**6, 1, 1, 1),
    )


def make_batch(latent: int) -> Batch:
    """Return one photo's batch, as the cache gives it."""
    none = torch.zeros(1, dtype=torch.bool)
    latents = torch.randn(1, 4, latent, latent)
    return Batch(latents, ("",), torch.ones(1), None, none, None, None, (0,), ("photo.png",))


def make_floor(unet: UNet2DConditionModel, latent: int, shapes: Sequence[torch.Size]) -> Callable[[], object]:
    """Return the least that a step does: the frozen UNet both ways, and AdamW over so many parameters."""
    parameters = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer = torch.optim.AdamW(parameters, lr=1e-5)
    sample = torch.randn(1, 4, latent, latent, requires_grad=True)
    context = torch.randn(1, NUM_TOKENS, unet.config.cross_attention_dim)

    def step() -> None:
        prediction: Tensor = unet(sample, torch.tensor([500]), context).sample
        torch.autograd.backward(prediction.square().mean())
        optimizer.step()

    return step


def bench_step(latent: int, rounds: int, *, quick: bool) -> None:
    """Print each method's step over the floor's."""
    base, batch = make_base(latent, quick=quick), [make_batch(latent)]
    trainers = {name: make_trainer(share_weights(base), config) for name, config in METHODS.items()}
    shapes = [parameter.shape for parameter in trainers["ETHER+"].parameters]
    contenders: dict[str, Callable[[], object]] = {FLOOR: make_floor(base, latent, shapes)}
    contenders |= {name: partial(trainer.train_step, batch) for name, trainer in trainers.items()}
    times = benchmark.interleave(contenders, rounds=rounds)
    rows = {
        name: {"step ÷ floor": ratio, "seconds": f"{min(times[name]):.2f}"}
        for name, ratio in benchmark.ratios(times, FLOOR).items()
    }
    print(benchmark.table(rows, f"train_step, {_unet(quick)}, {latent}×{latent} latents, float32"))


def bench_memory(latent: int, *, quick: bool) -> None:
    """Print what a first step takes beyond model and adapter at rest, a process each."""
    small_pieces = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", "tools.bench_training", "memory", "--here"]
    command += ["--latent", str(latent), *(["--quick"] if quick else [])]
    found = subprocess.check_output(command, env=os.environ | small_pieces)
    peaks = dict(zip((FLOOR, *METHODS), map(float, found.split()), strict=True))
    rows = {
        name: {"peak MiB": f"{peak:.0f}", "over the floor": f"{peak - peaks[FLOOR]:+.0f}"}
        for name, peak in peaks.items()
    }
    print(benchmark.table(rows, f"train_step, {_unet(quick)}, {latent}×{latent} latents, float32"))


def measure_memory(name: str, latent: int, *, quick: bool) -> float:
    """Return MiB that the first step adds at its peak, the optimizer's state among them."""
    unet = make_base(latent, quick=quick)
    if name == FLOOR:
        adapted, config = share_weights(unet), peft_config(METHODS["ETHER+"], "unet", StableDiffusion)
        shapes = [parameter.shape for parameter in attach_new(adapted, config, seed=0, part="unet")]
        del adapted
        step: Callable[[], object] = make_floor(unet, latent, shapes)
    else:
        trainer = make_trainer(unet, METHODS[name])
        step = partial(trainer.train_step, [make_batch(latent)])
    gc.collect()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    step()
    return (resident("VmHWM") - before) / MIB


def bench_run(rounds: int, *, quick: bool) -> None:
    """Print what a further step costs in a whole run on Tiny World, over a step by itself."""
    short, long = (2, 6) if quick else (50, 150)
    times: dict[str, list[float]] = {BARE: [], WHOLE: []}
    fixed = []
    for _ in range(rounds):
        with run_of(long) as config:
            times[BARE].append(benchmark.seconds(bare_steps(config)) / long)
        totals = []
        for num_steps in (short, long):
            with run_of(num_steps) as config, redirect_stderr(io.StringIO()):
                totals.append(benchmark.seconds(partial(train_dreambooth, config)))
        times[WHOLE].append((totals[1] - totals[0]) / (long - short))
        fixed.append(totals[0] - short * times[WHOLE][-1])
    rows = {
        name: {"÷ bare": ratio, "seconds a step": f"{min(times[name]):.4f}"}
        for name, ratio in benchmark.ratios(times, BARE).items()
    }
    print(benchmark.table(rows, "Tiny World, 64 px, ETHER+, a checkpoint every 100 steps"))
    print(f"A run's start and end, loading and the result included: {sorted(fixed)[rounds // 2]:.1f} s.")


@contextmanager
def run_of(num_steps: int) -> Iterator[DreamBoothConfig]:
    """Give a run of six photos in a folder that is gone after."""
    with tempfile.TemporaryDirectory() as folder:
        photos = Path(folder) / "photos"
        photos.mkdir()
        rng = np.random.default_rng(0)
        for index in range(6):
            pixels = rng.integers(0, 256, (96, 96, 3), np.uint8)
            Image.fromarray(pixels).save(photos / f"{index}.png")
        flags: dict[str, Json] = {
            "pretrained_model_name_or_path": "tiny_world",
            "instance_data_dir": str(photos),
            "instance_prompt": "a photo of a sks cat",
            "output_dir": str(Path(folder) / "run"),
            "max_train_steps": num_steps,
        }
        yield DreamBoothConfig.from_flat(flags).resolved()


def bare_steps(config: DreamBoothConfig) -> Callable[[], object]:
    """Load a run, and return all of its steps with batches that are there already."""
    run = load_run(check_run(config, make_accelerator(config.compute)))
    batches = list(run.source.batches(run.trainer.progress.samples(0, 0)))
    return lambda: list(run.trainer.steps(iter(batches)))


def _unet(quick: bool) -> str:
    return "a tiny UNet" if quick else "SD 1.5's UNet"


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and run one bench."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["step", "memory", "run"])
    parser.add_argument("--latent", type=int, default=None, help="side of the latents; default 64, quick 8")
    parser.add_argument("--rounds", type=int, default=None, help="interleaved rounds; default 5, quick 1")
    parser.add_argument("--threads", type=int, default=1, help="processor threads")
    parser.add_argument("--quick", action="store_true", help="a tiny UNet, few steps: does the bench work?")
    parser.add_argument("--here", action="store_true", help="print peaks of memory alone, with this malloc")
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore")  # of libraries
    logging.disable(logging.WARNING)
    latent = given.latent or (8 if given.quick else 64)
    rounds = given.rounds or (1 if given.quick else 5)
    if given.here:
        with get_context("fork").Pool(1, maxtasksperchild=1) as pool:  # a process each, imports done
            measure = partial(measure_memory, latent=latent, quick=given.quick)
            print(*pool.map(measure, (FLOOR, *METHODS), chunksize=1))
        return
    print(benchmark.machine())
    if given.what == "step":
        bench_step(latent, rounds, quick=given.quick)
    elif given.what == "memory":
        bench_memory(latent, quick=given.quick)
    else:
        bench_run(rounds, quick=given.quick)


if __name__ == "__main__":
    main()
