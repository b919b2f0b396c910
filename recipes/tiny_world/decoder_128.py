"""The decoder of 128 px trained on alone, against a critic of its edges; latents stay as they are."""

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch.func import functional_call

from recipes.tiny_world.autoencoder_128 import Autoencoder128Objective, Autoencoder128Stage
from recipes.tiny_world.features import FeatureNet
from recipes.tiny_world.fresh_pictures import FreshPictures
from recipes.tiny_world.loop import trainable

ADVERSARIAL_WEIGHT = 0.05


class Critic(torch.nn.Module):
    """Says of each patch of about 22 px how real it looks (PatchGAN, arXiv:1611.07004)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Conv2d(3, 32, 3, 1, 1),
            torch.nn.LeakyReLU(0.2),
            torch.nn.Conv2d(32, 48, 4, 2, 1),
            torch.nn.GroupNorm(8, 48),
            torch.nn.LeakyReLU(0.2),
            torch.nn.Conv2d(48, 96, 4, 2, 1),
            torch.nn.GroupNorm(8, 96),
            torch.nn.LeakyReLU(0.2),
            torch.nn.Conv2d(96, 1, 3, 1, 1),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return scores (b, 1, 32, 32) of images (b, 3, 128, 128) in [-1, 1]."""
        scores: torch.Tensor = self.layers(images).float()
        return scores


class Decoder128Objective(Autoencoder128Objective):
    """The picture's loss, plus a relativistic adversary (arXiv:1807.00734): each true patch is the rival."""

    def __init__(self, vae: AutoencoderKL, small: AutoencoderKL, net: FeatureNet) -> None:
        super().__init__(vae, small, net)
        self.critic = Critic()

    def forward(self, images: torch.Tensor, noise: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
        """Loss of decoder and critic for images (b, 3, 128, 128) in [-1, 1]; noise as in the other stage."""
        with torch.no_grad():
            latents = self.vae.encode(images).latent_dist.mean.float()
        reconstructed = self.vae.decode(latents + strength * noise).sample.float()
        # The decoder sees the critic's weights as constants, the critic sees the picture as one.
        constants = {name: tensor.detach() for name, tensor in self.critic.named_parameters()}
        true_scores = self.critic(images)
        scores = functional_call(self.critic, constants, (reconstructed,))
        adversary = F.softplus(true_scores.detach() - scores).mean()
        critique = F.softplus(self.critic(reconstructed.detach()) - true_scores).mean()
        return self.picture_loss(reconstructed, images) + ADVERSARIAL_WEIGHT * adversary + critique


class Decoder128Stage(Autoencoder128Stage):
    """The decoder in training with its critic."""

    name = "decoder_128"
    learning_rate = 4e-4

    def __init__(
        self, pictures: FreshPictures, vae: AutoencoderKL, small: AutoencoderKL, net: FeatureNet
    ) -> None:
        self.pictures, self.vae = pictures, vae.requires_grad_(True)
        assert vae.quant_conv is not None
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
        self.critic_objective = Decoder128Objective(vae, small, net)
        self.model = self.critic_objective

    def parameter_groups(self, learning_rate: float) -> list[dict[str, object]]:
        """The decoder, and the critic without momentum."""
        critic = list(self.critic_objective.critic.parameters())
        return [
            {"params": trainable(self.vae.parameters()), "lr": learning_rate, "weight_decay": 0.0},
            {"params": critic, "lr": learning_rate / 2, "weight_decay": 0.0, "betas": (0.0, 0.99)},
        ]
