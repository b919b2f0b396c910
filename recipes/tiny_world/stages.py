"""The stages of Tiny World's training, by name, in the order in which they run."""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from ether_diffusion.tiny_world.assets import fetch_renders, read_emoji_names
from ether_diffusion.tiny_world.judge import JUDGE_FILE, load_judge
from ether_diffusion.tiny_world.segmenter import SEGMENTER_FILE, load_segmenter
from recipes.tiny_world.autoencoder import (
    AutoencoderObjective,
    AutoencoderStage,
    DecoderStage,
    build_vae,
)
from recipes.tiny_world.checkpoint import load_averaged, newest_checkpoint
from recipes.tiny_world.clip import (
    ClipObjective,
    ClipStage,
    ImageTowerStage,
    build_image_tower,
    build_text_tower,
    to_text_encoder,
    tokenize,
)
from recipes.tiny_world.data import Composites, join_composites, prepare_composites
from recipes.tiny_world.export import (
    check_size,
    export_image_tower,
    export_judge,
    export_pipeline,
    export_segmenter,
)
from recipes.tiny_world.judging import JudgeStage
from recipes.tiny_world.loop import RunConfig, Trainer
from recipes.tiny_world.prompts import sheet_captions
from recipes.tiny_world.segmenting import SegmenterStage
from recipes.tiny_world.segments import prepare_segments
from recipes.tiny_world.tokenizer import train_tokenizer
from recipes.tiny_world.unet import (
    CachedLatents,
    UNetStage,
    build_unet,
    cache_latents,
    posterior_noise,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Parts:
    """The parts of a pipeline."""

    unet: UNet2DConditionModel
    text_encoder: CLIPTextModel
    vae: AutoencoderKL
    tokenizer: CLIPTokenizer


STAGES = ("data", "autoencoder", "decoder", "clip", "judge", "unet", "image_tower", "segmenter", "export")


def prepare_tokenizer(run_folder: Path, captions: list[str]) -> CLIPTokenizer:
    """Learn the tokenizer, or read it if it was learned before."""
    folder = run_folder / "tokenizer"
    if not (folder / "tokenizer_config.json").is_file():
        fetch_renders(run_folder)
        train_tokenizer(captions, read_emoji_names(run_folder)).save_pretrained(folder)
    tokenizer: CLIPTokenizer = CLIPTokenizer.from_pretrained(folder)
    return tokenizer


def load_trained_vae(run_folder: Path) -> AutoencoderKL:
    """Load the averaged autoencoder, or the one whose decoder was trained on."""
    vae = build_vae()
    folder = run_folder / "decoder"
    folder = folder if newest_checkpoint(folder) else run_folder / "autoencoder"
    step = load_averaged(folder, AutoencoderObjective(vae))
    logger.info("autoencoder of %s, step %d", folder.name, step)
    return vae.eval().requires_grad_(False)


def _load_text_encoder(run_folder: Path, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Build the pipeline's text encoder with the weights of the CLIP stage's text tower."""
    tower = build_text_tower(tokenizer)
    load_averaged(run_folder / "clip", ClipObjective(tower, build_image_tower()))
    return to_text_encoder(tower)


def load_parts(config: RunConfig, captions: list[str]) -> Parts:
    """Put together what the UNet stage starts from: an exported pipeline, or what earlier stages left."""
    if config.init_from is not None:
        pipeline = StableDiffusionPipeline.from_pretrained(config.init_from, dtype=torch.float32)
        pipeline.text_encoder.set_attn_implementation("eager")
        vae = pipeline.vae.eval().requires_grad_(False)
        return Parts(pipeline.unet, pipeline.text_encoder, vae, pipeline.tokenizer)
    tokenizer = prepare_tokenizer(config.run_folder, captions)
    text_encoder = _load_text_encoder(config.run_folder, tokenizer)
    return Parts(build_unet(), text_encoder, load_trained_vae(config.run_folder), tokenizer)


def unet_stage(config: RunConfig, composites: Composites) -> UNetStage:
    """Build the UNet stage with its cached latents."""
    parts = load_parts(config, composites.captions)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    latents = cache_latents(composites, parts.vae, config.run_folder / "latents.safetensors", device=device)
    if config.init_from is None:
        parts.vae.register_to_config(scaling_factor=round(1 / latents[:4096].std().item(), 4))
    data = CachedLatents(
        latents=latents * float(parts.vae.config.scaling_factor),
        input_ids=tokenize(parts.tokenizer, composites.captions),
        noise_scale=posterior_noise(parts.vae),
    )
    return UNetStage(
        data,
        unet=parts.unet,
        text_encoder=parts.text_encoder,
        vae=parts.vae,
        tokenizer=parts.tokenizer,
        captions=sheet_captions(),
    )


def train_judge(config: RunConfig, composites: Composites) -> None:
    """Train the judge on trained and held-out concepts, and export it into the run folder."""
    held_out = prepare_composites(config.run_folder, "held_out", seed=config.seed)
    stage = JudgeStage(join_composites(composites, held_out))
    Trainer(stage, config).run()
    load_averaged(config.run_folder / stage.name, stage.model)
    export_judge(config.run_folder, stage.judge)


def train_segmenter(config: RunConfig) -> None:
    """Train the segmenter on pictures as the finished autoencoder decodes them; export it, as the judge."""
    if config.init_from is not None:
        vae = AutoencoderKL.from_pretrained(config.init_from, subfolder="vae", dtype=torch.float32)
    else:
        vae = load_trained_vae(config.run_folder)
    stage = SegmenterStage(prepare_segments(config.run_folder, vae.eval(), seed=config.seed))
    Trainer(stage, config).run()
    load_averaged(config.run_folder / stage.name, stage.model)
    export_segmenter(config.run_folder, stage.segmenter)


def finished_unet_stage(config: RunConfig, composites: Composites) -> UNetStage:
    """Build the UNet stage with the averaged weights of its newest checkpoint."""
    stage = unet_stage(config, composites)
    step = load_averaged(config.run_folder / stage.name, stage.model)
    logger.info("UNet of step %d", step)
    return stage


def image_tower_stage(config: RunConfig, composites: Composites) -> ImageTowerStage:
    """Build the image tower's stage, with the CLIP stage's image tower to start from."""
    unet = finished_unet_stage(config, composites)
    stage = ImageTowerStage(composites, unet.tokenizer, unet.text_encoder)
    before = ClipObjective(build_text_tower(unet.tokenizer), stage.model.image)
    load_averaged(config.run_folder / "clip", before)
    return stage


def export(config: RunConfig, composites: Composites) -> None:
    """Export the newest averaged weights to config.export_folder, with what else is there."""
    stage = finished_unet_stage(config, composites)
    export_pipeline(
        config.export_folder,
        unet=stage.unet,
        text_encoder=stage.text_encoder,
        vae=stage.vae,
        tokenizer=stage.tokenizer,
    )
    if (config.run_folder / JUDGE_FILE).is_file():
        export_judge(config.export_folder, load_judge(config.run_folder))
    if (config.run_folder / SEGMENTER_FILE).is_file():
        export_segmenter(config.export_folder, load_segmenter(config.run_folder))
    if newest_checkpoint(config.run_folder / "image_tower"):
        tower = image_tower_stage(config, composites)
        load_averaged(config.run_folder / tower.name, tower.model)
        export_image_tower(config.export_folder, tower.model.text, tower.model.image)
    check_size(config.export_folder)


def run_stage(name: str, config: RunConfig) -> None:
    """Run one stage; each reads what its predecessors left in the run folder.

    Raises:
        ValueError: no stage has this name.
    """
    if name not in STAGES:
        raise ValueError(f"no stage is named {name!r}; the stages are {', '.join(STAGES)}")
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    torch.manual_seed(config.seed)
    composites = prepare_composites(config.run_folder, seed=config.seed)
    if name == "autoencoder":
        Trainer(AutoencoderStage(composites), config).run()
    elif name == "decoder":
        Trainer(DecoderStage(composites, load_trained_vae(config.run_folder)), config).run()
    elif name == "clip":
        tokenizer = prepare_tokenizer(config.run_folder, composites.captions)
        Trainer(ClipStage(composites, tokenizer), config).run()
    elif name == "judge":
        train_judge(config, composites)
    elif name == "unet":
        Trainer(unet_stage(config, composites), config).run()
    elif name == "image_tower":
        Trainer(image_tower_stage(config, composites), config).run()
    elif name == "segmenter":
        train_segmenter(config)
    elif name == "export":
        export(config, composites)
