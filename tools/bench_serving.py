"""Many requests for many adapters: the engine against drawing in turn, and a server of thousands of adapters.

python -m tools.bench_serving mixed [--sd15] [--requests 32] [--steps 10] [--rows 8] [--guidance 3]
python -m tools.bench_serving many [--adapters 10000] [--requests 300]
python -m tools.bench_serving soak [--adapters 200] [--minutes 30]
"""

import argparse
import copy
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import torch
from peft import LoraConfig, get_peft_model
from transformers import CLIPTextConfig, CLIPTextModel

from ether_diffusion import EtherConfig, save_ether
from ether_diffusion.adapters import Adapter, read_adapter
from ether_diffusion.bases import Base, decode_latents, open_base
from ether_diffusion.pipelines.opening import open_pipeline
from ether_diffusion.serving.engine import Engine, Request
from ether_diffusion.tiny_world import tiny_world_path
from tools import benchmark
from tools.bench_reflections import make_unet

PROMPT = "a photo of a red sks fox on the beach"
CPU = torch.device("cpu")


def sd15_base(folder: Path, latent: int) -> Path:
    """Write a base with SD 1.5's UNet at random weights, and Tiny World's autoencoder and tokenizer."""
    shutil.copytree(tiny_world_path(), folder / "sd15")
    for part in ("unet", "text_encoder"):
        shutil.rmtree(folder / "sd15" / part)
    make_unet(latent)[0].save_pretrained(folder / "sd15" / "unet")
    config = CLIPTextConfig(hidden_size=768, num_hidden_layers=1, num_attention_heads=12, projection_dim=768)
    CLIPTextModel(config).save_pretrained(folder / "sd15" / "text_encoder")
    return folder / "sd15"


def make_adapters(base: Base, folder: Path, count: int) -> list[Adapter]:
    """Write ETHER+ adapters of random vectors for a base, and read them back."""
    unet, found = base.load_denoiser(), []
    for index in range(count):
        torch.manual_seed(index)
        unet.add_adapter(EtherConfig(variant="ether_plus", init_weights=False), f"a{index}")
        save_ether(unet, folder / f"a{index}", adapter_name=f"a{index}")
        unet.delete_adapters(f"a{index}")
        found.append(read_adapter(folder / f"a{index}"))
    return found


def drawn_together(engine: Engine, names: list[str], how: dict[str, Any]) -> None:
    jobs = [
        engine.submit(Request(prompt=PROMPT, seed=seed, adapters={name: 1.0}, **how))
        for seed, name in enumerate(names)
    ]
    for job in jobs:
        job.picture.result()


def drawn_in_turn(pipeline: Any, names: list[str], how: dict[str, Any], *, fused: bool) -> None:
    own = {"num_inference_steps": how["steps"], "guidance_scale": how["guidance_scale"]}
    for seed, name in enumerate(names):
        pipeline.set_adapters(name)
        if fused:
            pipeline.fuse()
        pipeline(PROMPT, seed=seed, **own)
        if fused:
            pipeline.unfuse()


@torch.no_grad()
def drawn_by_peft(pipeline: Any, model: Any, names: list[str], how: dict[str, Any], rows: int) -> None:
    """Draw batches whose rows each take a LoRA, as PEFT's adapter_names mix them."""
    guidance = how["guidance_scale"]
    times = 2 if guidance > 1 else 1
    embeddings = torch.cat(pipeline.encode_prompt(PROMPT, CPU, 1, True)[::-1])[-times:]
    side = pipeline.unet.config.sample_size
    for start in range(0, len(names), rows):
        batch = names[start : start + rows]
        scheduler = copy.deepcopy(pipeline.scheduler)
        scheduler.set_timesteps(how["steps"])
        latents = torch.randn(len(batch), 4, side, side) * scheduler.init_noise_sigma
        text = embeddings.repeat_interleave(len(batch), dim=0)
        for timestep in scheduler.timesteps:
            noisy = scheduler.scale_model_input(torch.cat([latents] * times), timestep)
            found = model(noisy, timestep, text, adapter_names=batch * times).sample.chunk(times)
            predicted = found[0] + guidance * (found[-1] - found[0]) if times == 2 else found[0]
            latents = scheduler.step(predicted, timestep, latents).prev_sample
        decode_latents(pipeline.vae, latents)


def latencies(engine: Engine, names: list[str], how: dict[str, Any], per_second: float) -> list[float]:
    """Return seconds from request to picture under Poisson arrivals."""
    generator, found, jobs = np.random.default_rng(0), list[float](), []
    for index, name in enumerate(names):
        began = time.perf_counter()
        job = engine.submit(Request(prompt=PROMPT, seed=index, adapters={name: 1.0}, **how))
        job.picture.add_done_callback(partial(note, found, began))
        jobs.append(job)
        time.sleep(generator.exponential(1 / per_second))
    for job in jobs:
        job.picture.result()
    return found


def note(found: list[float], began: float, _: object) -> None:
    found.append(time.perf_counter() - began)


