"""FLUX.1, FLUX.2 klein and dev, and Chroma, which was made from the first."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    ChromaPipeline,
    ChromaTransformer2DModel,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
)
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from torch import Tensor
from transformers import CLIPTextModel, Mistral3ForConditionalGeneration, Qwen3ForCausalLM, T5EncoderModel

from ether_diffusion.bases.base import PromptEmbeddings
from ether_diffusion.bases.files import read_config
from ether_diffusion.bases.flow import FlowBase, pack, unpack


class PackedBase(FlowBase):
    """What these have in common: patches of 2 × 2 that are packed outside the transformer."""

    packed = 2
    num_text_tokens = 512


class Flux1(PackedBase):
    """FLUX.1: T5's text and the picture in joint blocks, then in blocks of one stream."""

    pipeline_class = FluxPipeline
    drawn_by = "EtherFluxPipeline"
    usual_guidance = 3.5
    takes_negative_prompts = False  # its guidance was distilled into it
    classes: ClassVar = {
        "transformer": FluxTransformer2DModel,
        "vae": AutoencoderKL,
        "text_encoder": CLIPTextModel,
        "text_encoder_2": T5EncoderModel,
    }
    attention = r".*\.attn\.(?:to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
    feedforward = r".*\.(?:ff(?:_context)?\.net\.(?:0\.proj|2)|proj_mlp|proj_out)"

    def encode(self, pipeline: Any, prompts: Sequence[str]) -> PromptEmbeddings:
        """Embed prompts as the pipeline does."""
        sequence, pooled, _ = pipeline.encode_prompt(list(prompts))
        return PromptEmbeddings(sequence, pooled)

    @staticmethod
    def _velocity(
        denoiser: Any, noisy: Tensor, timesteps: Tensor, embeddings: PromptEmbeddings, **told: Tensor
    ) -> Tensor:
        velocity = denoiser(
            hidden_states=pack(noisy),
            timestep=timesteps / 1000,
            pooled_projections=embeddings.pooled,
            encoder_hidden_states=embeddings.sequence,
            return_dict=False,
            **_places(noisy, embeddings),
            **told,
        )[0]
        return unpack(velocity, noisy.shape)

    def is_guided(self, denoiser: Any, guidance_scale: float) -> bool:
        """Say that no row is without its prompt: the transformer is told of its guidance."""
        return False


class Chroma(PackedBase):
    """Chroma: FLUX.1's blocks without CLIP's text and guidance, and with a mask over T5's."""

    pipeline_class = ChromaPipeline
    drawn_by = "EtherChromaPipeline"
    usual_guidance = 5.0
    classes: ClassVar = {
        "transformer": ChromaTransformer2DModel,
        "vae": AutoencoderKL,
        "text_encoder": T5EncoderModel,
    }
    attention, feedforward = Flux1.attention, Flux1.feedforward

    def encode(self, pipeline: Any, prompts: Sequence[str]) -> PromptEmbeddings:
        """Embed prompts as the pipeline does."""
        sequence, _, mask, *_ = pipeline.encode_prompt(list(prompts), do_classifier_free_guidance=False)
        return PromptEmbeddings(sequence, mask=mask.bool())

    @staticmethod
    def _velocity(
        denoiser: Any, noisy: Tensor, timesteps: Tensor, embeddings: PromptEmbeddings, **told: Tensor
    ) -> Tensor:
        tokens, mask = pack(noisy), embeddings.mask
        if mask is not None:  # of the picture, too; in floats, as the pipeline has it
            mask = torch.cat((mask, mask.new_ones(tokens.shape[:2])), dim=1).to(noisy.dtype)
        velocity = denoiser(
            hidden_states=tokens,
            timestep=timesteps / 1000,
            encoder_hidden_states=embeddings.sequence,
            attention_mask=mask,
            return_dict=False,
            **_places(noisy, embeddings),
        )[0]
        return unpack(velocity, noisy.shape)


