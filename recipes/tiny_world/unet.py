"""The UNet stage: v-prediction on cached latents, with the text tower trained along at a lower rate."""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, DPMSolverMultistepScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from transformers import CLIPTextModel, CLIPTokenizer

from recipes.tiny_world.autoencoder import LATENT_NOISE
from recipes.tiny_world.clip import TEXT_WIDTH, tokenize
from recipes.tiny_world.loop import Batch
from recipes.tiny_world.sampling import sample_latents
from recipes.tiny_world.sheets import to_pictures, write_contact_sheet

logger = logging.getLogger(__name__)

MIN_SNR_GAMMA = 5.0
CAPTION_DROPOUT = 0.1
SHEET_CAPTIONS = 48
SCHEDULE: dict[str, int | float | str | bool] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    # Without it the last step still leaks the picture's mean colour, and plain backgrounds come out grey.
    "rescale_betas_zero_snr": True,
    "steps_offset": 1,
}
# Keys that DPM-Solver++ does not have, for the schedulers that are made from its config.
OTHER_SCHEDULERS: dict[str, int | float | str | bool] = {"clip_sample": False, "set_alpha_to_one": False}


def build_scheduler() -> DPMSolverMultistepScheduler:
    """Build the pipeline's scheduler, with a config from which DDIM, Euler and others can be made."""
    scheduler: DPMSolverMultistepScheduler = DPMSolverMultistepScheduler.from_config(
        SCHEDULE | OTHER_SCHEDULERS
    )
    return scheduler


def build_unet() -> UNet2DConditionModel:
    """Build the untrained UNet: attention at 16 x 16 and 8 x 8, heads of width 32."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(96, 160),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=(3, 5),  # in this class: the number of heads
        norm_num_groups=16,
    )


@dataclass(frozen=True)
class CachedLatents:
    """Mean latents (n, 4, 16, 16) of the training composites, their tokens (n, MAX_TOKENS) and classes (n).

    scale is what latents are multiplied with, noise_scale the posterior's deviation after that; weights
    (num_concepts), where given, say how often each concept is drawn.
    """

    latents: torch.Tensor
    input_ids: torch.Tensor
    labels: torch.Tensor
    scale: float
    noise_scale: float
    weights: torch.Tensor | None = None

    def draw(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Draw indices (count) of composites."""
        if self.weights is None:
            return torch.randint(len(self.latents), (count,), generator=generator)
        return torch.multinomial(self.weights[self.labels], count, replacement=True, generator=generator)


class UNetObjective(torch.nn.Module):
    """The v-prediction loss, weighted by min-SNR."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder
        scheduler = DDPMScheduler(**SCHEDULE)
        self.register_buffer("alphas", scheduler.alphas_cumprod.clone(), persistent=False)

    def forward(
        self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, input_ids: torch.Tensor
    ) -> torch.Tensor:
        """The mean of the samples' losses."""
        return self.losses(latents, noise, timesteps, input_ids).mean()

    def losses(
        self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, input_ids: torch.Tensor
    ) -> torch.Tensor:
        """Losses (b) for latents and noise (b, 4, 16, 16), timesteps (b) and tokens (b, MAX_TOKENS).

        With a = alphas_cumprod[t]: x = sqrt(a) latents + sqrt(1 - a) noise and
        v = sqrt(a) noise - sqrt(1 - a) latents (Salimans & Ho 2022, arXiv:2202.00512). The weight
        (min(snr, gamma) + 1) / (snr + 1) is min-SNR (Hang et al. 2023, arXiv:2303.09556) with one added to
        the signal-to-noise ratio, so that steps without signal still count.
        """
        alphas = self.get_buffer("alphas")[timesteps].view(-1, 1, 1, 1)
        signal, sigma = alphas.sqrt(), (1 - alphas).sqrt()
        states = self.text_encoder(input_ids=input_ids).last_hidden_state
        prediction = self.unet(signal * latents + sigma * noise, timesteps, states).sample.float()
        squared = (prediction - (signal * noise - sigma * latents)).square().mean((1, 2, 3))
        snr = (alphas / (1 - alphas)).flatten()
        weight = snr.clamp(max=MIN_SNR_GAMMA).add(1) / (snr + 1)
        losses: torch.Tensor = weight * squared
        return losses


class UNetStage:
    """UNet and text encoder in training."""

    name = "unet"
    batch_size = 32
    learning_rate = 8e-4
    text_rate = 0.4
    average_decay = 0.998

    def __init__(
        self,
        data: CachedLatents,
        *,
        unet: UNet2DConditionModel,
        text_encoder: CLIPTextModel,
        vae: AutoencoderKL,
        tokenizer: CLIPTokenizer,
        captions: list[str],
    ) -> None:
        # torch's flash attention is slow backwards on CPUs; plain matrix products are 1.4 times faster.
        if not torch.cuda.is_available():
            unet.set_attn_processor(AttnProcessor())
        self.data, self.vae, self.tokenizer, self.captions = data, vae, tokenizer, captions
        self.empty_ids = tokenize(tokenizer, [""])[0]
        self.caption_ids = tokenize(tokenizer, captions)
        self.unet, self.text_encoder = unet, text_encoder
        self.model = UNetObjective(unet, text_encoder)

    def parameter_groups(self, learning_rate: float) -> list[dict[str, object]]:
        """The UNet, and the text encoder at a lower rate."""
        return [
            {"params": list(self.unet.parameters()), "lr": learning_rate},
            {"params": list(self.text_encoder.parameters()), "lr": learning_rate * self.text_rate},
        ]

    def make_batch(self, batch_size: int, generator: torch.Generator) -> Batch:
        """Draw latents from the posterior with their tokens, some of them dropped; noise and timesteps."""
        indices = self.data.draw(batch_size, generator)
        latents = self.data.latents[indices].float() * self.data.scale
        jitter = torch.randn(latents.shape, generator=generator)
        dropped = torch.rand((batch_size, 1), generator=generator) < CAPTION_DROPOUT
        # One timestep from each of batch_size equal strata: less variance than independent draws.
        strata = (torch.arange(batch_size) + torch.rand((batch_size,), generator=generator)) / batch_size
        return {
            "latents": latents + self.data.noise_scale * jitter,
            "noise": torch.randn(latents.shape, generator=generator),
            "timesteps": (strata * 1000).long(),
            "input_ids": torch.where(dropped, self.empty_ids, self.data.input_ids[indices]),
        }

    @torch.no_grad()
    def write_sheet(self, path: Path, device: torch.device) -> None:
        """Draw one picture for each of the stage's captions, from fixed noise."""
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn((len(self.captions), 4, 16, 16), generator=generator).to(device)
        latents = sample_latents(
            self.unet,
            build_scheduler(),
            noise=noise,
            prompt_states=self.text_encoder(input_ids=self.caption_ids.to(device)).last_hidden_state,
            empty_states=self.text_encoder(input_ids=self.empty_ids[None].to(device)).last_hidden_state,
        )
        vae = self.vae.to(device)
        images = vae.decode(latents / vae.config.scaling_factor).sample
        write_contact_sheet(to_pictures(images), path, columns=12)


def posterior_noise(vae: AutoencoderKL) -> float:
    """Deviation of the posterior in units of scaled latents."""
    return LATENT_NOISE * float(vae.config.scaling_factor)
