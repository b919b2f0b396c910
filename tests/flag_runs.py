"""Runs that differ by one option: a tiny base, drawn photos, and what a run leaves and says."""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import photo_files
import pytest
import torch
from diffusers import AutoencoderKL
from encoder_models import save_clip, save_dino
from flow_pipelines import flow_pipeline
from PIL import Image
from safetensors.torch import load
from tiny_pipelines import tiny_sd
from training_runs import log_of, write_base, write_photos
from transformers import CLIPTokenizer

from ether_diffusion.scripts.train_dreambooth import main
from ether_diffusion.strict_json import Json
from ether_diffusion.training.config import DreamBoothConfig
from ether_diffusion.training.processes import make_accelerator
from ether_diffusion.training.run import train_dreambooth
from ether_diffusion.training.setup import Run, check_run, load_run

Flags = dict[str, Json]

PLAIN: Flags = {
    "pretrained_model_name_or_path": "@base",
    "instance_data_dir": "@photos",
    "instance_prompt": "a sks cat",
    "max_train_steps": 3,
    "checkpointing_steps": 3,
    "num_blocks": 2,
    "export_lora": False,
}
"""What every run here has in common; "@" stands for the folder of the tests."""
MASKED: Flags = {"mask_data_dir": "@masks"}
FROZEN: Flags = {"prior_preservation": "frozen", "class_prompt": "a cat"}
CLASS_IMAGES: Flags = {
    "prior_preservation": "class_images",
    "class_data_dir": "@class images",
    "class_prompt": "a cat",
    "num_class_images": 2,
}
DATA_SET: Flags = {"instance_data_dir": None, "dataset_name": "@data set", "dataset_config_name": "one"}
LORA: Flags = {"adapter": "lora"}
FLOW: Flags = {"pretrained_model_name_or_path": "@flow base", "resolution": 32}
DRAWN: Flags = {
    "validation_prompt": ["a sks cat"],
    "num_validation_images": 1,
    "validation_num_inference_steps": 2,
}
MEASURED: Flags = {
    "eval_steps": 3,
    "eval_encoder": ["@clip"],
    "num_eval_images": 1,
    "eval_num_inference_steps": 1,
    "eval_max_drift": 100.0,
    "eval_max_prompt_loss": 1.0,
}


@dataclass(frozen=True)
class Outcome:
    """What a run left and said."""

    folder: Path
    said: str

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return load((self.folder / "adapter_model.safetensors").read_bytes())

    @property
    def trained(self) -> str:
        """A fingerprint of the adapter's values, whatever its file says of them."""
        values = [tensor.numpy().tobytes() for _, tensor in sorted(self.tensors.items())]
        return hashlib.sha256(b"".join(values)).hexdigest()

    @property
    def adapter_config(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "adapter_config.json").read_bytes())
        return found

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    @property
    def rates(self) -> list[float]:
        """The learning rate of each step, with plain's as unit."""
        return [round(line["learning_rate"] / 6e-3, 6) for line in log_of(self.folder)]

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """The lines of the log on what was measured."""
        return [line for line in log_of(self.folder) if "evaluation" in line]

    @property
    def evaluation(self) -> dict[str, Any]:
        """What was made of them."""
        found: dict[str, Any] = json.loads((self.folder / "evaluation.json").read_bytes())
        return found

    def names(self, pattern: str) -> list[str]:
        return sorted(str(path.relative_to(self.folder)) for path in self.folder.glob(pattern))


@contextmanager
def listening() -> Iterator[list[str]]:
    """Give a list of what is logged inside."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("ether_diffusion")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield said
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


class World:
    """Bases, photos and runs; the same flags are run once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.outcomes: dict[str, Outcome] = {}

    def place(self, value: Json) -> Json:
        if isinstance(value, list):
            return [self.place(item) for item in value]
        return str(self.folder / value[1:]) if isinstance(value, str) and value.startswith("@") else value

    def config(self, flags: Flags) -> DreamBoothConfig:
        values = {name: self.place(value) for name, value in (PLAIN | flags).items()}
        return DreamBoothConfig.from_flat(values)

    def run(self, **flags: Json) -> Outcome:
        key = json.dumps(flags, sort_keys=True)
        if key not in self.outcomes:
            self.outcomes[key] = self.run_anew(output_dir=f"@run {len(self.outcomes)}", **flags)
        return self.outcomes[key]

    def run_anew(self, **flags: Json) -> Outcome:
        return self.run_by(train_dreambooth, flags)

    def run_by(self, train: Callable[[DreamBoothConfig], int], flags: Flags) -> Outcome:
        config = self.config(flags)
        with listening() as said:
            assert train(config) == 0
        return Outcome(config.output.output_dir, "\n".join(said))

    def load(self, **flags: Json) -> Run:
        """Return a run before its first step."""
        config = self.config(flags).resolved()
        return load_run(check_run(config, make_accelerator(config.compute)), num_steps=1)


