"""The stages of Tiny World's training, by name, in the order in which they run."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from ether_diffusion.durable_files import write_files
from ether_diffusion.tiny_world import tiny_world_path
from ether_diffusion.tiny_world.concepts import trained_concepts
from ether_diffusion.tiny_world.networks import SEGMENTER_FILE, load_segmenter, load_tiny_clip
from recipes.tiny_world.autoencoder import (
    AutoencoderObjective,
    AutoencoderStage,
    DecoderStage,
    build_vae,
)
from recipes.tiny_world.autoencoder_128 import Autoencoder128Objective, Autoencoder128Stage, build_vae_128
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
from recipes.tiny_world.decoder_128 import Decoder128Objective, Decoder128Stage
from recipes.tiny_world.export import (
    check_size,
    export_flow_pipeline,
    export_image_tower,
    export_judge,
    export_pipeline,
    export_segmenter,
)
from recipes.tiny_world.features import SIZE, FeatureNet, FeaturesStage
from recipes.tiny_world.flow import FlowObjective, FlowStage, build_flow_pipeline, build_transformer
from recipes.tiny_world.fresh_pictures import FreshPictures, StoredPictures, other_concepts, store_pictures
from recipes.tiny_world.judge import JUDGE_FILE, load_judge
from recipes.tiny_world.judging import JudgeStage
from recipes.tiny_world.latents import FILE_COMPOSITES, Latents, prepare_latents
from recipes.tiny_world.loop import RunConfig, Trainer
from recipes.tiny_world.prompts import sheet_captions
from recipes.tiny_world.renders import fetch_renders, read_emoji_names
from recipes.tiny_world.segmenting import SegmenterStage
from recipes.tiny_world.segments import prepare_segments
from recipes.tiny_world.tokenizer import train_tokenizer
from recipes.tiny_world.unet import CachedLatents, UNetObjective, UNetStage, build_unet, posterior_noise
from recipes.tiny_world.weighing import weigh_concepts

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Parts:
    """The parts of a pipeline."""

    unet: UNet2DConditionModel
    text_encoder: CLIPTextModel
    vae: AutoencoderKL
    tokenizer: CLIPTokenizer


STAGES = (
    *("data", "autoencoder", "decoder", "clip", "judge", "latents"),
    *("pictures", "features", "autoencoder_128", "decoder_128"),
    *("unet", "weights", "image_tower", "segmenter", "export"),
    *("flow", "export_flow"),
)


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


def cached_latents(config: RunConfig, vae: AutoencoderKL, per_concept: int) -> Latents:
    """Draw and encode so many composites of each of the world's concepts, or read them."""
    return prepare_latents(
        config.run_folder,
        trained_concepts(config.world),
        vae.to("cuda" if torch.cuda.is_available() else "cpu"),
        per_concept=per_concept,
        renders_folder=fetch_renders(config.run_folder),
        seed=config.seed,
        num_processes=config.num_drawers,
    )


WEIGHTS_FILE = "weights.json"
PICTURES_FILE = "pictures.safetensors"


def fresh_pictures(config: RunConfig) -> FreshPictures:
    """Make what draws the second world's pictures, and those of other emoji."""
    renders = fetch_renders(config.run_folder)
    fresh = FreshPictures(trained_concepts(2), other_concepts(config.run_folder), renders)
    stored = config.run_folder / PICTURES_FILE
    return StoredPictures(fresh, stored) if stored.is_file() else fresh


def prepare_pictures(config: RunConfig) -> None:
    """Draw the pictures that the stages of 128 px would else draw while they train."""
    path = config.run_folder / PICTURES_FILE
    if not path.is_file():
        store_pictures(path, fresh_pictures(config), config.num_pictures, SIZE, config.num_drawers)


def load_small_vae() -> AutoencoderKL:
    """Load the shipped autoencoder of 64 px."""
    vae: AutoencoderKL = AutoencoderKL.from_pretrained(
        tiny_world_path(), subfolder="vae", dtype=torch.float32
    )
    return vae.eval().requires_grad_(False)


def load_feature_net(config: RunConfig, pictures: FreshPictures) -> FeatureNet:
    """Load the network of the features stage."""
    net = FeatureNet(len(pictures.known) + len(pictures.others))
    load_averaged(config.run_folder / FeaturesStage.name, net)
    return net


