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
    text_width = "cap_feat_dim"
    attention = r".*\.attention\.(?:to_[qkv]|to_out\.0)"
    feedforward = r".*\.feed_forward\.w[123]"

    def _encode(self, pipeline: Any, prompts: Sequence[str]) -> PromptEmbeddings:
        found, _ = pipeline.encode_prompt(list(prompts), do_classifier_free_guidance=False)
        masks = [each.new_ones(1, len(each), dtype=torch.bool) for each in found]
        rows = zip(found, masks, strict=True)
        return stack_embeddings([PromptEmbeddings(each[None], mask=mask) for each, mask in rows])

    @staticmethod
    def _velocity(denoiser: Any, noisy: Tensor, timesteps: Tensor, embeddings: PromptEmbeddings) -> Tensor:
        pictures, texts = list(noisy.unsqueeze(2).unbind()), _texts(embeddings)
        velocities = denoiser(pictures, (1000 - timesteps) / 1000, texts, return_dict=False)[0]
        return -torch.stack(velocities).squeeze(2)

    def _drawing(self, embeddings: PromptEmbeddings, guidance_scale: float) -> dict[str, Any]:
        texts = _texts(embeddings)
        return {
            "prompt_embeds": texts[:1],
            "negative_prompt_embeds": texts[1:],
            "guidance_scale": guidance_scale,
        }


def _texts(embeddings: PromptEmbeddings) -> list[Tensor]:
    """Return the embeddings of each prompt, as long as it is."""
    if embeddings.mask is None:
        return list(embeddings.sequence.unbind())
    return [each[mask] for each, mask in zip(embeddings.sequence, embeddings.mask, strict=True)]
