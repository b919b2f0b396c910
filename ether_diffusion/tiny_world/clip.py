"""The CLIP of Tiny World: its pipeline's text encoder, and an image tower trained to agree with it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

IMAGE_TOWER_FOLDER = "image_tower"
PROJECTION_FILE = "text_projection.safetensors"


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
        tokens = self.tokenizer(
            list(captions),
            padding="max_length",
            truncation=True,
            max_length=self.tokenizer.model_max_length,
            return_tensors="pt",
        )
        pooled = self.text_encoder(input_ids=tokens.input_ids).pooler_output
        return F.normalize(pooled @ self.text_projection.T, dim=-1)

    @torch.no_grad()
    def embed_images(self, images: torch.Tensor) -> torch.Tensor:
        """Return unit embeddings (b, width) of images (b, 3, 64, 64) in [-1, 1]."""
        return F.normalize(self.image_tower(pixel_values=images).image_embeds, dim=-1)


def load_tiny_clip(folder: Path) -> TinyClip:
    """Load the CLIP of an exported pipeline.

    Raises:
        FileNotFoundError: the folder has no image tower.
    """
    if not (folder / IMAGE_TOWER_FOLDER).is_dir():
        raise FileNotFoundError(
            f"{folder} has no folder {IMAGE_TOWER_FOLDER}; run python -m recipes.tiny_world "
            "--stage image_tower and --stage export"
        )
    tower = folder / IMAGE_TOWER_FOLDER
    return TinyClip(
        CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32).eval(),
        CLIPVisionModelWithProjection.from_pretrained(tower, dtype=torch.float32).eval(),
        load_file(tower / PROJECTION_FILE)["text_projection"].float(),
    )
