"""Stable Diffusion 3 and 3.5."""

from collections.abc import Sequence
from typing import Any, ClassVar

from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from ether_diffusion.bases.base import PromptEmbeddings
from ether_diffusion.bases.flow import FlowBase


class StableDiffusion3(FlowBase):
    """Stable Diffusion 3 and 3.5: CLIP's two texts and T5's beside the picture in joint blocks."""

    pipeline_class = StableDiffusion3Pipeline
    drawn_by = "EtherStableDiffusion3Pipeline"
    usual_guidance = 7.0
    classes: ClassVar = {
        "transformer": SD3Transformer2DModel,
        "vae": AutoencoderKL,
        "text_encoder": CLIPTextModelWithProjection,
        "text_encoder_2": CLIPTextModelWithProjection,
        "text_encoder_3": T5EncoderModel,
    }
    optional = frozenset({"text_encoder_3"})
    num_text_tokens = 77 + 256
    has_own_sigmas = True
    attention = r".*\.attn2?\.(?:to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
    feedforward = r".*\.ff(?:_context)?\.net\.(?:0\.proj|2)"
    unused = r"transformer_blocks\.{last}\.attn\.add_q_proj"

    def encode(self, pipeline: Any, prompts: Sequence[str]) -> PromptEmbeddings:
        """Embed prompts as the pipeline does."""
        if pipeline.text_encoder_3 is None and pipeline.transformer is None:  # it says how wide zeros are
            pipeline.transformer = self.empty_denoiser()
        sequence, _, pooled, _ = pipeline.encode_prompt(
            *[list(prompts)] * 3, do_classifier_free_guidance=False, device=pipeline.text_encoder.device
        )
        return PromptEmbeddings(sequence, pooled)

    @staticmethod
    def _velocity(
        denoiser: Any, noisy: Tensor, timesteps: Tensor, embeddings: PromptEmbeddings, **told: Tensor
    ) -> Tensor:
        velocity: Tensor = denoiser(
            hidden_states=noisy,
            timestep=timesteps,
            encoder_hidden_states=embeddings.sequence,
            pooled_projections=embeddings.pooled,
            return_dict=False,
        )[0]
        return velocity