def mixed(given: argparse.Namespace) -> None:
    """Print pictures a second by every way, and on Tiny World latencies at half load."""
    count, names = given.requests, [f"a{index}" for index in range(given.requests)]
    how = {"steps": given.steps, "guidance_scale": given.guidance}
    with tempfile.TemporaryDirectory() as folder:
        base = open_base(sd15_base(Path(folder), 32) if given.sd15 else "tiny_world")
        adapters = make_adapters(base, Path(folder), count)
        engine = Engine(base, device=CPU, max_rows=given.rows, num_slots=count, max_waiting=4 * count)
        pipeline = open_pipeline(base, device=CPU, dtype=torch.float32)
        pipeline.unet, own = engine.base.load_denoiser(), engine.base.load_denoiser()
    pipeline.set_progress_bar_config(disable=True)
    config = LoraConfig(r=4, target_modules=benchmark.ATTENTION, init_lora_weights=False)
    lora: Any = get_peft_model(own, config, adapter_name="a0")
    for name, adapter in zip(names, adapters, strict=True):
        engine.add_adapter(name, adapter)
        pipeline.load_adapter_weights(adapter, adapter_name=name, activate=False)
        lora.add_adapter(name, copy.deepcopy(config)) if name != "a0" else None
    lora.eval()
    ways: dict[str, Callable[[], None]] = {
        "engine, one adapter for all": lambda: drawn_together(engine, names[:1] * count, how),
        f"engine, {count} adapters": lambda: drawn_together(engine, names, how),
        "set_adapters in turn": lambda: drawn_in_turn(pipeline, names, how, fused=False),
        "fused and unfused in turn": lambda: drawn_in_turn(pipeline, names, how, fused=True),
        "PEFT's mixed LoRA r=4": lambda: drawn_by_peft(pipeline, lora, names, how, given.rows),
    }
    times = benchmark.interleave(ways, rounds=given.rounds)
    compared = benchmark.ratios(times, "engine, one adapter for all")
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    rows = {
        name: {"pictures a second": f"{count / medians[name]:.2f}", "time, one for all = 1": compared[name]}
        for name in ways
    }
    print(benchmark.machine())
    print(benchmark.table(rows, f"{count} requests, {given.steps} steps, {given.rows} rows"))
    bank = engine.bank
    print(f"\nfilling a slot: {bank.fill_seconds / max(1, bank.counts['fills']) * 1000:.1f} ms\n")
    if not given.sd15:
        arriving(engine, names, how, given.rows, count / medians["engine, one adapter for all"] / 2)
    engine.close()


def arriving(engine: Engine, names: list[str], how: dict[str, Any], max_rows: int, rate: float) -> None:
    """Print latencies where so many requests a second arrive, in batches and one at a time."""
    rows = {}
    for most in (max_rows, 1):
        engine.max_rows = most
        p50, p95 = np.percentile(latencies(engine, names, how, rate), [50, 95])
        rows[f"{most} at a time"] = {"p50": f"{p50:.2f} s", "p95": f"{p95:.2f} s"}
    print(benchmark.table(rows, f"Poisson arrivals, {rate:.2f} a second"))


