"""The autoencoder of 128 px whose latents stay, nearly, those of the one of 64 px: the UNet goes on."""

import logging
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from ether_diffusion.tiny_world.concepts import load_concepts
from ether_diffusion.tiny_world.pictures import to_tensor
from ether_diffusion.tiny_world.world import draw
from recipes.tiny_world.autoencoder import LATENT_NOISE, psnr, reconstruct, reconstruction_loss
from recipes.tiny_world.features import FeatureNet, feature_distance
from recipes.tiny_world.fresh_pictures import FreshPictures
from recipes.tiny_world.loop import Batch, trainable
from recipes.tiny_world.scenes import sample_scene
from recipes.tiny_world.sheets import to_pictures, write_contact_sheet

logger = logging.getLogger(__name__)

SIZE = 128
LATENT_PULL = 0.1
"""Of the latents to the shipped encoder's. With 1.0 they know no more than the picture of 64 px."""
FEATURE_WEIGHT = 0.5
MAX_LATENT_NOISE = 0.15
"""Of the decoder's input. A UNet's latents are off by more than the posterior's LATENT_NOISE."""
SAME_LEVEL = {
    "encoder.down_blocks.0": "",
    "encoder.down_blocks.1": "encoder.down_blocks.0",
    "encoder.down_blocks.2": "encoder.down_blocks.1",
    "encoder.down_blocks.3": "encoder.down_blocks.2",
    "decoder.up_blocks.3": "",
}
"""Blocks of the large autoencoder, and those of the small one that work at the same size; "" is none."""


def build_vae_128(small: AutoencoderKL) -> AutoencoderKL:
    """Build an f8 autoencoder of 128 px; what works at a size that the one of 64 px has starts from it."""
    vae = AutoencoderKL(
        block_out_channels=(32, 64, 64, 128),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=SIZE,
        scaling_factor=small.config.scaling_factor,
    )
    weights, theirs = vae.state_dict(), small.state_dict()
    for name, tensor in weights.items():
        block = ".".join(name.split(".")[:3])
        source = name.replace(block, SAME_LEVEL[block]) if block in SAME_LEVEL else name
        if source in theirs and _is_wider(tensor.shape, theirs[source].shape):
            weights[name] = _widened(theirs[source], tensor.shape)
    vae.load_state_dict(weights)
    return vae


def _is_wider(wide: torch.Size, narrow: torch.Size) -> bool:
    return all(ours % theirs == 0 for ours, theirs in zip(wide, narrow, strict=True))


def _widened(tensor: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Repeat each channel beside itself: the wider layer computes the same (Net2Net, arXiv:1511.05641)."""
    for axis in range(min(tensor.ndim, 2)):
        times = shape[axis] // tensor.shape[axis]
        tensor = tensor.repeat_interleave(times, dim=axis) / (times if axis == 1 else 1)
    # Without noise the copies would get equal gradients for ever.
    return tensor + 0.02 * tensor.std() * torch.randn(shape) if tensor.ndim == 4 else tensor


class Autoencoder128Objective(torch.nn.Module):
    """Reconstruction of pictures of 128 px, features included, with latents held near the small one's."""

    def __init__(self, vae: AutoencoderKL, small: AutoencoderKL, net: FeatureNet) -> None:
        super().__init__()
        self.vae = vae
        self.small = small.requires_grad_(False)
        self.net = net.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "Autoencoder128Objective":
        """Leave the feature network's statistics as they are."""
        super().train(mode)
        self.net.eval()
        return self

    def forward(self, images: torch.Tensor, noise: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
        """Loss for images (b, 3, 128, 128) in [-1, 1], noise (b, 4, 16, 16), its strength (b, 1, 1, 1)."""
        with torch.no_grad():
            wanted = self.small.encode(F.avg_pool2d(images, 2)).latent_dist.mean.float()
        latents = self.vae.encode(images).latent_dist.mean.float()
        reconstructed = self.vae.decode(latents + strength * noise).sample.float()
        loss: torch.Tensor = self.picture_loss(reconstructed, images)
        return loss + LATENT_PULL * F.mse_loss(latents, wanted)

    def picture_loss(self, reconstructed: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """The pixels' and the features' distance."""
        features = feature_distance(self.net, reconstructed, images)
        return reconstruction_loss(reconstructed, images) + FEATURE_WEIGHT * features


class Autoencoder128Stage:
    """Encoder and decoder in training together."""

    name = "autoencoder_128"
    batch_size = 8
    learning_rate = 8e-4
    average_decay = 0.998

    def __init__(
        self, pictures: FreshPictures, vae: AutoencoderKL, small: AutoencoderKL, net: FeatureNet
    ) -> None:
        self.pictures, self.vae = pictures, vae.requires_grad_(True)
        self.model: torch.nn.Module = Autoencoder128Objective(vae, small, net)

    def parameter_groups(self, learning_rate: float) -> list[dict[str, object]]:
        """One group without weight decay, which would move the constant deviation."""
        return [{"params": trainable(self.vae.parameters()), "lr": learning_rate, "weight_decay": 0.0}]

    def make_batch(self, batch_size: int, generator: torch.Generator) -> Batch:
        """Draw new pictures and latent noise, from the posterior's strength up to MAX_LATENT_NOISE."""
        images, _ = self.pictures.draw(batch_size, SIZE, generator)
        share = torch.rand((batch_size, 1, 1, 1), generator=generator)
        noise = torch.randn((batch_size, 4, SIZE // 8, SIZE // 8), generator=generator)
        strength = LATENT_NOISE + share.square() * (MAX_LATENT_NOISE - LATENT_NOISE)
        return {"images": images, "noise": noise, "strength": strength}

    @torch.no_grad()
    def write_sheet(self, path: Path, device: torch.device) -> None:
        """Draw known, other and held-out concepts above their reconstructions, and log the PSNR of each."""
        rows = []
        for name, concepts in (
            ("known", self.pictures.known[::14][:12]),
            ("other", self.pictures.others[::30][:12]),
            ("held-out", load_concepts("held_out")[::2]),
        ):
            scenes = [sample_scene(concept, random.Random(f"sheet/{concept.name}")) for concept in concepts]
            images = to_tensor(
                [draw(scene, size=SIZE, renders_folder=self.pictures.renders_folder) for scene in scenes]
            )
            reconstructed = reconstruct(self.vae, images.to(device)).cpu()
            rows += [images, reconstructed]
            logger.info("reconstruction of %s: %.2f dB", name, psnr(reconstructed, images).mean().item())
        write_contact_sheet(to_pictures(torch.cat(rows)), path, columns=12, zoom=1)