def load_vae_128(config: RunConfig) -> AutoencoderKL | None:
    """Load the averaged autoencoder of 128 px, with the decoder that was trained on, or that of init_from."""
    for stage, objective in (
        (Decoder128Stage, Decoder128Objective),
        (Autoencoder128Stage, Autoencoder128Objective),
    ):
        folder = config.run_folder / stage.name
        if newest_checkpoint(folder) is not None:
            small = load_small_vae()
            vae, net = build_vae_128(small), load_feature_net(config, fresh_pictures(config))
            step = load_averaged(folder, objective(vae, small, net))
            logger.info("autoencoder of %s, step %d", stage.name, step)
            return vae.eval().requires_grad_(False)
    return None if config.init_from is None else _exported_vae_128(config.init_from)


def _exported_vae_128(folder: Path) -> AutoencoderKL | None:
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae", dtype=torch.float32)
    return vae.eval().requires_grad_(False) if vae.config.sample_size == SIZE else None


def autoencoder_128_stage(config: RunConfig) -> Autoencoder128Stage:
    """Build the stage of encoder and decoder."""
    pictures, small = fresh_pictures(config), load_small_vae()
    vae = load_vae_128(config) or build_vae_128(small)
    return Autoencoder128Stage(pictures, vae, small, load_feature_net(config, pictures))


def decoder_128_stage(config: RunConfig) -> Decoder128Stage:
    """Build the stage of the decoder alone.

    Raises:
        FileNotFoundError: there is no encoder of 128 px yet.
    """
    pictures, vae = fresh_pictures(config), load_vae_128(config)
    if vae is None:
        raise FileNotFoundError(f"{config.run_folder} has no autoencoder_128; train that stage first")
    return Decoder128Stage(pictures, vae, load_small_vae(), load_feature_net(config, pictures))


def load_parts(config: RunConfig) -> Parts:
    """Put together what the UNet stage starts from: an exported pipeline, or what earlier stages left."""
    if config.init_from is not None:
        pipeline = StableDiffusionPipeline.from_pretrained(config.init_from, dtype=torch.float32)
        pipeline.text_encoder.set_attn_implementation("eager")
        vae = load_vae_128(config) if config.world == 2 else None
        vae = vae or pipeline.vae.eval().requires_grad_(False)
        return Parts(pipeline.unet, pipeline.text_encoder, vae, pipeline.tokenizer)
    vae = load_trained_vae(config.run_folder)
    some = cached_latents(config, vae, FILE_COMPOSITES)
    vae.register_to_config(scaling_factor=round(1 / some.latents.float().std().item(), 4))
    tokenizer = prepare_tokenizer(config.run_folder, some.captions)
    return Parts(build_unet(), _load_text_encoder(config.run_folder, tokenizer), vae, tokenizer)


def load_averaged_parts(config: RunConfig) -> Parts:
    """Put together the parts with the averaged weights of the UNet stage's newest checkpoint."""
    parts = load_parts(config)
    step = load_averaged(config.run_folder / UNetStage.name, UNetObjective(parts.unet, parts.text_encoder))
    logger.info("UNet of step %d", step)
    return parts


def _read_weights(config: RunConfig) -> torch.Tensor | None:
    path = config.run_folder / WEIGHTS_FILE
    if not path.is_file():
        return None
    weights = json.loads(path.read_text(encoding="utf-8"))
    return torch.tensor([weights[concept.name] for concept in trained_concepts(config.world)])


def write_weights(config: RunConfig) -> None:
    """Measure how hard each concept still is; the UNet stage then draws it so much more often."""
    stage = unet_stage(config)
    load_averaged(config.run_folder / stage.name, stage.model)
    concepts = trained_concepts(config.world)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    weights = weigh_concepts(stage.data, stage.model, len(concepts), device).tolist()
    named = {concept.name: round(weight, 3) for concept, weight in zip(concepts, weights, strict=True)}
    write_files(config.run_folder, {WEIGHTS_FILE: json.dumps(named, indent=1).encode()})
    hardest = sorted(named, key=named.__getitem__, reverse=True)
    logger.info("hardest: %s; easiest: %s", ", ".join(hardest[:12]), ", ".join(hardest[-6:]))