def write_many(folder: Path, count: int) -> None:
    """Write adapters of one form, each of its own random vectors."""
    make_adapters(open_base("tiny_world"), folder / "made", 1)
    source = folder / "made" / "a0"
    config, data = (
        (source / "adapter_config.json").read_bytes(),
        (source / "adapter_model.safetensors").read_bytes(),
    )
    start = 8 + int.from_bytes(data[:8], "little")
    generator = np.random.default_rng(0)
    for index in range(count):
        own = folder / "adapters" / f"a{index}"
        own.mkdir(parents=True)
        (own / "adapter_config.json").write_bytes(config)
        vectors = generator.standard_normal((len(data) - start) // 4, dtype=np.float32)
        (own / "adapter_model.safetensors").write_bytes(data[:start] + vectors.tobytes())


@contextmanager
def served(folder: Path) -> Iterator[tuple[httpx.Client, psutil.Process, float]]:
    """Yield a client of a server on Tiny World, its process, and how long it took to start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    began = time.perf_counter()
    command = [sys.executable, "-m", "ether_diffusion.scripts.ether", "serve", "--base", "tiny_world"]
    command += ["--adapters", str(folder)]
    process = subprocess.Popen([*command, "--port", str(port)], stdout=subprocess.DEVNULL)
    limits = httpx.Limits(max_connections=None)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=None, limits=limits) as client:
            while True:
                try:
                    client.get("/health").raise_for_status()
                    break
                except httpx.ConnectError:
                    time.sleep(0.05)
            yield client, psutil.Process(process.pid), time.perf_counter() - began
    finally:
        process.terminate()
        process.wait(30)


def asked(client: httpx.Client, name: str, steps: int = 10) -> float:
    """Return how long a picture took; a full queue is asked again when it says so."""
    began = time.perf_counter()
    body = {"prompt": PROMPT, "model": name, "steps": steps, "seed": 1, "guidance_scale": 3.0}
    while True:
        answer = client.post("/v1/images/generations", json=body)
        if answer.status_code != 429:
            answer.raise_for_status()
            return time.perf_counter() - began
        time.sleep(float(answer.headers["Retry-After"]))


def zipf(count: int, number: int, seed: int = 0) -> list[str]:
    """Return names of adapters, the k-th one asked for about 1 / k as often as the first."""
    weights = 1 / np.arange(1, count + 1)
    drawn = np.random.default_rng(seed).choice(count, number, p=weights / weights.sum())
    return [f"a{index}" for index in drawn]


def under_load(client: httpx.Client, names: list[str], per_second: float) -> list[float]:
    """Return how long pictures took that were asked for under Poisson arrivals."""
    generator = np.random.default_rng(1)
    with ThreadPoolExecutor(64) as pool:
        waited = []
        for name in names:
            waited.append(pool.submit(asked, client, name))
            time.sleep(generator.exponential(1 / per_second))
        return [each.result() for each in waited]


def rss(process: psutil.Process) -> float:
    return float(process.memory_info().rss) / 2**20


def many(given: argparse.Namespace) -> None:
    """Print what a server of very many adapters costs."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        write_many(folder, given.adapters)
        with served(folder / "adapters") as (client, process, start):
            print(f"{given.adapters} adapters; until it answers: {start:.1f} s, {rss(process):.0f} MiB")
            asked(client, "tiny_world")
            cold = [asked(client, f"a{given.adapters - 1 - index}") for index in range(20)]
            warm = [asked(client, f"a{given.adapters - 1}") for _ in range(20)]
            p50 = statistics.median(warm)
            print(f"a picture alone: {p50:.2f} s; with a cold adapter: {statistics.median(cold):.2f} s")
            for which in ("first", "second"):
                began = time.perf_counter()
                listed = len(client.get("/v1/models").json()["data"]) - 1
                took = time.perf_counter() - began
                print(f"{which} listing, of {listed}: {took:.2f} s, {rss(process):.0f} MiB")
            began = time.perf_counter()
            under_load(client, ["a0"] * 32, 1000)
            rate, rows = 16 / (time.perf_counter() - began), {}
            names = zipf(given.adapters, given.requests)
            for title, each in (
                (f"Zipf, {len(set(names))} adapters", names),
                ("one adapter", ["a0"] * len(names)),
            ):
                p50, p95 = np.percentile(under_load(client, each, rate), [50, 95])
                rows[title] = {
                    "p50": f"{p50:.2f} s",
                    "p95": f"{p95:.2f} s",
                    "memory": f"{rss(process):.0f} MiB",
                }
            print(benchmark.table(rows, f"{len(names)} requests, Poisson arrivals, {rate:.2f} a second"))


def soak(given: argparse.Namespace) -> None:
    """Print a server's memory while it draws, refuses, and is left by clients."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        write_many(folder, given.adapters)
        with served(folder / "adapters") as (client, process, _):
            for index in range(given.adapters):  # what memory holds of each is there before it is looked at
                asked(client, f"a{index}", steps=1)
            began, seed = time.monotonic(), 0
            print("minute requests RSS/MiB threads files")
            for part in range(21):
                while time.monotonic() - began < given.minutes * 60 * part / 20:
                    seed += 1
                    with ThreadPoolExecutor(12) as pool:
                        list(pool.map(partial(one_of_all, client), zipf(given.adapters, 24, seed), range(24)))
                    client.get("/v1/models").raise_for_status()
                    time.sleep(given.pause)
                held = f"{rss(process):7.0f} {process.num_threads():7} {process.num_fds():5}"
                print(f"{(time.monotonic() - began) / 60:6.1f} {24 * seed:8} {held}", flush=True)
            print(client.get("/health").json())


def one_of_all(client: httpx.Client, name: str, index: int) -> None:
    """Ask for a picture, with events or without, wrongly, or leave before it comes."""
    body = {
        "prompt": PROMPT,
        "model": name,
        "steps": 5,
        "stream": index % 3 == 0,
        "partial_images": index % 2,
    }
    if index % 8 == 7:
        assert client.post("/v1/images/generations", json=body | {"size": "1x1"}).status_code == 400
    elif index % 8 == 3:
        with suppress(httpx.ReadTimeout):
            client.post("/v1/images/generations", json=body | {"steps": 100}, timeout=0.3)
    else:
        assert client.post("/v1/images/generations", json=body).status_code in (200, 429)


def main() -> None:
    """Parse the command line and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = parser.add_subparsers(dest="kind", required=True)
    own = kinds.add_parser("mixed")
    own.add_argument("--sd15", action="store_true", help="SD 1.5's UNet at 32×32 latents, random weights")
    for name, default in (("requests", 32), ("steps", 10), ("rows", 8), ("guidance", 3.0), ("rounds", 3)):
        own.add_argument(f"--{name}", type=type(default), default=default)
    for kind, defaults in (
        ("many", {"adapters": 10_000, "requests": 300}),
        ("soak", {"adapters": 200, "minutes": 30.0, "pause": 0.0}),
    ):
        own = kinds.add_parser(kind)
        for name, default in defaults.items():
            own.add_argument(f"--{name}", type=type(default), default=default)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    {"mixed": mixed, "many": many, "soak": soak}[given.kind](given)


if __name__ == "__main__":
    main()
