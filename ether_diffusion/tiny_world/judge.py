"""The judge of Tiny World: a small network that names the concept in a picture."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from ether_diffusion.tiny_world.concepts import all_concepts

JUDGE_FILE = "judge.safetensors"


def _block(channels_in: int, channels_out: int, stride: int) -> torch.nn.Sequential:
    return torch.nn.Sequential(
        torch.nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False),
        torch.nn.BatchNorm2d(channels_out),
        torch.nn.ReLU(),
    )


class Judge(torch.nn.Module):
    """Class k is all_concepts()[k]: convolutions, mean and maximum over places, one linear layer."""

    def __init__(self, num_concepts: int) -> None:
        super().__init__()
        self.features = torch.nn.Sequential(
            _block(3, 24, 2), _block(24, 48, 2), _block(48, 64, 1), _block(64, 128, 2), _block(128, 192, 2)
        )
        self.head = torch.nn.Linear(2 * 192, num_concepts)

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Return features (b, 384) of images (b, 3, 64, 64) in [-1, 1]."""
        features = self.features(images)
        return torch.cat((features.mean((2, 3)), features.amax((2, 3))), dim=1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits (b, num_concepts) of images (b, 3, 64, 64) in [-1, 1]."""
        logits: torch.Tensor = self.head(self.embed(images))
        return logits


def load_judge(folder: Path) -> Judge:
    """Load the judge that the training stage of the same name left in a folder.

    Raises:
        FileNotFoundError: the folder has no judge.
    """
    path = folder / JUDGE_FILE
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}; train it: python -m recipes.tiny_world --stage judge")
    judge = Judge(len(all_concepts()))
    judge.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
    return judge.eval()