def unet_stage(config: RunConfig) -> UNetStage:
    """Build the UNet stage with its cached latents."""
    parts = load_parts(config)
    cached = cached_latents(config, parts.vae, config.composites_per_concept)
    data = CachedLatents(
        latents=cached.latents,
        input_ids=tokenize(parts.tokenizer, cached.captions),
        labels=cached.labels,
        scale=float(parts.vae.config.scaling_factor),
        noise_scale=posterior_noise(parts.vae),
        weights=_read_weights(config),
    )
    return UNetStage(
        data,
        unet=parts.unet,
        text_encoder=parts.text_encoder,
        vae=parts.vae,
        tokenizer=parts.tokenizer,
        captions=sheet_captions(trained_concepts(config.world)),
    )


def untrained_flow() -> StableDiffusion3Pipeline:
    """Put the shipped base's autoencoder, tokenizer and text encoder around an untrained transformer."""
    return build_flow_pipeline(build_transformer(), load_tiny_clip(tiny_world_path()), load_small_vae())


def flow_stage(config: RunConfig) -> FlowStage:
    """Build the flow stage with its cached latents."""
    pipeline, concepts = untrained_flow(), trained_concepts(1)
    cached = cached_latents(config, pipeline.vae, config.composites_per_concept)
    return FlowStage(cached, pipeline, sheet_captions(concepts))


def export_flow(config: RunConfig) -> None:
    """Export the averaged weights of the flow stage's newest checkpoint to config.export_folder."""
    pipeline = untrained_flow()
    step = load_averaged(config.run_folder / FlowStage.name, FlowObjective(pipeline.transformer))
    logger.info("transformer of step %d", step)
    export_flow_pipeline(config.export_folder, pipeline)
    check_size(config.export_folder)


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


def image_tower_stage(config: RunConfig, composites: Composites) -> ImageTowerStage:
    """Build the image tower's stage, with the CLIP stage's image tower to start from."""
    parts = load_averaged_parts(config)
    stage = ImageTowerStage(composites, parts.tokenizer, parts.text_encoder)
    before = ClipObjective(build_text_tower(parts.tokenizer), stage.model.image)
    load_averaged(config.run_folder / "clip", before)
    return stage


def export(config: RunConfig) -> None:
    """Export the newest averaged weights to config.export_folder, with what else is there."""
    parts = load_averaged_parts(config)
    export_pipeline(
        config.export_folder,
        unet=parts.unet,
        text_encoder=parts.text_encoder,
        vae=parts.vae,
        tokenizer=parts.tokenizer,
    )
    if (config.run_folder / JUDGE_FILE).is_file():
        export_judge(config.export_folder, load_judge(config.run_folder))
    if (config.run_folder / SEGMENTER_FILE).is_file():
        export_segmenter(config.export_folder, load_segmenter(config.run_folder))
    if newest_checkpoint(config.run_folder / "image_tower"):
        tower = image_tower_stage(config, prepare_composites(config.run_folder, seed=config.seed))
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
    if name == "latents":
        cached_latents(config, load_parts(config).vae, config.composites_per_concept)
    elif name == "pictures":
        prepare_pictures(config)
    elif name == "features":
        Trainer(FeaturesStage(fresh_pictures(config)), config).run()
    elif name == "autoencoder_128":
        Trainer(autoencoder_128_stage(config), config).run()
    elif name == "decoder_128":
        Trainer(decoder_128_stage(config), config).run()
    elif name == "weights":
        write_weights(config)
    elif name == "unet":
        Trainer(unet_stage(config), config).run()
    elif name == "flow":
        Trainer(flow_stage(config), config).run()
    elif name == "export_flow":
        export_flow(config)
    elif name == "segmenter":
        train_segmenter(config)
    elif name == "export":
        export(config)
    else:
        run_composites_stage(name, config, prepare_composites(config.run_folder, seed=config.seed))


def run_composites_stage(name: str, config: RunConfig, composites: Composites) -> None:
    """Run one of the stages that train on pictures; "data" has them drawn and no more."""
    if name == "autoencoder":
        Trainer(AutoencoderStage(composites), config).run()
    elif name == "decoder":
        Trainer(DecoderStage(composites, load_trained_vae(config.run_folder)), config).run()
    elif name == "clip":
        tokenizer = prepare_tokenizer(config.run_folder, composites.captions)
        Trainer(ClipStage(composites, tokenizer), config).run()
    elif name == "judge":
        train_judge(config, composites)
    elif name == "image_tower":
        Trainer(image_tower_stage(config, composites), config).run()
