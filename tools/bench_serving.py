"""Pictures a second of many requests for many adapters on Tiny World: the engine against drawing in turn.

python -m tools.bench_serving [--requests 32] [--steps 10] [--rows 8] [--rounds 3]
"""

import argparse
import copy
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model

from ether_diffusion import EtherConfig, save_ether
from ether_diffusion.adapters import Adapter, read_adapter
from ether_diffusion.bases import decode_latents, open_base
from ether_diffusion.pipelines.opening import open_pipeline
from ether_diffusion.serving.engine import Engine, Request
from tools import benchmark

PROMPT = "a photo of a red sks fox on the beach"
CPU = torch.device("cpu")


def make_adapters(folder: Path, count: int) -> list[Adapter]:
    """Write ETHER+ adapters of random vectors for the embedded base, and read them back."""
    unet = open_base("tiny_world").load_denoiser()
    found = []
    for index in range(count):
        torch.manual_seed(index)
        unet.add_adapter(EtherConfig(variant="ether_plus", init_weights=False), f"a{index}")
        save_ether(unet, folder / f"a{index}", adapter_name=f"a{index}")
        unet.delete_adapters(f"a{index}")
        found.append(read_adapter(folder / f"a{index}"))
    return found


def drawn_together(engine: Engine, names: list[str], steps: int) -> None:
    jobs = [
        engine.submit(Request(prompt=PROMPT, seed=seed, steps=steps, adapters={name: 1.0}))
        for seed, name in enumerate(names)
    ]
    for job in jobs:
        job.picture.result()


def drawn_in_turn(pipeline: Any, names: list[str], steps: int, *, fused: bool) -> None:
    for seed, name in enumerate(names):
        pipeline.set_adapters(name)
        if fused:
            pipeline.fuse()
        pipeline(PROMPT, seed=seed, num_inference_steps=steps, guidance_scale=3.0)
        if fused:
            pipeline.unfuse()


@torch.no_grad()
def drawn_by_peft(pipeline: Any, model: Any, names: list[str], steps: int, rows: int) -> None:
    """Draw batches whose rows each take a LoRA, as PEFT's adapter_names mix them."""
    embeddings = torch.cat(pipeline.encode_prompt(PROMPT, CPU, 1, True)[::-1])
    for start in range(0, len(names), rows):
        batch = names[start : start + rows]
        scheduler = copy.deepcopy(pipeline.scheduler)
        scheduler.set_timesteps(steps)
        side = pipeline.unet.config.sample_size
        latents = torch.randn(len(batch), 4, side, side) * scheduler.init_noise_sigma
        text = embeddings.repeat_interleave(len(batch), dim=0)
        for timestep in scheduler.timesteps:
            noisy = scheduler.scale_model_input(torch.cat([latents] * 2), timestep)
            without, given = model(noisy, timestep, text, adapter_names=batch * 2).sample.chunk(2)
            latents = scheduler.step(without + 3.0 * (given - without), timestep, latents).prev_sample
        decode_latents(pipeline.vae, latents)


def lora_model(count: int) -> Any:
    config = LoraConfig(r=4, target_modules=benchmark.ATTENTION, init_lora_weights=False)
    model = get_peft_model(open_base("tiny_world").load_denoiser(), config, adapter_name="a0")
    for index in range(1, count):
        model.add_adapter(f"a{index}", copy.deepcopy(config))
    return model.eval()


def latencies(engine: Engine, names: list[str], steps: int, per_second: float, count: int) -> list[float]:
    """Return seconds from request to picture under Poisson arrivals."""
    generator, found, jobs = np.random.default_rng(0), list[float](), []
    for index in range(count):
        began = time.perf_counter()
        request = Request(prompt=PROMPT, seed=index, steps=steps, adapters={names[index % len(names)]: 1.0})
        job = engine.submit(request)
        job.picture.add_done_callback(partial(note, found, began))
        jobs.append(job)
        time.sleep(generator.exponential(1 / per_second))
    for job in jobs:
        job.picture.result()
    return found


def note(found: list[float], began: float, _: object) -> None:
    found.append(time.perf_counter() - began)


def main() -> None:
    """Parse the command line and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    count, steps = given.requests, given.steps
    names = [f"a{index}" for index in range(count)]
    base = open_base("tiny_world")
    with tempfile.TemporaryDirectory() as folder:
        adapters = make_adapters(Path(folder), count)
        engine = Engine(base, device=CPU, max_rows=given.rows, num_slots=count, max_waiting=4 * count)
        alone = Engine(base, device=CPU, max_rows=1, num_slots=count, max_waiting=4 * count)
        pipeline = open_pipeline(base, device=CPU, dtype=torch.float32)
        pipeline.set_progress_bar_config(disable=True)
        for name, adapter in zip(names, adapters, strict=True):
            engine.add_adapter(name, adapter)
            alone.add_adapter(name, adapter)
            pipeline.load_adapter_weights(adapter, adapter_name=name, activate=False)
    lora, plain = lora_model(count), open_pipeline(base, device=CPU, dtype=torch.float32)
    ways: dict[str, Callable[[], None]] = {
        f"engine, {count} adapters": lambda: drawn_together(engine, names, steps),
        "engine, one adapter for all": lambda: drawn_together(engine, names[:1] * count, steps),
        "set_adapters in turn": lambda: drawn_in_turn(pipeline, names, steps, fused=False),
        "fused and unfused in turn": lambda: drawn_in_turn(pipeline, names, steps, fused=True),
        "PEFT's mixed LoRA r=4": lambda: drawn_by_peft(plain, lora, names, steps, given.rows),
    }
    for way in ways.values():
        way()
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(given.rounds):
        for name, way in ways.items():
            taken[name].append(benchmark.seconds(way))
    first = statistics.median(taken["engine, one adapter for all"])
    print(f"{count} requests, {steps} steps, {given.rows} rows, {torch.get_num_threads()} threads")
    for name, seconds in taken.items():
        median = statistics.median(seconds)
        print(f"{name:30} {count / median:6.2f} pictures/s   {median / first:5.2f} of one for all")
    fills = engine.bank.counts["fills"]
    print(f"filling a slot: {engine.bank.fill_seconds / max(1, fills) * 1000:.1f} ms ({fills} fills)")
    rate = count / first / 2
    for name, one in ((f"engine, {given.rows} rows", engine), ("one at a time", alone)):
        found = latencies(one, names, steps, rate, count)
        p50, p95 = np.percentile(found, [50, 95])
        print(f"{name:30} {rate:.2f} requests/s: p50 {p50:.2f} s, p95 {p95:.2f} s")
    engine.close()
    alone.close()


if __name__ == "__main__":
    main()
