"""Measure how saved adapters of any method change the hyperspherical energy of the base's attention weights.

`python -m research.study_energy --adapters runs/benchmark --output_dir runs/energy` takes seconds an
adapter; it trains nothing and writes energy.json and energy.png.

Hyperspherical energy before and after training: what each method's saved adapters change of it.

ETHER, Bini et al. 2024, arXiv:2405.20271, figure 7: nothing for OFT and ETHER, most for ETHER+.
"""

import argparse
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ether_diffusion.benchmark.plan import LABELS
from ether_diffusion.metrics.report import new_figure, png_of
from ether_diffusion.metrics.scores import Estimate, estimate
from ether_diffusion.strict_json import Json
from ether_diffusion.tiny_world import resolve_base
from ether_diffusion.training.methods import attach_saved
from ether_diffusion.tuner import EtherConfig
from research import BASE
from research.distances import effective_weight
from research.study import run_study, study_parser, write_study

_MAX_PAIRS = 2**24
"""Distances held at once."""


@torch.no_grad()
def hyperspherical_energy(weight: Tensor) -> float:
    """Return Σ over pairs of rows of W (out, in) of 1 / ‖ŵᵢ − ŵⱼ‖, in float64: how evenly neurons point.

    Liu et al. 2018, arXiv:1805.09298, with s = 1; in ETHER, Bini et al. 2024, section 5.3 and figure 7. An
    orthogonal matrix on the input side leaves it as it is. Infinite if two rows point one way.
    """
    neurons = nn.functional.normalize(weight.double(), dim=1)
    total, chunk = 0.0, max(1, _MAX_PAIRS // len(neurons))
    for start in range(0, len(neurons), chunk):
        rows = neurons[start : start + chunk]
        distances = torch.cdist(rows, neurons, compute_mode="donot_use_mm_for_euclid_dist")
        later = torch.arange(len(neurons)) > torch.arange(start, start + len(rows))[:, None]
        total += float((1 / distances[later]).sum())
    return total


@torch.no_grad()
def energy_changes(model: nn.Module) -> tuple[Sequence[float], Sequence[float]]:
    """Return the energy of each adapted Linear of a model, and what its adapters in force add to it.

    Raises:
        ValueError: no Linear is adapted.
    """
    before, change = [], []
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer) and isinstance(layer.get_base_layer(), nn.Linear):
            energy = hyperspherical_energy(layer.get_base_layer().weight)
            before.append(energy)
            change.append(hyperspherical_energy(effective_weight(layer)) - energy)
    if not before:
        raise ValueError("the model has no adapted Linear")
    return before, change


BARS = {
    "relative_change": "mean over layers of ΔHE / HE",
    "absolute_change": "mean over layers of |ΔHE| / HE",
}


@dataclass(frozen=True)
class EnergyChange:
    """Of one adapter, relative to the energy before: the mean over layers, and that of the magnitudes."""

    method: str
    adapter: str
    relative_change: float
    absolute_change: float


@dataclass(frozen=True)
class EnergyStudy:
    """All adapters, and by method estimates of `BARS` with errors over adapters."""

    changes: Sequence[EnergyChange]

    @property
    def methods(self) -> Mapping[str, Mapping[str, Estimate]]:
        """Estimates by method."""
        by_method: dict[str, list[EnergyChange]] = {}
        for change in self.changes:
            by_method.setdefault(change.method, []).append(change)
        return {
            method: {name: _estimate(changes, name) for name in BARS} for method, changes in by_method.items()
        }

    def to_json(self) -> dict[str, Json]:
        """Return the numbers as JSON."""
        return {
            "methods": {
                method: {name: asdict(found) for name, found in row.items()}
                for method, row in self.methods.items()
            },
            "adapters": [asdict(change) for change in self.changes],
        }


def _estimate(changes: Sequence[EnergyChange], name: str) -> Estimate:
    return estimate([getattr(change, name) for change in changes], range(len(changes)))


