"""Photographs from cameras train on Tiny World by every way that data can come.

Skipped unless ETHER_PHOTOGRAPHS names a folder with a subfolder of photographs for each subject, like
DreamBooth's data set, which is not ours to ship.
"""

import csv
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from statistics import mean

import pytest
from diffusers import StableDiffusionPipeline
from PIL import Image
from training_runs import log_of

from ether_diffusion import load_ether
from ether_diffusion.strict_json import Json
from ether_diffusion.tiny_world import tiny_world_path
from ether_diffusion.training.config import DreamBoothConfig
from ether_diffusion.training.run import train_dreambooth

FOLDER = os.environ.get("ETHER_PHOTOGRAPHS")
SUBJECTS = sorted(path.name for path in Path(FOLDER).iterdir() if path.is_dir()) if FOLDER else []
STEPS = 40

pytestmark = pytest.mark.skipif(
    FOLDER is None, reason="runs where ETHER_PHOTOGRAPHS names a folder of subjects"
)


def photos_of(subject: str, folder: Path) -> Path:
    assert FOLDER is not None
    return Path(shutil.copytree(Path(FOLDER) / subject, folder / "photos"))


def by_folder(photos: Path) -> dict[str, Json]:
    return {"instance_data_dir": str(photos), "instance_prompt": "a sks object"}


def by_sidecars(photos: Path) -> dict[str, Json]:
    for number, path in enumerate(sorted(photos.iterdir())):
        path.with_suffix(".txt").write_text(f"a {{token}} object, photo {number}")
    return {"instance_data_dir": str(photos), "token": "sks"}


def by_jsonl(photos: Path) -> dict[str, Json]:
    rows = [{"file_name": path.name, "text": "a sks object"} for path in sorted(photos.iterdir())]
    (photos / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {"instance_data_dir": str(photos), "caption_dropout": 0.2}


def by_csv(photos: Path) -> dict[str, Json]:
    names = sorted(path.name for path in photos.iterdir())
    with (photos / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("file_name", "text"), *((name, "a sks object") for name in names)])
    return {"instance_data_dir": str(photos), "random_flip": True, "repeats": 3}


def by_data_set(photos: Path) -> dict[str, Json]:
    by_jsonl(photos)
    return {"dataset_name": str(photos), "caption_column": "text"}


def by_buckets(photos: Path) -> dict[str, Json]:
    return {**by_folder(photos), "use_aspect_ratio_buckets": True}


def by_masks(photos: Path) -> dict[str, Json]:
    masks = photos.parent / "masks"
    masks.mkdir()
    for path in sorted(photos.iterdir()):
        with Image.open(path) as photo:
            mask = Image.new("L", photo.size)
        width, height = mask.size
        mask.paste(255, (width // 4, height // 4, 3 * width // 4, 3 * height // 4))
        mask.save(masks / f"{path.stem}.png")
    return {**by_folder(photos), "mask_data_dir": str(masks), "unmasked_weight": 0.1}


def by_workers(photos: Path) -> dict[str, Json]:
    return {**by_folder(photos), "cache_latents": False, "dataloader_num_workers": 2}


WAYS: list[Callable[[Path], dict[str, Json]]] = [
    by_folder,
    by_sidecars,
    by_jsonl,
    by_csv,
    by_data_set,
    by_buckets,
    by_masks,
    by_workers,
]


@pytest.mark.parametrize(
    ("subject", "way"), [(subject, WAYS[index % len(WAYS)]) for index, subject in enumerate(SUBJECTS)]
)
def test_photographs_train_save_load_and_export(
    tmp_path: Path, subject: str, way: Callable[[Path], dict[str, Json]]
) -> None:
    given = way(photos_of(subject, tmp_path))
    run = tmp_path / "run"
    settings: dict[str, Json] = {"max_train_steps": STEPS, "train_batch_size": 4, "output_dir": str(run)}
    assert train_dreambooth(DreamBoothConfig.from_flat({**given, **settings}).resolved()) == 0
    losses = [line["loss"] for line in log_of(run)]
    assert mean(losses[-10:]) < 0.9 * mean(losses[:10])
    pipe = StableDiffusionPipeline.from_pretrained(tiny_world_path())
    assert load_ether(pipe, run).base_match == "same"
    pipe = StableDiffusionPipeline.from_pretrained(tiny_world_path())
    pipe.load_lora_weights(str(run))
    assert pipe.get_active_adapters()
