"""The flow stage: an SD3-shaped transformer by flow matching, on the UNet stage's latents and captions."""

import math
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from diffusers.models.attention_processor import Attention
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from ether_diffusion.bases.base import PromptEmbeddings
from ether_diffusion.bases.flow import FlowNoise
from ether_diffusion.bases.stable_diffusion_3 import StableDiffusion3
from ether_diffusion.tiny_world.networks import TinyClip
from recipes.tiny_world.clip import TEXT_PREFIX, TEXT_WIDTH
from recipes.tiny_world.latents import Latents
from recipes.tiny_world.loop import Batch
from recipes.tiny_world.sheets import write_contact_sheet
from recipes.tiny_world.unet import CAPTION_DROPOUT, posterior_noise

WIDTH, NUM_HEADS, NUM_LAYERS, PATCH = 160, 5, 4, 2
SHIFT = 1.0
"""Of the noise: none, for 64 tokens; diffusers' dynamic shifts fall below one there too."""
NUM_ZEROS = 256
"""Tokens of zeros that StableDiffusion3Pipeline reads where there is no T5."""
CONTEXT_RATE = 0.1
"""Share of the learning rate for the layer that reads text, whose features are ten times too large."""


def build_transformer() -> SD3Transformer2DModel:
    """Build the untrained transformer, whose blocks and output begin at zero (DiT's adaLN-Zero)."""
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=PATCH,
        in_channels=4,
        out_channels=4,
        num_layers=NUM_LAYERS,
        num_attention_heads=NUM_HEADS,
        attention_head_dim=WIDTH // NUM_HEADS,
        joint_attention_dim=2 * TEXT_WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=256,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )
    for name, module in transformer.named_modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.xavier_uniform_(module.weight)
            torch.nn.init.zeros_(module.bias)
            if name == "proj_out" or name.rpartition(".")[0].rpartition(".")[2].startswith("norm"):
                torch.nn.init.zeros_(module.weight)
    transformer.context_embedder.weight.data.mul_(CONTEXT_RATE)
    return transformer


def build_text_encoders(clip: TinyClip) -> tuple[CLIPTextModelWithProjection, CLIPTextModelWithProjection]:
    """Build the two text encoders that SD 3 reads: Tiny World's, and its first layer alone."""
    weights = {TEXT_PREFIX + name: tensor for name, tensor in clip.text_encoder.state_dict().items()}
    weights["text_projection.weight"] = clip.text_projection
    encoders = []
    for num_layers in (clip.text_encoder.config.num_hidden_layers, 1):
        config = CLIPTextConfig(**clip.text_encoder.config.to_dict() | {"num_hidden_layers": num_layers})
        encoder = CLIPTextModelWithProjection(config)
        encoder.load_state_dict({name: weights[name] for name in encoder.state_dict()})
        encoders.append(encoder.eval().requires_grad_(False))
    return encoders[0], encoders[1]


def build_flow_pipeline(
    transformer: SD3Transformer2DModel, clip: TinyClip, vae: AutoencoderKL
) -> StableDiffusion3Pipeline:
    """Put a pipeline of Stable Diffusion 3 without T5 around a transformer."""
    vae.register_to_config(shift_factor=0.0)
    text_encoder, text_encoder_2 = build_text_encoders(clip)
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=clip.tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=clip.tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )


class CountedZeros:
    """Joint attention in plain products, in which the text's last token counts as `NUM_ZEROS` equal ones.

    The zeros in T5's place have no position and so stay equal in every block: n of them are one whose logits
    are higher by log n. Training then reads 25 tokens of text and not 280.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend as JointAttnProcessor2_0 does to picture (b, n, d) and text (b, m, d)."""

        def heads(states: torch.Tensor) -> torch.Tensor:
            return states.view(*states.shape[:2], attn.heads, -1).transpose(1, 2)

        picture, text = hidden_states, encoder_hidden_states
        queries = attn.norm_q(heads(attn.to_q(picture))), attn.norm_added_q(heads(attn.add_q_proj(text)))
        keys = attn.norm_k(heads(attn.to_k(picture))), attn.norm_added_k(heads(attn.add_k_proj(text)))
        values = torch.cat((heads(attn.to_v(picture)), heads(attn.add_v_proj(text))), 2)
        query, key = (torch.cat(each, 2).to(values.dtype) for each in (queries, keys))
        logits = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        logits[..., -1] += math.log(NUM_ZEROS)
        states = (logits.softmax(-1).to(values.dtype) @ values).transpose(1, 2).flatten(2)
        picture, text = states.split((picture.shape[1], text.shape[1]), 1)
        return attn.to_out[0](picture), text if attn.context_pre_only else attn.to_add_out(text)


