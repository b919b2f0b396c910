"""The export stage: the averaged weights as a stock Stable Diffusion pipeline in float16."""

import json
import logging
import shutil
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from ether_diffusion.tiny_world import FLOW_FOLDER, WEIGHTS_FOLDER
from ether_diffusion.tiny_world.concepts import RENDERS_FOLDER
from ether_diffusion.tiny_world.networks import IMAGE_TOWER_FOLDER, PROJECTION_FILE, SEGMENTER_FILE, Segmenter
from recipes.tiny_world.judge import JUDGE_FILE, Judge
from recipes.tiny_world.unet import build_scheduler

logger = logging.getLogger(__name__)

MAX_MEGABYTES = 40.0
LICENSE_FILES = ("NOTICE",)
VAE_WEIGHTS = Path("vae", "diffusion_pytorch_model.safetensors")


def export_pipeline(
    folder: Path,
    *,
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
) -> None:
    """Save the parts as a StableDiffusionPipeline in float16, licences beside it."""
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16).save_pretrained(folder)
    for file in folder.glob("*/config.json"):
        _change(file, _name_or_path=None)  # not where it lay on this machine
    _declare_float32(folder / "text_encoder" / "config.json")
    _write_slow_tokenizer(tokenizer, folder / "tokenizer")
    _copy_licenses(folder)


def export_flow_pipeline(folder: Path, pipeline: StableDiffusion3Pipeline) -> None:
    """Save the flow stage's pipeline in float16, licences beside it.

    Beside the shipped base, the weights of the autoencoder are a link to its own.
    """
    pipeline.vae.register_to_config(_name_or_path="tiny_world")  # not where it lay on this machine
    pipeline.to(torch.float16).save_pretrained(folder)
    for name in ("text_encoder", "text_encoder_2"):
        _declare_float32(folder / name / "config.json")
    _copy_licenses(folder)
    if folder.resolve() == FLOW_FOLDER.resolve():
        weights = folder / VAE_WEIGHTS
        weights.unlink()
        weights.symlink_to(Path("..", "..", WEIGHTS_FOLDER.name, VAE_WEIGHTS))


def _copy_licenses(folder: Path) -> None:
    for name in LICENSE_FILES:
        shutil.copyfile(RENDERS_FOLDER / name, folder / name)


def _declare_float32(config_file: Path) -> None:
    """Make transformers load the weights as float32 unless told otherwise, as diffusers does with its own."""
    _change(config_file, dtype="float32")


def _change(config_file: Path, **values: str | None) -> None:
    """Set values of a JSON file, or delete those that are None."""
    changed = json.loads(config_file.read_text(encoding="utf-8")) | values
    kept = {name: value for name, value in changed.items() if name not in values or value is not None}
    config_file.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


def _write_slow_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write vocab.json and merges.txt too, for tools that read CLIP tokenizers from them."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")


def export_judge(folder: Path, judge: Judge) -> None:
    """Save the judge in float16."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.half().contiguous() for name, tensor in judge.state_dict().items()}
    save_file(tensors, folder / JUDGE_FILE)


def export_segmenter(folder: Path, segmenter: Segmenter) -> None:
    """Save the segmenter in float16."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: (tensor.half() if tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in segmenter.state_dict().items()
    }
    save_file(tensors, folder / SEGMENTER_FILE)


def export_image_tower(
    folder: Path, text: CLIPTextModelWithProjection, image: CLIPVisionModelWithProjection
) -> None:
    """Save the image tower and the text tower's projection in float16."""
    tower = folder / IMAGE_TOWER_FOLDER
    image.half().save_pretrained(tower)
    _declare_float32(tower / "config.json")
    projection = text.text_projection.weight.detach().half().contiguous()
    save_file({"text_projection": projection}, tower / PROJECTION_FILE)


def check_size(folder: Path) -> None:
    """Log the size of an exported folder.

    Raises:
        ValueError: it is bigger than what the package may carry.
    """
    megabytes = folder_megabytes(folder)
    logger.info("%s has %.2f MB", folder, megabytes)
    if megabytes > MAX_MEGABYTES:
        raise ValueError(
            f"{folder} is {megabytes:.1f} MB; at most {MAX_MEGABYTES} may be shipped: use a smaller UNet"
        )


def folder_megabytes(folder: Path) -> float:
    """Size of all files below a folder in MB (10^6 bytes)."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
