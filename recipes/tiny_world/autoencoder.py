"""The autoencoder stage: a GroupNorm KL autoencoder, 64 px to 16 x 16 latents with 4 channels."""

import logging
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from recipes.tiny_world.data import Composites
from recipes.tiny_world.loop import Batch, trainable
from recipes.tiny_world.sheets import to_pictures, write_contact_sheet

logger = logging.getLogger(__name__)

LATENT_NOISE = 0.05


def build_vae() -> AutoencoderKL:
    """Build the untrained autoencoder: f4, 4 latent channels, no attention."""
    vae = AutoencoderKL(
        block_out_channels=(32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=64,
        scaling_factor=1.0,
    )
    # The posterior's deviation is the constant LATENT_NOISE: only the mean is learned.
    assert vae.quant_conv is not None
    with torch.no_grad():
        vae.quant_conv.weight[4:] = 0
        vae.quant_conv.bias[4:] = 2 * torch.tensor(LATENT_NOISE).log()
    return vae


def _edges(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return images[..., 1:, :] - images[..., :-1, :], images[..., :, 1:] - images[..., :, :-1]


def reconstruction_loss(reconstructed: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """L1 + 2 MSE + 0.5 L1 of the edges + L1 of 4 x 4 means, which keeps plain colours true."""
    loss = F.l1_loss(reconstructed, images) + 2 * F.mse_loss(reconstructed, images)
    for ours, theirs in zip(_edges(reconstructed), _edges(images), strict=True):
        loss = loss + 0.25 * F.l1_loss(ours, theirs)
    return loss + F.l1_loss(F.avg_pool2d(reconstructed, 4), F.avg_pool2d(images, 4))


class AutoencoderObjective(torch.nn.Module):
    """Reconstruction from noisy latents, plus a pull of each latent channel to mean 0 and deviation 1."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, images: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Loss for images (b, 3, 64, 64) in [-1, 1] and noise (b, 4, 16, 16)."""
        latents = self.vae.encode(images).latent_dist.mean.float()
        reconstructed = self.vae.decode(latents + LATENT_NOISE * noise).sample.float()
        mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
        pull = mean.square().mean() + (deviation - 1).square().mean()
        loss: torch.Tensor = reconstruction_loss(reconstructed, images) + 0.02 * pull
        return loss


class AutoencoderStage:
    """The autoencoder in training."""

    name = "autoencoder"
    batch_size = 8
    learning_rate = 1e-3
    average_decay = 0.998

    def __init__(self, composites: Composites, vae: AutoencoderKL | None = None) -> None:
        self.composites = composites
        self.vae = vae or build_vae()
        self.model = AutoencoderObjective(self.vae)

    def parameter_groups(self, learning_rate: float) -> list[dict[str, object]]:
        """One group without weight decay, which would move the constant deviation."""
        return [{"params": trainable(self.model.parameters()), "lr": learning_rate, "weight_decay": 0.0}]

    def make_batch(self, batch_size: int, generator: torch.Generator) -> Batch:
        """Draw composites and latent noise."""
        indices = torch.randint(len(self.composites.labels), (batch_size,), generator=generator)
        noise = torch.randn((batch_size, 4, 16, 16), generator=generator)
        return {"images": self.composites.images(indices), "noise": noise}

    @torch.no_grad()
    def write_sheet(self, path: Path, device: torch.device) -> None:
        """Draw 24 pictures above their reconstructions, and log their PSNR."""
        count = len(self.composites.labels)
        images = self.composites.images(torch.arange(0, count, count // 24)[:24]).to(device)
        reconstructed = reconstruct(self.vae, images)
        logger.info("reconstruction %.2f dB", psnr(reconstructed, images).mean().item())
        rows = [
            torch.cat((images[start : start + 12], reconstructed[start : start + 12])) for start in (0, 12)
        ]
        write_contact_sheet(to_pictures(torch.cat(rows)), path, columns=12)


class DecoderStage(AutoencoderStage):
    """The decoder alone in training: latents, and so the UNet, keep their meaning."""

    name = "decoder"
    learning_rate = 5e-4

    def __init__(self, composites: Composites, vae: AutoencoderKL) -> None:
        super().__init__(composites, vae.requires_grad_(True))
        assert vae.quant_conv is not None
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Encode images (b, 3, 64, 64) in [-1, 1] to their mean latents and decode these."""
    reconstructed: torch.Tensor = vae.decode(vae.encode(images).latent_dist.mean).sample
    return reconstructed.clamp(-1, 1)


def psnr(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB of each picture (b, 3, height, width) in [-1, 1]."""
    return 10 * (4 / (ours - theirs).square().mean((1, 2, 3))).log10()
