"""Prompts and embeddings: what the text encoders of a Stable Diffusion pipeline make of words."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor
from transformers import PreTrainedModel


@dataclass(frozen=True)
class PromptEmbeddings:
    """Embeddings of prompts: sequence (b, tokens, width) and, of SDXL, pooled (b, width)."""

    sequence: Tensor
    pooled: Tensor | None

    def to(self, device: torch.device, dtype: torch.dtype) -> "PromptEmbeddings":
        """Return them on a device in a dtype."""
        pooled = None if self.pooled is None else self.pooled.to(device, dtype)
        return PromptEmbeddings(self.sequence.to(device, dtype), pooled)


def stack_embeddings(rows: Sequence[PromptEmbeddings]) -> PromptEmbeddings:
    """Join embeddings along the batch."""
    pooled = [row.pooled for row in rows if row.pooled is not None]
    return PromptEmbeddings(torch.cat([row.sequence for row in rows]), torch.cat(pooled) if pooled else None)


class TextEncoders:
    """The tokenizers and text encoders of one base, in the order in which diffusers names them."""

    def __init__(self, tokenizers: Sequence[object], models: Sequence[PreTrainedModel]) -> None:
        self.tokenizers, self.models = list(tokenizers), list(models)
        self.pipeline = _textual_pipeline(self.tokenizers, self.models)

    def to(self, device: torch.device) -> "TextEncoders":
        """Move the models, and return self."""
        for model in self.models:
            model.to(device)
        return self

    def encode(self, prompts: Sequence[str]) -> PromptEmbeddings:
        """Embed prompts; gradients reach the text encoders where these want them."""
        device = next(self.models[0].parameters()).device
        encoded = self.pipeline.encode_prompt(
            prompt=list(prompts), device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return PromptEmbeddings(encoded[0], encoded[2] if len(self.models) == 2 else None)


def _textual_pipeline(tokenizers: list[object], models: list[PreTrainedModel]) -> DiffusionPipeline:
    """Return diffusers' pipeline without the parts that draw: the one that knows how prompts are encoded."""
    if len(models) == 2:
        return StableDiffusionXLPipeline(
            vae=None,
            text_encoder=models[0],
            text_encoder_2=models[1],
            tokenizer=tokenizers[0],
            tokenizer_2=tokenizers[1],
            unet=None,
            scheduler=None,
            force_zeros_for_empty_prompt=False,
            add_watermarker=False,
        )
    return StableDiffusionPipeline(
        vae=None,
        text_encoder=models[0],
        tokenizer=tokenizers[0],
        unet=None,
        scheduler=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
