"""A training step of today's bases at random weights: time and memory by method, checkpointing and precision.

    python -m tools.bench_bases                     # on a GPU, in 6 minutes: klein 4B and SDXL at 1024 px
    python -m tools.bench_bases --base klein --blocks 1 --pixels 256 --text 128 --rounds 5     # on a CPU
    python -m tools.bench_bases --quick             # tiny ones: does the bench work?

Configs are the published ones; --blocks keeps so many blocks of each kind of a transformer, of full width. A
step is train-dreambooth's, batch 1, latents and embeddings cached; the frozen one goes forward and backward.
All methods share the weights, in bfloat16 on a GPU, and take turns in shuffled rounds.
"""

import argparse
import gc
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DConditionModel
from diffusers.models import Flux2Transformer2DModel
from torch import Tensor

from ether_diffusion.bases import Base, Noise, PromptEmbeddings
from ether_diffusion.bases.flow import FlowNoise
from ether_diffusion.bases.flux import Flux2Klein
from ether_diffusion.bases.single_file import CONFIGS
from ether_diffusion.bases.stable_diffusion import SDXL, DiscreteNoise
from ether_diffusion.training.batches import Batch
from ether_diffusion.training.config import ComputeConfig, OptimizationConfig
from ether_diffusion.training.loop import Progress, Trainer
from ether_diffusion.training.methods import TrainedPart, attach_new, peft_config
from ether_diffusion.training.objective import Denoising
from ether_diffusion.training.processes import make_accelerator
from ether_diffusion.tuner.quantized import quantize
from tools import benchmark
from tools.bench_mixture import share_weights
from tools.bench_training import METHODS

GIB = 2**30
FROZEN, FACTOR = "frozen", 8
"""The floor, and what both autoencoders divide sides by."""
KLEIN = {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680}
_NARROW: dict[str, Any] = {
    "num_layers": 1,
    "num_single_layers": 1,
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "joint_attention_dim": 64,
    "axes_dims_rope": (4, 4, 4, 4),
    "in_channels": 16,
}
_SHALLOW: dict[str, Any] = {
    "block_out_channels": [64, 64, 64],
    "transformer_layers_per_block": 1,
    "cross_attention_dim": 64,
    "attention_head_dim": 4,
    "addition_time_embed_dim": 8,
    "norm_num_groups": 8,
}
"""What makes tiny ones of klein and SDXL."""


class Subject(NamedTuple):
    """A base to train on, what a step of it sees, and what builds its denoiser."""

    base: Base
    noise: Noise
    embeddings: PromptEmbeddings
    latents: Tensor
    size_ids: Tensor | None
    build: Callable[[], Any]


def opened(kind: Any, **further: Any) -> Base:
    """Return a base as if it had been opened from a folder."""
    place = {"name": kind.__name__, "folder": Path(), "vae_folder": Path(), "is_inpainting": False}
    numbers = {"vae_scale_factor": FACTOR, "native_size": 1024, "size_multiple": 16, "guidance_scale": 1.0}
    base: Base = kind(**place, **numbers, prediction_type="", **further)
    return base


