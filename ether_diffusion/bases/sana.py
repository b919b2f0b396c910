"""Sana."""

import inspect
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderDC, SanaPipeline, SanaTransformer2DModel
from torch import Tensor
from transformers import Gemma2Model

from ether_diffusion.bases.base import PromptEmbeddings, stack_embeddings
from ether_diffusion.bases.flow import FlowBase


class Sana(FlowBase):
    """Sana: linear attention on few large latents, with Gemma's text by cross-attention."""

    pipeline_class = SanaPipeline
    drawn_by = "EtherSanaPipeline"
    usual_guidance = 4.5
    classes: ClassVar = {
        "transformer": SanaTransformer2DModel,
        "vae": AutoencoderDC,
        "text_encoder": Gemma2Model,
    }
    num_text_tokens = 300
    text_width = "caption_channels"
    size_step = 32
    latents_dtype, has_own_sigmas = torch.float32, True
    attention = r".*\.attn[12]\.(?:to_[qkv]|to_out\.0)"
    feedforward = None  # convolutions

    def encode(self, pipeline: Any, prompts: Sequence[str]) -> PromptEmbeddings:
        """Embed prompts as the pipeline does."""
        instruction = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
        # no words at all are not to be enhanced
        return stack_embeddings([_embed(pipeline, one, instruction if one else None) for one in prompts])

    def encode_negative(self, pipeline: Any, prompt: str | None) -> PromptEmbeddings:
        """Embed what a picture should not show, which is not enhanced."""
        return _embed(pipeline, prompt or "", None)

    @staticmethod
    def _velocity(
        denoiser: Any, noisy: Tensor, timesteps: Tensor, embeddings: PromptEmbeddings, **told: Tensor
    ) -> Tensor:
        velocity: Tensor = denoiser(
            noisy,
            encoder_hidden_states=embeddings.sequence,
            encoder_attention_mask=embeddings.mask,
            timestep=timesteps * denoiser.config.timestep_scale,
            return_dict=False,
        )[0]
        return velocity.chunk(2, dim=1)[0] if velocity.shape[1] == 2 * noisy.shape[1] else velocity


def _embed(pipeline: Any, prompt: str, instruction: list[str] | None) -> PromptEmbeddings:
    how: Any = {"do_classifier_free_guidance": False, "complex_human_instruction": instruction}
    sequence, mask, *_ = pipeline.encode_prompt(prompt, **how)
    return PromptEmbeddings(sequence, mask=mask.bool())
