"""What whole processes of train-dreambooth cost: beside a busy neighbour, in starting, and beside diffusers.

    python -m tools.bench_process neighbour [--steps 30] [--rounds 3]
    python -m tools.bench_process start     [--rounds 5]
    python -m tools.bench_process diffusers --script train_dreambooth_lora.py [--steps 20 200]

Six photos of a fox are learned on Tiny World, in a process each, in shuffled rounds; medians. `neighbour`
lets OpenMP's threads wait in several ways, on the machine as it is and beside a process that keeps one core
busy. `diffusers` runs diffusers' examples/dreambooth/train_dreambooth_lora.py beside ours, with the same
settings; it needs torchvision, so run the bench by a Python that has it.
"""

import argparse
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

from ether_diffusion.console import share_machine
from ether_diffusion.tiny_world import tiny_world_path
from ether_diffusion.tiny_world.concepts import find_concept

ALL_CORES = {"OMP_NUM_THREADS": str(os.cpu_count())}
WAYS = {
    "spinning, as torch does by itself": {"GOMP_SPINCOUNT": "300000", **ALL_CORES},
    "spinning for a short while": {"GOMP_SPINCOUNT": "10000", **ALL_CORES},
    "sleeping, as our commands do": ALL_CORES,
    "one thread": {"OMP_NUM_THREADS": "1"},
}
STARTING = "from ether_diffusion.console import share_machine; share_machine(); "
LIBRARIES = {
    "Python": "pass",
    "torch": "import torch",
    "transformers and PEFT": "import peft",
    "diffusers": "from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel",
    "ether_diffusion": "import ether_diffusion.training.run",
}
PROMPT = "a sks animal"


class Cost(NamedTuple):
    """What a finished process took: seconds of processor time and by the clock, and MiB at its peak."""

    cpu: float
    seconds: float
    peak: float


