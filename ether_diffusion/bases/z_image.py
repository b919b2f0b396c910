"""Z-Image."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, ZImagePipeline, ZImageTransformer2DModel
from torch import Tensor
from transformers import Qwen3Model

from ether_diffusion.bases.base import PromptEmbeddings, stack_embeddings
from ether_diffusion.bases.flow import FlowBase


class ZImage(FlowBase):
    """Z-Image: one stream of Qwen3's text and the picture; time runs backwards, velocity is negated."""

    pipeline_class = ZImagePipeline
    drawn_by = "EtherZImagePipeline"
    usual_guidance = 5.0
    classes: ClassVar = {
        "transformer": ZImageTransformer2DModel,
        "vae": AutoencoderKL,
        "text_encoder": Qwen3Model,
    }
    num_text_tokens = 512
    latents_dtype = torch.float32
    text_width = "cap_feat_dim"
    attention = r".*\.attention\.(?:to_[qkv]|to_out\.0)"
    feedforward = r".*\.feed_forward\.w[123]"

    def encode(self, pipeline: Any, prompts: Sequence[str]) -> PromptEmbeddings:
        """Embed prompts as the pipeline does."""
        found, _ = pipeline.encode_prompt(list(prompts), do_classifier_free_guidance=False)
        masks = [each.new_ones(1, len(each), dtype=torch.bool) for each in found]
        rows = zip(found, masks, strict=True)
        return stack_embeddings([PromptEmbeddings(each[None], mask=mask) for each, mask in rows])

    @staticmethod
    def _velocity(
        denoiser: Any, noisy: Tensor, timesteps: Tensor, embeddings: PromptEmbeddings, **told: Tensor
    ) -> Tensor:
        pictures, texts = list(noisy.unsqueeze(2).unbind()), _texts(embeddings)
        velocities = denoiser(pictures, (1000 - timesteps) / 1000, texts, return_dict=False)[0]
        return -torch.stack(velocities).squeeze(2)

    def is_guided(self, denoiser: Any, guidance_scale: float) -> bool:
        """Say whether a picture takes a row without its prompt; the scale counts from 0 here."""
        return guidance_scale > 0

    def guided(self, given: Tensor, without: Tensor, guidance_scale: float) -> Tensor:
        """Return what is predicted with a prompt, led away from what is without."""
        return given + guidance_scale * (given - without)


def _texts(embeddings: PromptEmbeddings) -> list[Tensor]:
    """Return the embeddings of each prompt, as long as it is."""
    if embeddings.mask is None:
        return list(embeddings.sequence.unbind())
    return [each[mask] for each, mask in zip(embeddings.sequence, embeddings.mask, strict=True)]
