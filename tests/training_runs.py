"""Training runs of about a second: a tiny random base, drawn photos, and what a run leaves."""

import atexit
import json
import os
import shutil
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image
from tiny_pipelines import tiny_sd, tiny_sdxl

from ether_diffusion.strict_json import Json
from ether_diffusion.training.config import DreamBoothConfig
from ether_diffusion.training.config.files import write_config_file

SIZE = 8
"""The native size (px) of the tiny bases."""
ABOUT_THE_CALL = ("log.jsonl", "run.json", "training_config.yaml")
"""Files that say when and how a run was called; all others are a function of what was trained."""


@cache
def _saved_base(seed: int, is_xl: bool) -> str:
    kept = TemporaryDirectory()
    atexit.register(kept.cleanup)
    (tiny_sdxl if is_xl else tiny_sd)(seed).save_pretrained(kept.name)
    return kept.name


def write_base(folder: Path, *, seed: int = 1, is_xl: bool = False) -> Path:
    """Write a random base, which is made once; other seeds give others."""
    shutil.copytree(_saved_base(seed, is_xl), folder, copy_function=shutil.copy, dirs_exist_ok=True)
    return folder


def write_photos(folder: Path, *, count: int = 3, wide: int = 1, seed: int = 0) -> Path:
    """Write photos with captions; `wide` times as wide as high."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng((wide, seed))
    for index in range(count):
        name = f"photo_{wide}_{index}"
        pixels = rng.integers(0, 256, (64, wide * 64, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"a sks cat by wall {index}")
    return folder


def config(tmp_path: Path, **flags: Json) -> DreamBoothConfig:
    """Return a run of four steps in tmp_path/run; base and photos are made where they are not there yet."""
    base, photos = tmp_path / "base", tmp_path / "photos"
    values: dict[str, Json] = {
        "pretrained_model_name_or_path": str(base),
        "instance_data_dir": str(photos),
        "output_dir": str(tmp_path / "run"),
        "max_train_steps": 4,
        "checkpointing_steps": 2,
        "num_blocks": 2,
        "export_lora": False,
    }
    values |= flags
    if values["pretrained_model_name_or_path"] == str(base) and not base.exists():
        write_base(base)
    if values["instance_data_dir"] == str(photos) and not photos.exists():
        write_photos(photos)
    return DreamBoothConfig.from_flat(values).resolved()


def command(config: DreamBoothConfig) -> list[str]:
    """Return the module and the arguments that ask for the same run, which a file beside it holds."""
    path = config.output.output_dir.with_suffix(".yaml")
    write_config_file(path, config)
    return ["-m", "ether_diffusion.scripts.train_dreambooth", "--config", str(path)]


def trained_files(run: Path) -> dict[str, bytes]:
    """Return all that a run's result depends on by names: adapters, checkpoints, images."""
    return {name: data for name, data in contents(run).items() if name not in ABOUT_THE_CALL}


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder by its relative name."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def log_of(run: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's log without what depends on the machine's speed."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "images_per_second"} for line in lines]


def environment() -> dict[str, str]:
    """Return the variables for a process that runs this checkout on one thread, without the hub."""
    root = str(Path(__file__).parent.parent)
    return {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