def write_cut_outs(folder: Path, masks: Path) -> None:
    """Write wide photos whose right halves are transparent, and the same as masks."""
    for path in sorted(write_photos(folder, wide=2).glob("*.png")):
        mask = Image.new("L", (128, 64))
        mask.paste(255, (0, 0, 64, 64))
        with Image.open(path) as opened:
            photo = opened.convert("RGB")
        photo.putalpha(mask)
        photo.save(path)
        masks.mkdir(exist_ok=True)
        mask.save(masks / path.name)
        path.with_suffix(".txt").unlink()


def write_data_set(folder: Path) -> None:
    """Write tables of two configurations, with two columns of photos and one of captions."""
    import datasets

    features = datasets.Features(
        {name: datasets.Image(decode=False) for name in ("image", "copy")}
        | {"words": datasets.Value("string")}
    )
    for number, name in enumerate(("one", "two")):
        first, second = (
            [{"bytes": photo_files.photo(10 * number + seed), "path": None} for seed in seeds]
            for seeds in (range(3), range(3, 6))
        )
        table = {"image": first, "copy": second, "words": ["a dog", "a car", "a house"]}
        datasets.Dataset.from_dict(table, features=features).to_parquet(folder / name / "train.parquet")
    configs = [f"- config_name: {name}\n  data_files: {name}/*\n" for name in ("one", "two")]
    (folder / "README.md").write_text(f"---\nconfigs:\n{''.join(configs)}---\n")


def write_drawing_base(folder: Path) -> None:
    """Write a base that draws pictures large enough to be trained on."""
    pipeline = tiny_sd()
    depth = 4
    pipeline.register_modules(
        vae=AutoencoderKL(
            block_out_channels=(4,) * depth,
            down_block_types=("DownEncoderBlock2D",) * depth,
            up_block_types=("UpDecoderBlock2D",) * depth,
            norm_num_groups=2,
            latent_channels=4,
        )
    )
    pipeline.save_pretrained(folder)


@contextmanager
def made_world(folder: Path) -> Iterator[World]:
    """Write what runs need into a folder, and give the world to run them in."""
    write_base(folder / "base")
    write_base(folder / "other base", seed=3)
    flow_pipeline("sd3").save_pretrained(folder / "flow base")
    save_clip(folder / "clip")
    save_dino(folder / "dino")
    tiny_sd(4).save_pretrained(folder / "base", variant="fp16")
    vocabulary = tiny_sd().tokenizer.get_vocab()
    moved = [*vocabulary][:2] + [*vocabulary][:1:-1]
    CLIPTokenizer(
        vocab={word: index for index, word in enumerate(moved)}, merges=[], model_max_length=16
    ).save_pretrained(folder / "tokenizer")
    write_cut_outs(folder / "photos", folder / "masks")
    write_photos(folder / "other photos", wide=3)
    write_photos(folder / "class images", wide=1)
    shutil.copytree(folder / "photos", folder / "mixed")
    (folder / "mixed" / "link.png").symlink_to(folder / "other photos" / "photo_3_0.png")
    (folder / "mixed" / "broken.png").write_bytes(b"")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", str(folder / "cache"))
        write_data_set(folder / "data set")
        yield World(folder)


def command(world: World, **flags: Json) -> int:
    """Run train-dreambooth by its command line."""
    words: list[str] = []
    for name, value in (PLAIN | flags).items():
        placed = world.place(value)
        words += [f"--{'' if value is not False else 'no-'}{name}"]
        words += [] if isinstance(value, bool) else [str(placed)]
    return main(words)