def cost_of(command: Sequence[str], environment: Mapping[str, str] = os.environ) -> Cost:
    """Run a command and return what it cost.

    Raises:
        RuntimeError: it failed; the message ends with what it said.
    """
    with tempfile.TemporaryFile("w+") as said:
        began = time.monotonic()
        process = subprocess.Popen(command, env=environment, stdout=said, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - began
        if status:
            said.seek(0)
            raise RuntimeError(f"{' '.join(command)} failed: {said.read()[-2000:]}")
    return Cost(usage.ru_utime + usage.ru_stime, seconds, usage.ru_maxrss / 1024)


def medians(contenders: Mapping[str, Callable[[], Cost]], rounds: int) -> dict[str, Cost]:
    """Run every contender once a round, in shuffled order, and return the medians of its costs."""
    costs: dict[str, list[Cost]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name in random.sample(list(contenders), len(contenders)):
            costs[name].append(contenders[name]())
    return {name: Cost(*map(statistics.median, zip(*found, strict=True))) for name, found in costs.items()}


def train(photos: Path, num_steps: int, environment: Mapping[str, str], *flags: str) -> Cost:
    """Return the cost of a run of train-dreambooth into a folder that is gone after."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "ether_diffusion.scripts.train_dreambooth"]
        command += ["--instance_data_dir", str(photos), "--output_dir", folder + "/run"]
        command += ["--instance_prompt", PROMPT, "--max_train_steps", str(num_steps)]
        command += ["--pretrained_model_name_or_path", str(tiny_world_path()), *flags]
        return cost_of(command, os.environ | environment)


@contextmanager
def busy_core() -> Iterator[None]:
    """Keep one core busy meanwhile."""
    neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        neighbour.kill()
        neighbour.wait()


def bench_neighbour(photos: Path, num_steps: int, rounds: int) -> None:
    """Print what a run costs in each way, quiet and beside a busy core."""

    def run(way: str, *, is_busy: bool) -> Cost:
        with busy_core() if is_busy else nullcontext():
            return train(photos, num_steps, WAYS[way], "--train_batch_size", "6")

    contenders = {
        f"{way}, {'busy' if is_busy else 'quiet'}": partial(run, way, is_busy=is_busy)
        for way in WAYS
        for is_busy in (False, True)
    }
    found = medians(contenders, rounds)
    print(
        f"| {num_steps} steps of six photos | quiet, s | beside a busy core, s | ratio |\n|---|---|---|---|"
    )
    for way in WAYS:
        quiet, busy = found[f"{way}, quiet"][1], found[f"{way}, busy"][1]
        print(f"| {way} | {quiet:.1f} | {busy:.1f} | {busy / quiet:.2f} |")


def bench_start(photos: Path, rounds: int) -> None:
    """Print where the processor time of a short run goes."""
    contenders = {
        name: partial(cost_of, [sys.executable, "-c", STARTING + code]) for name, code in LIBRARIES.items()
    }
    contenders |= {f"{n} steps": partial(train, photos, n, {}) for n in (1, 21)}
    found = {name: cost.cpu for name, cost in medians(contenders, rounds).items()}
    step = (found["21 steps"] - found["1 steps"]) / 20
    print("| train-dreambooth, 20 steps | processor seconds |\n|---|---|")
    before = 0.0
    for name in LIBRARIES:
        print(f"| importing {name} | {found[name] - before:.2f} |")
        before = found[name]
    print(f"| photos, prompts, loading, checks, result | {found['1 steps'] - step - before:.2f} |")
    print(f"| all outside the steps | {found['1 steps'] - step:.2f} |")
    print(f"| 20 steps | {20 * step:.2f} |")


def bench_diffusers(photos: Path, script: Path, steps: Sequence[int], rounds: int) -> None:
    """Print whole runs of ours beside diffusers' own, LoRA of rank 4 in both, and ETHER+."""
    same = ["--train_batch_size", "1", "--resolution", "64", "--seed", "0", "--pre_compute_text_embeddings"]
    same += ["--checkpointing_steps", "100000"]

    def theirs(num_steps: int) -> Cost:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, str(script), "--instance_data_dir", str(photos), "--rank", "4", *same]
            command += ["--instance_prompt", PROMPT, "--output_dir", folder]
            command += ["--pretrained_model_name_or_path", str(tiny_world_path())]
            return cost_of([*command, "--max_train_steps", str(num_steps)])

    print("| whole run, batch 1 | diffusers' LoRA r=4, s | our LoRA r=4 | our ETHER+ |\n|---|---|---|---|")
    for num_steps in steps:
        ours = {
            name: partial(train, photos, num_steps, {}, *flags, *same)
            for name, flags in {
                "lora": ("--adapter", "lora", "--rank", "4"),
                "ether_plus": ("--adapter", "ether_plus"),
            }.items()
        }
        found = medians({"theirs": partial(theirs, num_steps), **ours}, rounds)
        floor = found["theirs"][1]
        cells = [f"{found[name][1]:.1f} ({found[name][1] / floor:.2f})" for name in ours]
        print(f"| {num_steps} steps | {floor:.1f} | {' | '.join(cells)} |", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and run one bench."""
    share_machine()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["neighbour", "start", "diffusers"])
    parser.add_argument("--steps", type=int, nargs="+", help="30; of diffusers 20, 200 and 1,000")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--script", type=Path, help="diffusers' examples/dreambooth/train_dreambooth_lora.py")
    given = parser.parse_args(arguments)
    from ether_diffusion.tiny_world.subjects import write_photos

    with tempfile.TemporaryDirectory() as folder:
        photos = Path(folder) / "photos"
        write_photos(find_concept("fox"), photos, count=6)
        if given.what == "neighbour":
            bench_neighbour(photos, (given.steps or [30])[0], given.rounds)
        elif given.what == "start":
            bench_start(photos, given.rounds)
        else:
            (photos / "metadata.jsonl").unlink()  # diffusers' script takes all in the folder for pictures
            bench_diffusers(photos, given.script, given.steps or [20, 200, 1000], given.rounds)


if __name__ == "__main__":
    main()