def klein(pixels: int, num_tokens: int, num_blocks: int | None, *, quick: bool) -> Subject:
    """Return FLUX.2 klein 4B."""
    config: dict[str, Any] = KLEIN | {"guidance_embeds": False} | (_NARROW if quick else {})
    if num_blocks is not None:
        config |= {"num_layers": num_blocks, "num_single_layers": num_blocks}
    channels = config.get("in_channels", 128) // Flux2Klein.packed**2
    return Subject(
        opened(Flux2Klein, settings=config),
        FlowNoise(FlowMatchEulerDiscreteScheduler(shift=3.0), "none", Flux2Klein.packed),
        PromptEmbeddings(torch.randn(1, num_tokens, config["joint_attention_dim"])),
        torch.randn(1, channels, pixels // FACTOR, pixels // FACTOR),
        None,
        partial(Flux2Transformer2DModel, **config),
    )


def sdxl(pixels: int, num_tokens: int, num_blocks: int | None, *, quick: bool) -> Subject:
    """Return SDXL, whose texts have 77 tokens and whose blocks are all kept."""
    config: dict[str, Any] = dict(CONFIGS["xl"]["parts"]["unet"]) | (_SHALLOW if quick else {})
    pooled = 16 if quick else 1280
    config["projection_class_embeddings_input_dim"] = 6 * config["addition_time_embed_dim"] + pooled
    return Subject(
        opened(SDXL),
        DiscreteNoise(DDPMScheduler()),
        PromptEmbeddings(torch.randn(1, 77, config["cross_attention_dim"]), torch.randn(1, pooled)),
        torch.randn(1, 4, pixels // FACTOR, pixels // FACTOR),
        torch.tensor([[pixels, pixels, 0, 0, pixels, pixels]]),
        lambda: UNet2DConditionModel.from_config(config),
    )


BASES = {"klein": klein, "SDXL": sdxl}


def steps_of(
    subject: Subject, model: Any, accelerator: Any, *, checkpointing: bool
) -> dict[str, Callable[[], object]]:
    """Return a step of the frozen model and of each method, on models that share their weights."""
    base, rows = subject.base, (1, torch.zeros(1, dtype=torch.bool))
    weights, none = torch.ones(rows[0]), rows[1]
    batch = [Batch(subject.latents, ("",), weights, None, none, subject.size_ids, None, (0,), ("photo",))]

    def frozen(own: Any) -> None:
        noisy, timesteps = subject.latents.clone().requires_grad_(), torch.tensor([500.0])
        with accelerator.autocast():
            found = base.predict(own, noisy, timesteps, subject.embeddings, size_ids=subject.size_ids)
        torch.autograd.backward(found.float().square().mean())

    contenders: dict[str, Callable[[], object]] = {}
    for name in (FROZEN, *METHODS):
        own = share_weights(model)
        if checkpointing:
            own.enable_gradient_checkpointing()
        if name == FROZEN:
            contenders[name] = partial(frozen, own)
            continue
        adapter = peft_config(METHODS[name], "unet", base)
        added = attach_new(own, adapter, seed=0, part="unet")
        denoising = Denoising(own, base, lambda _: subject.embeddings, subject.noise, OptimizationConfig(), 0)
        parts = [TrainedPart("unet", own, adapter, added, 1e-5)]
        trainer = Trainer(accelerator, parts, denoising, Progress(10**6, 1, 1, 1))
        contenders[name] = partial(trainer.train_step, batch)
    return contenders


def bench(subject: Subject, rounds: int, precision: str, *, is_late: Callable[[], bool]) -> Iterator[str]:
    """Yield tables of a base, or what was left out because it grew late or bitsandbytes is not there."""
    accelerator = make_accelerator(ComputeConfig(mixed_precision="no" if precision == "float32" else "bf16"))
    device, dtype = accelerator.device, getattr(torch, precision)
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = subject.build().requires_grad_(False).train()
    torch.set_default_dtype(torch.float32)
    what = f"{subject.base.name}, {subject.latents.shape[-1] * FACTOR} px, {precision}"
    for is_quantized in (False, True):
        if is_quantized and (is_late() or find_spec("bitsandbytes") is None):
            yield f"{what}, nf4: left out, {'late' if is_late() else 'bitsandbytes is not installed'}"
            return
        if is_quantized:
            quantize(model, "nf4", dtype)
            model.to(device)
        at_rest = allocated(torch.cuda.memory_allocated)
        for checkpointing in (False, True):
            title = what + ", nf4" * is_quantized + ", checkpointed" * checkpointing
            if is_late():
                yield f"{title}: left out, late"
                continue
            contenders = steps_of(subject, model, accelerator, checkpointing=checkpointing)
            times = benchmark.interleave(contenders, rounds=rounds)
            rows = {
                name: {"step ÷ frozen": ratio, "seconds": f"{min(times[name]):.3f}"}
                for name, ratio in benchmark.ratios(times, FROZEN).items()
            }
            if device.type == "cuda":
                for name, contender in contenders.items():
                    rows[name]["GiB over the weights"] = f"{peak_of(contender):.2f}"
                title += f", weights {at_rest:.2f} GiB"
            yield benchmark.table(rows, title)
            del contenders
            gc.collect()


def allocated(measure: Callable[[], int]) -> float:
    """Return what a measure of torch's says of the GPU, in GiB."""
    return measure() / GIB if torch.cuda.is_available() else 0.0


def peak_of(step: Callable[[], object]) -> float:
    """Return the GiB of the GPU that a step adds at its peak."""
    before = allocated(torch.cuda.memory_allocated)
    torch.cuda.reset_peak_memory_stats()
    step()
    return allocated(torch.cuda.max_memory_allocated) - before


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and bench."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", nargs="+", choices=BASES, default=list(BASES))
    parser.add_argument("--pixels", type=int, default=None, help="side of pictures; default 1024, quick 64")
    parser.add_argument("--text", type=int, default=512, help="tokens of a transformer's texts")
    parser.add_argument("--blocks", type=int, default=None, help="blocks of each kind that are kept")
    parser.add_argument("--rounds", type=int, default=None, help="interleaved rounds; default 5, quick 1")
    parser.add_argument("--minutes", type=float, default=5.0, help="after these no further table is begun")
    parser.add_argument("--quick", action="store_true", help="tiny bases: does the bench work?")
    given = parser.parse_args(argv)
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore")  # of libraries
    logging.disable(logging.WARNING)
    end = time.monotonic() + 60 * given.minutes
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    print(f"{gpu}{benchmark.machine()}")
    pixels, rounds = given.pixels or (64 if given.quick else 1024), given.rounds or (1 if given.quick else 5)
    precision = "bfloat16" if torch.cuda.is_available() else "float32"
    for name in given.base:
        subject = BASES[name](pixels, given.text, given.blocks, quick=given.quick)
        for table in bench(subject, rounds, precision, is_late=lambda: time.monotonic() > end):
            print(f"\n{table}", flush=True)


if __name__ == "__main__":
    main()
