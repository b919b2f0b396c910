"""What adapters cost that are trained together: eight subjects by one process, and by eight in turn.

    python -m tools.bench_jobs [--jobs 8] [--steps 50 200] [--batch 1] [--rounds 3]

Whole processes of train-dreambooth on Tiny World, start and result included, in shuffled rounds; medians. The
floor of a further step of all is as many frozen steps: the UNet forward and backward on one run's batch.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file

from ether_diffusion.bases import open_base
from ether_diffusion.console import share_machine
from ether_diffusion.tiny_world.concepts import find_concept
from ether_diffusion.tiny_world.subjects import write_photos
from tools import benchmark
from tools.bench_process import PROMPT, Cost, cost_of

COMMAND = [sys.executable, "-m", "ether_diffusion.scripts.train_dreambooth", "--num_validation_images", "1"]
COMMAND += ["--pretrained_model_name_or_path", "tiny_world"]
TURN, TOGETHER = "in turn", "together"


def frozen_step(batch: int, rounds: int) -> float:
    """Return the seconds of processor time of Tiny World's UNet forward and backward."""
    base = open_base("tiny_world")
    unet = base.load_denoiser().train()
    side = base.native_size // base.vae_scale_factor
    base.set_attention(unet, "auto", latent_side=side)
    latents = torch.randn(batch, 4, side, side, requires_grad=True)
    texts = base.load_text_encoders().encode([PROMPT] * batch)

    def step() -> None:
        timesteps = torch.full((batch,), 500)
        torch.autograd.backward(base.predict(unet, latents, timesteps, texts).square().mean())

    times = benchmark.interleave({"frozen": step}, rounds=rounds, repeats=15)
    return statistics.median(times["frozen"])


def in_turn(jobs: Sequence[dict[str, object]]) -> Cost:
    """Train jobs by a process each; return the sum of their costs, and the largest peak of memory."""
    costs = [cost_of([*COMMAND, *(f"--{name}={value}" for name, value in job.items())]) for job in jobs]
    return Cost(sum(c.cpu for c in costs), sum(c.seconds for c in costs), max(c.peak for c in costs))


def together(jobs: Sequence[dict[str, object]], folder: Path) -> Cost:
    """Train jobs by one process."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    return cost_of([*COMMAND, "--jobs", str(folder / "jobs.json")])


def largest_difference(first: Path, second: Path) -> float:
    """Return the largest difference between numbers of two adapters."""
    one, other = (load_file(each / "adapter_model.safetensors") for each in (first, second))
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and print the tables."""
    share_machine()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=8)
    parser.add_argument("--steps", type=int, nargs=2, default=[50, 200], help="two numbers of steps")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args(arguments)
    costs: dict[tuple[str, int], list[Cost]] = {}
    with tempfile.TemporaryDirectory() as place:
        root, differences = Path(place), list[float]()
        for number in range(given.jobs):
            concept = find_concept(("fox", "cat")[number % 2])
            write_photos(concept, root / "photos" / str(number), count=6)
        for turn in range(given.rounds):
            for num_steps in given.steps:
                work, shared = dict[str, Callable[[], Cost]](), {"max_train_steps": num_steps}
                for way in (TURN, TOGETHER):
                    folder = root / f"{turn}-{num_steps}-{way.replace(' ', '-')}"
                    folder.mkdir()
                    jobs = [
                        {"instance_data_dir": str(root / "photos" / str(number)), "instance_prompt": PROMPT,
                         "output_dir": str(folder / str(number)), "seed": number,
                         "train_batch_size": given.batch, **shared}
                        for number in range(given.jobs)
                    ]  # fmt: skip
                    work[way] = partial(in_turn, jobs) if way == TURN else partial(together, jobs, folder)
                for way in random.sample([*work], len(work)):
                    costs.setdefault((way, num_steps), []).append(work[way]())
                pairs = [[root / f"{turn}-{num_steps}-{way.replace(' ', '-')}" / str(k) for way in work]
                         for k in range(given.jobs)]  # fmt: skip
                differences += [largest_difference(*pair) for pair in pairs]
    frozen = frozen_step(given.batch, given.rounds)
    found = {key: Cost(*map(statistics.median, zip(*each, strict=True))) for key, each in costs.items()}
    rows = {
        f"{num_steps} steps, {way}": {
            "processor s": f"{cost.cpu:.1f}",
            "by the clock, s": f"{cost.seconds:.1f}",
            "÷ in turn": f"{cost.cpu / found[TURN, num_steps].cpu:.2f}",
            "peak MiB": f"{cost.peak:.0f}",
        }
        for (way, num_steps), cost in sorted(found.items(), key=lambda item: (item[0][1], item[0][0]))
    }
    print(benchmark.table(rows, f"{given.jobs} subjects on Tiny World, batch {given.batch} each, ETHER+"))
    first, last = given.steps
    for way in (TURN, TOGETHER):
        step = (found[way, last].cpu - found[way, first].cpu) / (last - first)
        share = f"{step / given.jobs / frozen:.2f} of {given.jobs} frozen steps"
        print(f"A further step of all {way}: {step * 1000:.0f} ms, {share}.")
    print(f"The largest difference between numbers of the adapters: {max(differences):.1e}.")


if __name__ == "__main__":
    main()
