"""Train methods on Tiny World's control images for equal steps, and compare how well they follow unseen ones.

The task of ETHER, Bini et al. 2024, arXiv:2405.20271, table 3 (semantic map to image), in small, and of
silhouettes and edges. `python -m research.study_control --output_dir runs/control` trains encoder-only,
ETHER, ETHER+, LoRA and OFT, about ten minutes each on one CPU core; stopped or killed, the same command goes
on.
"""

import argparse
import json
import logging
import math
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from ether_diffusion.adapters.format import CONFIG_NAME, ENCODER_NAME, TENSORS_NAME
from ether_diffusion.bases import open_base
from ether_diffusion.benchmark.plan import TINY_LEARNING_RATES
from ether_diffusion.console import StoppedError
from ether_diffusion.control import control_batch, controlled, read_control
from ether_diffusion.durable_files import write_files
from ether_diffusion.strict_json import Json
from ether_diffusion.tiny_world.pictures import generate
from ether_diffusion.training.config import ControlRunConfig
from ether_diffusion.training.methods import attach_saved
from ether_diffusion.training.run import train_dreambooth
from recipes.tiny_world.control_pairs import (
    CONTROL_FOLDER,
    CONTROL_TYPES,
    ControlType,
    Pair,
    draw_control,
    sample_pairs,
    training_concepts,
    validation_concepts,
    write_pairs,
)
from research import BASE
from research.base import load_base, side_of
from research.study import run_study, study_parser

METHODS = ("none", "ether", "ether_plus", "lora", "oft")
"""Encoder-only, and the adapters beside it."""
ROWS = ("none", *(f"{name}@{TINY_LEARNING_RATES[name]:g}" for name in METHODS[1:]))
"""Each at its rate of the benchmark."""
TRAINING_SEED, VALIDATION_SEED = 0, 1
"""Of the scenes: those of validation are others even of concepts that are in both."""
PAIRS_FOLDER, RUN_FOLDER = "pairs", "adapter"
SETTINGS_FILE, DRAWN_FILE = "settings.json", "drawn.safetensors"
BATCH, SEEDS_APART = 16, 100_000


@dataclass(frozen=True)
class StudySettings:
    """What is equal for all methods.

    Attributes:
        control_type: what a control image shows of a scene.
        num_pairs: scenes that are learned from.
        steps: updates of each training, of `batch_size` pairs.
        scenes_per_concept: drawn of each validation concept, in `inference_steps` at `guidance_scale`.
    """

    control_type: ControlType = "palette"
    num_pairs: int = 1040
    steps: int = 300
    batch_size: int = 16
    scenes_per_concept: int = 18
    inference_steps: int = 12
    guidance_scale: float = 3.0
    mixed_precision: str = "bf16"


@dataclass(frozen=True)
class StudyRun:
    """One training: a method at a rate (None: the method's own) and a seed."""

    method: str
    learning_rate: float | None
    seed: int

    @property
    def row(self) -> str:
        """The name of its row: runs of other seeds have the same."""
        return self.method if self.learning_rate is None else f"{self.method}_{self.learning_rate:g}"

    def folder(self, root: Path) -> Path:
        """Return where it lies."""
        return root / f"{self.row}_{self.seed}"


@dataclass(frozen=True)
class DrawnRun:
    """What came of a training: pictures (n, 3, h, h) in [-1, 1] of the validation pairs, and its size.

    `parameters` are the adapter's, without the encoder's `encoder_parameters`; None of the base alone.
    """

    pictures: Tensor
    learning_rate: float | None
    parameters: int | None
    encoder_parameters: int | None


def validation_pairs(settings: StudySettings) -> tuple[Pair, ...]:
    """Return the pairs that are drawn: concepts that control never learned from, anywhere and turned."""
    concepts = validation_concepts()
    number = len(concepts) * settings.scenes_per_concept
    shown = settings.control_type
    return sample_pairs(concepts, number, control_type=shown, seed=VALIDATION_SEED, scattered=True)


