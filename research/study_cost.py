"""What each method costs on SD 1.5: parameters, file size, seconds of a training step, and its memory.

`python -m research.study_cost --output_dir runs/cost --latent 32` takes about ten minutes on one CPU core:
steps and memory are measured, at random weights; `--what size` takes seconds. It writes cost.json and
cost.png.
"""

import argparse
import logging
import statistics
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from research.study import run_study, study_parser, write_study

if TYPE_CHECKING:
    from peft import PeftConfig

    from ether_diffusion.strict_json import Json

logger = logging.getLogger(__name__)

WHAT = ("size", "step", "memory")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study. Return 0, or 2 for what the user can mend."""
    parser = study_parser(__doc__)
    parser.add_argument("--what", nargs="+", default=WHAT, choices=WHAT, help="all of them by default")
    parser.add_argument("--latent", type=int, default=64, help="side of the latents of a step (64)")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds of steps (5)")
    return run_study("study_cost", parser, _run, arguments)


def _run(parsed: argparse.Namespace) -> None:
    import torch

    from research.cost import draw_costs
    from tools.benchmark import machine

    torch.set_num_threads(1)
    methods: dict[str, dict[str, Json]] = {name: {} for name in _configs()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of methods compared with
        for part, measure in (("size", _sizes), ("step", _steps), ("memory", _memory)):
            if part in parsed.what:
                for name, costs in measure(parsed, list(methods)).items():
                    logger.info("%s: %s", name, costs)
                    methods[name] |= costs
    found = {"machine": machine(), "latent": parsed.latent, "methods": methods}
    write_study(parsed.output_dir, "cost", found, cost=draw_costs(methods))


def _configs() -> Mapping[str, "PeftConfig"]:
    from tools import benchmark

    configs = benchmark.ether_methods(benchmark.ATTENTION) | benchmark.peft_methods(benchmark.ATTENTION)
    return {name: config for name, config in configs.items() if "BOFT" not in name}  # far too slow


def _sizes(parsed: argparse.Namespace, names: Sequence[str]) -> Mapping[str, Mapping[str, "Json"]]:
    from research.cost import count_parameters

    configs = _configs()
    return {name: dict(count_parameters(configs[name])) for name in names}


def _steps(parsed: argparse.Namespace, names: Sequence[str]) -> Mapping[str, Mapping[str, "Json"]]:
    from tools.bench_reflections import time_unet

    times = time_unet(parsed.latent, parsed.rounds)
    floor = times["frozen"]
    costs: dict[str, Mapping[str, Json]] = {}
    for name in names:
        by_round = sorted(t / f for t, f in zip(times[name], floor, strict=True))
        costs[name] = {
            "step_over_frozen": {
                "median": statistics.median(times[name]) / statistics.median(floor),
                "low": by_round[len(by_round) // 4],
                "high": by_round[-1 - len(by_round) // 4],
            },
            "seconds": statistics.median(times[name]),
        }
    return costs


def _memory(parsed: argparse.Namespace, names: Sequence[str]) -> Mapping[str, Mapping[str, "Json"]]:
    from tools.bench_memory import FLOOR, measure_all

    peaks = measure_all([FLOOR, *names], parsed.latent)
    return {name: {"peak_mib_over_frozen": round(peaks[name] - peaks[FLOOR], 1)} for name in names}


if __name__ == "__main__":
    sys.exit(main())
