"""Encoders of a few thousand random weights, saved as the Hub has them."""

import json
from pathlib import Path

import torch
from transformers import (
    BitImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

from ether_diffusion.tiny_world import WEIGHTS_FOLDER

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def save_dino(folder: Path) -> Path:
    """Save a DINO of 32 px pictures."""
    with torch.random.fork_rng():
        torch.manual_seed(11)
        model = ViTModel(ViTConfig(**SMALL, image_size=32, patch_size=8), add_pooling_layer=False)
    model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def save_dinov2(folder: Path) -> Path:
    """Save a DINOv2 of 28 px pictures."""
    with torch.random.fork_rng():
        torch.manual_seed(12)
        config = Dinov2Config(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
        )
        model = Dinov2Model(config)
    model.save_pretrained(folder)
    BitImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28}).save_pretrained(
        folder
    )
    return folder


def save_clip(folder: Path) -> Path:
    """Save a CLIP of 32 px pictures with Tiny World's tokenizer."""
    tokenizer = CLIPTokenizer.from_pretrained(WEIGHTS_FOLDER / "tokenizer")
    text = CLIPTextConfig(
        **SMALL,
        vocab_size=len(tokenizer),
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = CLIPVisionConfig(**SMALL, image_size=32, patch_size=8)
    with torch.random.fork_rng():
        torch.manual_seed(13)
        config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=24)
        model = CLIPModel(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
        folder
    )
    return folder


def save_other_model(folder: Path) -> Path:
    """Save the config of a network that is no encoder of pictures."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    return folder


def save_alexnet(file: Path) -> Path:
    """Save random weights by torchvision's names, as its file has them."""
    shapes = {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)}
    generator = torch.Generator().manual_seed(14)
    weights = {}
    for layer, (out, into, kernel) in shapes.items():
        spread = (2 / (into * kernel * kernel)) ** 0.5
        weights[f"features.{layer}.weight"] = (
            torch.randn(out, into, kernel, kernel, generator=generator) * spread
        )
        weights[f"features.{layer}.bias"] = torch.randn(out, generator=generator) * 0.1
    weights["classifier.1.weight"] = torch.zeros(2, 2)
    torch.save(weights, file)
    return file