def find_adapters(folders: Sequence[Path]) -> list[Path]:
    """Return the adapters in these folders and below them, checkpoints and parts of adapters left out.

    Raises:
        FileNotFoundError: a folder is not there or holds no adapter.
    """
    found = []
    for folder in folders:
        configs = sorted(folder.rglob("adapter_config.json"))
        own = [c.parent for c in configs if not _is_part(c.parent, folder)]
        if not own:
            raise FileNotFoundError(
                f"{folder} holds no adapter_config.json; give folders of trained adapters"
            )
        found += own
    return found


def _is_part(folder: Path, root: Path) -> bool:
    """Say whether a folder is a checkpoint's, a kept best one, or the text encoder of an adapter."""
    names = folder.relative_to(root).parts
    return any(name == "best" or name.startswith(("checkpoint-", "text_encoder")) for name in names)


def carry_out(adapters: Sequence[Path], base: str, *, on_progress: Callable[[str], None]) -> EnergyStudy:
    """Measure saved adapters, each attached to a base of its own.

    Raises:
        ValueError: an adapter does not fit the base.
    """
    changes = []
    for folder in adapters:
        pipeline = StableDiffusionPipeline.from_pretrained(resolve_base(base), dtype=torch.float32)
        attach_saved(pipeline, folder)
        before, change = energy_changes(pipeline.unet)
        ratios = [added / energy for added, energy in zip(change, before, strict=True)]
        row = EnergyChange(
            _method_of(folder),
            folder.name if folder.name != "adapter" else folder.parent.name,
            sum(ratios) / len(ratios),
            sum(map(abs, ratios)) / len(ratios),
        )
        changes.append(row)
        on_progress(f"{row.method}, {row.adapter}: {row.relative_change:+.2e}, |.| {row.absolute_change:.2e}")
    return EnergyStudy(changes)


def _method_of(folder: Path) -> str:
    """Return the method of a saved adapter as training names it: "ether_plus", "lora", "oft" …"""
    config = PeftConfig.from_pretrained(str(folder))
    if isinstance(config, EtherConfig):
        return config.variant
    return str(getattr(config.peft_type, "value", config.peft_type)).lower()


def draw_bars(study: EnergyStudy) -> bytes:
    """Return a PNG: what each method changes of the energy, in percent.

    Raises:
        ValueError: matplotlib is not installed.
    """
    methods = study.methods
    figure = new_figure(4.8 * len(BARS), 1.4 + 0.42 * len(methods))
    for axes, (name, title) in zip(figure.subplots(1, len(BARS), sharey=True), BARS.items(), strict=True):
        found = [row[name] for row in methods.values()]
        axes.barh(
            [LABELS.get(name, name) for name in methods],
            [100 * each.mean for each in found],
            xerr=[100 * (each.standard_error or 0.0) for each in found],
            capsize=3,
            color="#5b8ff9",
        )
        axes.axvline(0, color="black", linewidth=0.6)
        axes.set_title(title)
        axes.set_xlabel("%")
        axes.grid(axis="x", alpha=0.3)
    figure.axes[0].invert_yaxis()
    return png_of(figure)


logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study. Return 0, or 2 for what the user can mend."""
    parser = study_parser(__doc__)
    parser.add_argument(
        "--adapters",
        nargs="+",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="of adapters, or of runs that hold some",
    )
    parser.add_argument("--base", default=BASE, help=f"what they were trained on ({BASE})")
    return run_study("study_energy", parser, _run, arguments)


def _run(parsed: argparse.Namespace) -> None:
    study = carry_out(find_adapters(parsed.adapters), parsed.base, on_progress=logger.info)
    found = {"base": parsed.base, **study.to_json()}
    write_study(parsed.output_dir, "energy", found, energy=draw_bars(study))


if __name__ == "__main__":
    sys.exit(main())