class Flux2Klein(PackedBase):
    """FLUX.2 klein: three layers of Qwen3's text, and blocks of one stream with fused projections."""

    pipeline_class = Flux2KleinPipeline
    drawn_by = "EtherFlux2KleinPipeline"
    usual_guidance = 4.0
    classes: ClassVar = {
        "transformer": Flux2Transformer2DModel,
        "vae": AutoencoderKLFlux2,
        "text_encoder": Qwen3ForCausalLM,
    }
    attention = (
        r"(?:.*\.attn\.(?:to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
        r"|single_transformer_blocks\.\d+\.attn\.(?:to_qkv_mlp_proj|to_out))"
    )
    feedforward = r".*\.ff(?:_context)?\.linear_(?:in|out)"

    def encode(self, pipeline: Any, prompts: Sequence[str]) -> PromptEmbeddings:
        """Embed prompts as the pipeline does."""
        sequence, _ = pipeline.encode_prompt(list(prompts))
        return PromptEmbeddings(sequence)

    @staticmethod
    def _velocity(
        denoiser: Any, noisy: Tensor, timesteps: Tensor, embeddings: PromptEmbeddings, **told: Tensor
    ) -> Tensor:
        b, tokens, _ = embeddings.sequence.shape
        rows, columns, words = (torch.arange(n) for n in (noisy.shape[-2] // 2, noisy.shape[-1] // 2, tokens))
        one = torch.arange(1)
        places = [(one, rows, columns, one), (one, one, one, words)]  # picture, row, column, word
        image_ids, text_ids = (torch.cartesian_prod(*each).expand(b, -1, -1) for each in places)
        velocity = denoiser(
            hidden_states=pack(noisy),
            timestep=timesteps / 1000,
            encoder_hidden_states=embeddings.sequence,
            txt_ids=text_ids.to(noisy.device),
            img_ids=image_ids.to(noisy.device),
            return_dict=False,
            **told,
        )[0]
        return unpack(velocity, noisy.shape)

    def draw_noise(self, denoiser: Any, size: tuple[int, int], generator: torch.Generator) -> Tensor:
        """Draw noise, of which the pipeline draws all that becomes a token's first number, then the next."""
        height, width = (side // self.vae_scale_factor for side in size)
        shape = (1, denoiser.config.in_channels, height // 2 * (width // 2))
        noise = torch.randn(shape, generator=generator, dtype=denoiser.dtype)
        return unpack(noise.transpose(1, 2), (height, width))

    def is_guided(self, denoiser: Any, guidance_scale: float) -> bool:
        """Say whether a picture takes a row without its prompt, which distilled ones do not."""
        index = read_config(self.folder, "model_index.json")
        return guidance_scale > 1 and not index.get("is_distilled")

    def _shift(self, config: Mapping[str, Any], tokens: int, num_steps: int) -> float:
        return float(compute_empirical_mu(tokens, num_steps))


class Flux2Dev(Flux2Klein):
    """FLUX.2 dev: klein's blocks with three layers of Mistral's text, and guidance distilled into them."""

    pipeline_class = Flux2Pipeline
    drawn_by = "EtherFlux2Pipeline"
    takes_negative_prompts = False
    classes: ClassVar = {**Flux2Klein.classes, "text_encoder": Mistral3ForConditionalGeneration}

    def is_guided(self, denoiser: Any, guidance_scale: float) -> bool:
        """Say that no row is without its prompt: the transformer is told of its guidance."""
        return False


def _places(noisy: Tensor, embeddings: PromptEmbeddings) -> dict[str, Tensor]:
    """Return where FLUX.1's tokens stand, (tokens, 3): a picture's by row and column, all words at zero."""
    rows, columns = (torch.arange(side // 2) for side in noisy.shape[-2:])
    image_ids = torch.cartesian_prod(torch.arange(1), rows, columns).to(noisy)
    return {"img_ids": image_ids, "txt_ids": image_ids.new_zeros(embeddings.sequence.shape[1], 3)}
