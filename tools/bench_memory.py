"""Peak memory of one training step of SD 1.5's UNet beyond the loaded model, each method in its own process.

    python -m tools.bench_memory [--latent 64]

Linux only: reads the peak resident size from /proc, with malloc told to return freed pages at once.
"""

import argparse
import gc
import os
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from tools import benchmark
from tools.bench_reflections import attached, make_unet, unet_step

MIB = 2**20
FLOOR = "frozen"
METHODS = [
    FLOOR,
    "ETHER",
    "ETHER+",
    "PEFT LoRA r=4",
    "PEFT OFT 4 blocks",
    "PEFT HRA r=8",
    "PEFT DeLoRA r=8",
    "paper's way, ETHER",
    "paper's way, ETHER+",
]


def resident(field: str) -> int:
    """Return VmRSS (now) or VmHWM (peak) in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def measure(name: str, latent: int) -> float:
    """Return MiB that the peak of one step lies above the model and its adapter at rest."""
    unet, inputs = make_unet(latent)
    configs = benchmark.ether_methods(benchmark.ATTENTION) | benchmark.peft_methods(benchmark.ATTENTION)
    paper = {"paper's way, ETHER": False, "paper's way, ETHER+": True}.get(name)
    with attached(unet, configs.get(name), paper):
        gc.collect()
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        unet_step(unet, inputs)
        return (resident("VmHWM") - before) / MIB


def measure_all(names: Sequence[str], latent: int) -> dict[str, float]:
    """Return the peaks of methods in MiB, each measured in a process of its own."""
    small_pieces = {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "tools.bench_memory", "--latent", str(latent)]
    return {
        name: float(subprocess.check_output([*command, "--method", name], env=os.environ | small_pieces))
        for name in names
    }


def main() -> None:
    """Measure one method if named, else every method in a process of its own."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--latent", type=int, default=64, help="side of the latents")
    parser.add_argument("--method", choices=METHODS, help="measure this one only, here")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")  # PEFT's, of methods compared with
    if given.method:
        print(measure(given.method, given.latent))
        return
    peaks = measure_all(METHODS, given.latent)
    rows = {
        name: {"peak MiB": f"{peak:.0f}", "over the frozen step": f"{peak - peaks[FLOOR]:+.0f}"}
        for name, peak in peaks.items()
    }
    print(benchmark.machine())
    print(benchmark.table(rows, f"SD 1.5 UNet step, {given.latent}×{given.latent} latents, float32, batch 1"))


if __name__ == "__main__":
    main()
