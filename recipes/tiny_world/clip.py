"""The CLIP stage: a small text and image tower, trained contrastively with a concept classifier beside."""

import logging
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from ether_diffusion.tiny_world.concepts import load_concepts
from recipes.tiny_world.data import Composites
from recipes.tiny_world.loop import Batch, trainable
from recipes.tiny_world.tokenizer import MAX_TOKENS

logger = logging.getLogger(__name__)

EMBEDDING_WIDTH = 128
TEXT_WIDTH = 192


def build_text_tower(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    """Build the untrained text tower: 4 layers of width 192."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=EMBEDDING_WIDTH,
        num_hidden_layers=4,
        num_attention_heads=6,
        max_position_embeddings=MAX_TOKENS,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="eager",
    )
    return CLIPTextModelWithProjection(config)


def build_image_tower() -> CLIPVisionModelWithProjection:
    """Build the untrained image tower: 4 layers of width 128 over 8 px patches of 64 px pictures."""
    config = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        projection_dim=EMBEDDING_WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=64,
        patch_size=8,
        hidden_act="gelu",
        attn_implementation="eager",
    )
    return CLIPVisionModelWithProjection(config)


class ClipObjective(torch.nn.Module):
    """Symmetric contrastive loss, with equal captions as shared positives, plus concept cross-entropy."""

    def __init__(self, text: CLIPTextModelWithProjection, image: CLIPVisionModelWithProjection) -> None:
        super().__init__()
        self.text, self.image = text, image
        self.concept_head = torch.nn.Linear(EMBEDDING_WIDTH, len(load_concepts("trained")))
        self.log_scale = torch.nn.Parameter(torch.tensor(2.66))

    def forward(self, images: torch.Tensor, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Loss for images (b, 3, 64, 64) in [-1, 1], tokens (b, MAX_TOKENS) and class indices (b)."""
        image_embeddings = self.image(pixel_values=images).image_embeds.float()
        text_embeddings = F.normalize(self.text(input_ids=input_ids).text_embeds.float(), dim=-1)
        scale = self.log_scale.clamp(max=4.6).exp()
        logits = scale * F.normalize(image_embeddings, dim=-1) @ text_embeddings.T  # (b images, b texts)
        equal = (input_ids[:, None] == input_ids[None]).all(-1).float()
        targets = equal / equal.sum(1, keepdim=True)
        contrast = F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)
        return contrast / 2 + 0.5 * F.cross_entropy(self.concept_head(image_embeddings), labels)


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Turn captions into tokens (b, MAX_TOKENS), padded as Stable Diffusion pads."""
    tokens = tokenizer(
        captions, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
    )
    input_ids: torch.Tensor = tokens.input_ids
    return input_ids


class ClipStage:
    """Both towers in training."""

    name = "clip"
    batch_size = 96
    learning_rate = 1.2e-3
    average_decay = 0.99

    def __init__(self, composites: Composites, tokenizer: CLIPTokenizer) -> None:
        self.composites = composites
        self.input_ids = tokenize(tokenizer, composites.captions)
        self.model = ClipObjective(build_text_tower(tokenizer), build_image_tower())

    def parameter_groups(self, learning_rate: float) -> list[dict[str, object]]:
        """One group."""
        return [{"params": trainable(self.model.parameters()), "lr": learning_rate}]

    def make_batch(self, batch_size: int, generator: torch.Generator) -> Batch:
        """Draw composites with their captions and classes."""
        indices = torch.randint(len(self.composites.labels), (batch_size,), generator=generator)
        return {
            "images": self.composites.images(indices),
            "input_ids": self.input_ids[indices],
            "labels": self.composites.labels[indices],
        }

    @torch.no_grad()
    def write_sheet(self, path: Path, device: torch.device) -> None:
        """Draw nothing; log retrieval among 256 captions and the concept head's accuracy."""
        indices = torch.randint(
            len(self.composites.labels), (256,), generator=torch.Generator().manual_seed(1)
        )
        images = self.composites.images(indices).to(device)
        image_embeddings = self.model.image(pixel_values=images).image_embeds
        text_embeddings = self.model.text(input_ids=self.input_ids[indices].to(device)).text_embeds
        nearest = (
            (F.normalize(image_embeddings, dim=-1) @ F.normalize(text_embeddings, dim=-1).T).argmax(1).cpu()
        )
        retrieved = (self.input_ids[indices][nearest] == self.input_ids[indices]).all(1).float().mean().item()
        predicted = self.model.concept_head(image_embeddings).argmax(1).cpu()
        accuracy = (predicted == self.composites.labels[indices]).float().mean().item()
        logger.info("caption retrieval %.3f of 256, concept head %.3f", retrieved, accuracy)


class ImageTowerStage(ClipStage):
    """The image tower in training against a finished text encoder, of which only a projection learns."""

    name = "image_tower"

    def __init__(self, composites: Composites, tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel) -> None:
        super().__init__(composites, tokenizer)
        load_text_encoder(self.model.text, text_encoder)
        self.model.text.text_model.requires_grad_(False)


TEXT_PREFIX = "text_model."


def load_text_encoder(tower: CLIPTextModelWithProjection, text_encoder: CLIPTextModel) -> None:
    """Give a text tower the weights of a pipeline's text encoder."""
    weights = {TEXT_PREFIX + name: tensor for name, tensor in text_encoder.state_dict().items()}
    tower.load_state_dict(weights | {"text_projection.weight": tower.text_projection.weight})


def to_text_encoder(tower: CLIPTextModelWithProjection) -> CLIPTextModel:
    """Build a pipeline's text encoder with the weights of a text tower."""
    text_encoder = CLIPTextModel(tower.config)
    weights = {
        name.removeprefix(TEXT_PREFIX): tensor
        for name, tensor in tower.state_dict().items()
        if name.startswith(TEXT_PREFIX)
    }
    text_encoder.load_state_dict(weights)
    return text_encoder
