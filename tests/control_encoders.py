"""Control encoders with random weights, as after training, and what a UNet makes of them by hand."""

import torch
from diffusers import UNet2DConditionModel
from small_models import small_unet
from torch import Tensor

from ether_diffusion.control import ControlEncoder, new_encoder

PIXELS = 16
FACTOR = 2


def random_encoder(
    unet: UNet2DConditionModel, *, factor: int = FACTOR, seed: int = 5, control_type: str | None = None
) -> ControlEncoder:
    """An encoder whose last convolution is not zero any more."""
    encoder = new_encoder(unet, vae_scale_factor=factor, seed=seed, control_type=control_type)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.nn.init.normal_(encoder.conv_out.weight, std=0.2)
        torch.nn.init.normal_(encoder.conv_out.bias, std=0.2)
    return encoder


def control_images(number: int = 2, *, side: int = PIXELS, seed: int = 3) -> Tensor:
    return torch.rand(number, 3, side, side, generator=torch.Generator().manual_seed(seed))


def unet_inputs(batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(batch, 4, 8, 8, generator=generator)
    return sample, torch.full((batch,), 300), torch.randn(batch, 5, 32, generator=generator)


def predict(unet: UNet2DConditionModel, inputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    return unet(*inputs, return_dict=False)[0]


def adding_unet(unet: UNet2DConditionModel, features: Tensor) -> UNet2DConditionModel:
    """A copy of a UNet to whose first convolution the features of control images are added by hand."""
    model = UNet2DConditionModel.from_config(unet.config).eval()
    model.load_state_dict(unet.state_dict())
    model.conv_in = _Adding(model.conv_in, features)
    return model


class _Adding(torch.nn.Module):
    def __init__(self, convolution: torch.nn.Module, features: Tensor) -> None:
        super().__init__()
        self.convolution, self.features = convolution, features

    def forward(self, sample: Tensor) -> Tensor:
        return self.convolution(sample) + self.features


def fresh_unet() -> UNet2DConditionModel:
    return small_unet().requires_grad_(False)