class FlowObjective(torch.nn.Module):
    """The loss of flow matching with logit-normal timesteps, as adapters are trained on such bases."""

    def __init__(self, transformer: SD3Transformer2DModel) -> None:
        super().__init__()
        self.transformer = transformer
        self.noise = FlowNoise(FlowMatchEulerDiscreteScheduler(shift=SHIFT), "logit_normal", PATCH)

    def forward(
        self,
        latents: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
        sequence: torch.Tensor,
        pooled: torch.Tensor,
    ) -> torch.Tensor:
        """The mean loss of latents and noise (b, 4, 16, 16) at timesteps (b), with embedded captions."""
        noisy = self.noise.add(latents, noise, timesteps)
        embeddings = PromptEmbeddings(sequence, pooled)
        velocity = StableDiffusion3.predict(self.transformer, noisy, timesteps, embeddings).float()
        errors = (velocity - self.noise.target(latents, noise, timesteps)).square().mean((1, 2, 3))
        loss: torch.Tensor = (self.noise.weights(timesteps) * errors).mean()
        return loss


class FlowStage:
    """The transformer in training; the text encoders are finished, and each caption is embedded once."""

    name = "flow"
    batch_size = 32
    learning_rate = 1.2e-3
    average_decay = 0.999

    def __init__(self, data: Latents, pipeline: StableDiffusion3Pipeline, captions: list[str]) -> None:
        self.pipeline, self.captions, self.latents = pipeline, captions, data.latents
        self.scale, self.jitter = float(pipeline.vae.config.scaling_factor), posterior_noise(pipeline.vae)
        texts = sorted({"", *data.captions})  # the empty one is first
        numbers = {text: number for number, text in enumerate(texts)}
        self.numbers = torch.tensor([numbers[caption] for caption in data.captions])
        self.sequence, self.pooled = embed_captions(pipeline, texts)
        pipeline.transformer.set_attn_processor(CountedZeros())
        self.model = FlowObjective(pipeline.transformer)

    def parameter_groups(self, learning_rate: float) -> list[dict[str, object]]:
        """The transformer, and its layer that reads text at a lower rate."""
        reader = list(self.model.transformer.context_embedder.parameters())
        others = [each for each in self.model.parameters() if all(each is not own for own in reader)]
        return [
            {"params": others, "lr": learning_rate},
            {"params": reader, "lr": learning_rate * CONTEXT_RATE},
        ]

    def make_batch(self, batch_size: int, generator: torch.Generator) -> Batch:
        """Draw latents from the posterior with their captions, some of them dropped; noise and timesteps."""
        indices = torch.randint(len(self.latents), (batch_size,), generator=generator)
        latents = self.latents[indices].float() * self.scale
        latents += self.jitter * torch.randn(latents.shape, generator=generator)
        dropped = torch.rand((batch_size,), generator=generator) < CAPTION_DROPOUT
        numbers = torch.where(dropped, 0, self.numbers[indices])
        draw = self.model.noise.draw_timestep
        return {
            "latents": latents,
            "noise": torch.randn(latents.shape, generator=generator),
            "timesteps": torch.stack([draw(generator, latents.shape[1:]) for _ in range(batch_size)]),
            "sequence": self.sequence[numbers],
            "pooled": self.pooled[numbers],
        }

    @torch.no_grad()
    def write_sheet(self, path: Path, device: torch.device) -> None:
        """Draw one picture for each of the stage's captions, from fixed noise."""
        self.pipeline.set_progress_bar_config(disable=True)
        pictures = self.pipeline.to(device)(
            self.captions,
            num_inference_steps=20,
            guidance_scale=3.0,
            max_sequence_length=1,  # of zeros: see CountedZeros
            generator=[torch.Generator().manual_seed(number) for number in range(len(self.captions))],
        ).images
        write_contact_sheet(pictures, path, columns=12)


@torch.no_grad()
def embed_captions(
    pipeline: StableDiffusion3Pipeline, captions: list[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Embed captions as the pipeline does, with one token of zeros: sequence and pooled, in bfloat16."""
    sequences, pooled = [], []
    for start in range(0, len(captions), 256):
        some = [captions[start : start + 256]] * 3
        rows, _, vectors, _ = pipeline.encode_prompt(
            *some, do_classifier_free_guidance=False, max_sequence_length=1
        )
        sequences.append(rows.bfloat16())
        pooled.append(vectors.bfloat16())
    return torch.cat(sequences), torch.cat(pooled)