def carry_out(run: StudyRun, root: Path, settings: StudySettings) -> DrawnRun:
    """Train and draw one run, go on where it was stopped, or read what came of it before.

    Raises:
        ValueError: the settings cannot be used, or an earlier run had others.
        StoppedError: a signal stopped the training; called again, it goes on.
    """
    folder = run.folder(root)
    check_settings(folder, {"run": asdict(run), "settings": asdict(settings)})
    adapter = folder / RUN_FOLDER
    if not (folder / DRAWN_FILE).is_file():
        _train(run, adapter, write_training_pairs(root, settings), settings)
        pipeline = load_base()
        attach(pipeline, adapter)
        write_files(folder, {DRAWN_FILE: save({"pictures": _draw(pipeline, settings, run.seed, adapter)})})
    rows = [json.loads(line) for line in (adapter / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return DrawnRun(
        pictures=_read_pictures(folder),
        learning_rate=max(row["learning_rate"] for row in rows if "loss" in row),
        parameters=_count(adapter / TENSORS_NAME),
        encoder_parameters=_count(adapter / ENCODER_NAME),
    )


def draw_base(root: Path, settings: StudySettings, seed: int) -> DrawnRun:
    """Draw what the base makes of the captions alone, or read it."""
    folder = root / f"base_{seed}"
    check_settings(folder, {"seed": seed, "settings": asdict(settings)})
    if not (folder / DRAWN_FILE).is_file():
        write_files(folder, {DRAWN_FILE: save({"pictures": _draw(load_base(), settings, seed, None)})})
    return DrawnRun(_read_pictures(folder), None, None, None)


def check_settings(folder: Path, asked: dict[str, Json]) -> None:
    """Write what a folder holds the result of; refuse one of other settings.

    Raises:
        ValueError: it was made with others.
    """
    file = folder / SETTINGS_FILE
    if file.is_file():
        if json.loads(file.read_bytes()) != json.loads(json.dumps(asked)):
            raise ValueError(f"{folder} holds a run of other settings; name another folder for this study")
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_files(folder, {SETTINGS_FILE: (json.dumps(asked, indent=1) + "\n").encode()})


def write_training_pairs(root: Path, settings: StudySettings) -> Path:
    """Write the pairs that all methods learn from, once; return their folder."""
    folder = root / PAIRS_FOLDER
    if not (folder / "metadata.jsonl").is_file():  # written last
        pairs = sample_pairs(
            training_concepts(),
            settings.num_pairs,
            control_type=settings.control_type,
            seed=TRAINING_SEED,
            scattered=True,
        )
        write_pairs(pairs, folder, size=open_base(BASE).native_size)
    return folder


def attach(pipeline: StableDiffusionPipeline, adapter: Path) -> None:
    """Attach the adapter of a run to a pipeline; encoder-only has none."""
    if (adapter / CONFIG_NAME).is_file():
        attach_saved(pipeline, adapter)


def _train(run: StudyRun, adapter: Path, pairs: Path, settings: StudySettings) -> None:
    given: dict[str, Json] = {
        "pretrained_model_name_or_path": BASE,
        "adapter": run.method,
        "seed": run.seed,
        "instance_data_dir": str(pairs),
        "conditioning_data_dir": str(pairs / CONTROL_FOLDER),
        "control_type": settings.control_type,
        "output_dir": str(adapter),
        "max_train_steps": settings.steps,
        "train_batch_size": settings.batch_size,
        "mixed_precision": settings.mixed_precision,
        "checkpointing_steps": 50,
        "crops_per_photo": 1,
        "export_lora": False,
    }
    if run.learning_rate is not None:
        given["learning_rate"] = run.learning_rate
    if code := train_dreambooth(ControlRunConfig.from_flat(given)):
        raise StoppedError(code, adapter)


@torch.no_grad()
def _draw(
    pipeline: StableDiffusionPipeline, settings: StudySettings, seed: int, encoder_folder: Path | None
) -> Tensor:
    """Draw the validation pairs: uint8 (n, 3, h, h). Picture k has the same noise for every method."""
    pairs = validation_pairs(settings)
    encoder = None if encoder_folder is None else read_control(encoder_folder)
    pieces = []
    for start in range(0, len(pairs), BATCH):
        part = pairs[start : start + BATCH]
        with ExitStack() as stack:
            if encoder is not None:
                side = side_of(pipeline)
                maps = [draw_control(pair, size=side) for pair in part]
                images = control_batch(maps, height=side, width=side, control_type=settings.control_type)
                stack.enter_context(controlled(pipeline.unet, encoder, images))
            found, _ = generate(
                pipeline,
                [pair.caption for pair in part],
                num_steps=settings.inference_steps,
                guidance_scale=settings.guidance_scale,
                seed=seed * SEEDS_APART + start,
            )
        pieces.append(((found.clamp(-1, 1).nan_to_num(-1) + 1) * 127.5).round().to(torch.uint8).contiguous())
    return torch.cat(pieces)


def _read_pictures(folder: Path) -> Tensor:
    pictures: Tensor = load_file(folder / DRAWN_FILE)["pictures"]
    return pictures.float() / 127.5 - 1


def _count(file: Path) -> int:
    """Count the numbers of a safetensors file; 0 where there is none."""
    if not file.is_file():
        return 0
    with safe_open(file, "pt") as tensors:
        return sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118


logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study and write its JSON, plot and sheet. Return 0, or 2 for what the user can mend."""
    parser = study_parser(__doc__)
    parser.add_argument(
        "--methods",
        nargs="+",
        default=ROWS,
        metavar="NAME[@RATE]",
        help="none is encoder-only; without a rate the paper's, where it has one (all five, at the "
        "benchmark's rates)",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--control_type", choices=CONTROL_TYPES, help="(palette)")
    parser.add_argument("--steps", type=int, help="updates of each training (300)")
    parser.add_argument("--batch_size", type=int, help="pairs of an update (16)")
    parser.add_argument("--num_pairs", type=int, help="scenes to learn from (1040)")
    parser.add_argument("--scenes_per_concept", type=int, help="drawn of each of eight concepts (18)")
    parser.add_argument("--inference_steps", type=int, help="of each picture (12)")
    parser.add_argument("--mixed_precision", choices=("no", "bf16", "fp16"), help="of training (bf16)")
    parser.add_argument("--results", type=Path, help="folder that gets the JSON, the plot and the sheet, too")
    return run_study("study_control", parser, _run, arguments)


def read_entry(text: str) -> tuple[str, float | None]:
    """Return method and rate of "oft@1e-4"; no rate is the method's own.

    Raises:
        ValueError: there is no such method, or the rate is no number above 0.
    """
    method, given, rate = text.partition("@")
    if method not in METHODS:
        raise ValueError(f"found the method {method!r}; use {', '.join(METHODS)}")
    if not given:
        return method, None
    try:
        found = float(rate)
    except ValueError:
        found = 0.0
    if not 0 < found < float("inf"):
        raise ValueError(f"found the rate {rate!r} of {method}; use a number above 0")
    return method, found


def _run(parsed: argparse.Namespace) -> None:
    entries = [read_entry(text) for text in dict.fromkeys(parsed.methods)]
    from ether_diffusion.durable_files import write_files
    from ether_diffusion.pipelines.metadata import png_bytes
    from research.control_results import (
        draw_study,
        score_runs,
        study_json,
        study_sheet,
        study_table,
        tiny_yardsticks,
        true_run,
    )

    names = {field.name for field in fields(StudySettings)}
    given = {key: value for key, value in vars(parsed).items() if key in names and value is not None}
    settings, root, seeds = StudySettings(**given), parsed.output_dir, list(dict.fromkeys(parsed.seeds))
    runs = {"true": [true_run(settings)], "base": [draw_base(root, settings, seed) for seed in seeds]}
    for method, rate in entries:
        planned = [StudyRun(method, rate, seed) for seed in seeds]
        runs[planned[0].row] = [carry_out(run, root, settings) for run in planned]
        logger.info("%s is drawn", planned[0].row)
    yardsticks = tiny_yardsticks()
    rows = {name: score_runs(found, settings, yardsticks) for name, found in runs.items()}
    sheet = study_sheet({name: found[0] for name, found in runs.items()}, settings)
    files = {
        "control.json": study_json(rows, settings, seeds),
        "control.png": draw_study(rows),
        "control_sheet.png": png_bytes(sheet),
    }
    for folder in (root, *([parsed.results] if parsed.results else [])):
        folder.mkdir(parents=True, exist_ok=True)
        write_files(folder, files)
    print(study_table(rows))


if __name__ == "__main__":
    sys.exit(main())
