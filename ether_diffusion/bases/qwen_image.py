"""Qwen-Image."""

from collections.abc import Sequence
from typing import Any, ClassVar

from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration

from ether_diffusion.bases.base import PromptEmbeddings
from ether_diffusion.bases.flow import pack, unpack
from ether_diffusion.bases.flux import PackedBase


class QwenImage(PackedBase):
    """Qwen-Image: Qwen2.5-VL's text beside the picture in joint blocks, and a video's autoencoder."""

    pipeline_class = QwenImagePipeline
    drawn_by = "EtherQwenImagePipeline"
    usual_guidance = 4.0
    classes: ClassVar = {
        "transformer": QwenImageTransformer2DModel,
        "vae": AutoencoderKLQwenImage,
        "text_encoder": Qwen2_5_VLForConditionalGeneration,
    }
    attention = r".*\.attn\.(?:to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
    feedforward = r".*\.(?:img|txt)_mlp\.net\.(?:0\.proj|2)"
    unused = r"transformer_blocks\.{last}\.(?:attn\.(?:add_q_proj|to_add_out)|txt_mlp\.)"

    def encode(self, pipeline: Any, prompts: Sequence[str]) -> PromptEmbeddings:
        """Embed prompts as the pipeline does."""
        sequence, mask = pipeline.encode_prompt(list(prompts), max_sequence_length=self.num_text_tokens)
        every = sequence.new_ones(sequence.shape[:2])
        return PromptEmbeddings(sequence, mask=(every if mask is None else mask).bool())

    @staticmethod
    def _velocity(
        denoiser: Any, noisy: Tensor, timesteps: Tensor, embeddings: PromptEmbeddings, **told: Tensor
    ) -> Tensor:
        height, width = (side // 2 for side in noisy.shape[-2:])
        mask = embeddings.mask
        if mask is not None and mask.all():  # attention is faster without, and the pipeline does so
            mask = None
        velocity = denoiser(
            hidden_states=pack(noisy),
            timestep=timesteps / 1000,
            encoder_hidden_states=embeddings.sequence,
            encoder_hidden_states_mask=mask,
            img_shapes=[[(1, height, width)]] * len(noisy),
            return_dict=False,
        )[0]
        return unpack(velocity, noisy.shape)

    def guided(self, given: Tensor, without: Tensor, guidance_scale: float) -> Tensor:
        """Return what is predicted with a prompt, led away from without, each token as long as it was."""
        led, own = pack(super().guided(given, without, guidance_scale)), pack(given)
        return unpack(led * (own.norm(dim=-1, keepdim=True) / led.norm(dim=-1, keepdim=True)), given.shape)
