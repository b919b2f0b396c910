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
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from peft import PeftConfig, get_peft_model_state_dict, inject_adapter_in_model

from ether_diffusion.adapters.tensor_file import PEFT_PREFIX, safetensors_bytes
from ether_diffusion.metrics.report import new_figure, png_of
from ether_diffusion.strict_json import Json
from research.study import run_study, study_parser, write_study

PANELS = {
    "parameters": "trained parameters",
    "file_bytes": "file, bytes",
    "step_over_frozen": "step ÷ frozen step",
    "peak_mib_over_frozen": "peak over the frozen step, MiB",
}
LOGARITHMIC = ("parameters", "file_bytes", "peak_mib_over_frozen")
NAME = "default"


def count_parameters(config: PeftConfig) -> Mapping[str, int]:
    """Return trained parameters of SD 1.5's UNet under a method, and bytes of their file in float32."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768, attention_head_dim=8
        ).requires_grad_(False)
        inject_adapter_in_model(config, unet, NAME)
    stored = get_peft_model_state_dict(unet, adapter_name=NAME)
    tensors = {f"{PEFT_PREFIX}{name}": torch.zeros(tensor.shape) for name, tensor in stored.items()}
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    return {
        "parameters": sum(parameter.numel() for parameter in trained),
        "file_bytes": len(safetensors_bytes(tensors, {"format": "pt"})),
    }


def draw_costs(methods: Mapping[str, Mapping[str, Any]]) -> bytes:
    """Return a PNG: a panel of bars for every cost that was measured.

    Raises:
        ValueError: matplotlib is not installed.
    """
    shown = [name for name in PANELS if any(name in costs for costs in methods.values())]
    figure = new_figure(1.4 + 3.4 * len(shown), 1.3 + 0.4 * len(methods))
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, shown, strict=True):
        there = {method: _middle(costs[name]) for method, costs in methods.items() if name in costs}
        bars = axes.barh(list(there), list(there.values()), color="#5b8ff9")
        axes.bar_label(bars, [_short(value) for value in there.values()], padding=3)
        if name in LOGARITHMIC:
            axes.set_xscale("log")
        axes.margins(x=0.25)
        axes.set_title(PANELS[name])
    panels[0].invert_yaxis()
    return png_of(figure)


def _middle(cost: Any) -> float:
    return float(cost["median"] if isinstance(cost, Mapping) else cost)


def _short(value: float) -> str:
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


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
