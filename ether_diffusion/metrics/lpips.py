"""LPIPS (Zhang et al. 2018, arXiv:1801.03924, eq. 1) with AlexNet, as behind the published tables.

torchmetrics' own takes AlexNet from torchvision, which can only be imported beside exactly the build of torch
that it was made for; from torchmetrics come the weights of the channels.
"""

import itertools
import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from ether_diffusion.tiny_world.pictures import to_tensor
from ether_diffusion.wording import printable

NEEDS_TORCHMETRICS = "it needs torchmetrics, which is not installed; pip install 'ether-diffusion[evaluate]'"
ALEXNET_FILE = "alexnet-owt-7be5be79.pth"
ALEXNET_URL = f"https://download.pytorch.org/models/{ALEXNET_FILE}"
_MIN_SIDE_PX = 32  # below, AlexNet's pooling leaves nothing
_MEAN, _SPREAD = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of ImageNet, for pixels in [-1, 1]
# (in, out, kernel, stride, padding) of AlexNet's convolutions, by their names in torchvision's file
_CONVOLUTIONS = {"0": (3, 64, 11, 4, 2), "3": (64, 192, 5, 1, 2), "6": (192, 384, 3, 1, 1),
                 "8": (384, 256, 3, 1, 1), "10": (256, 256, 3, 1, 1)}  # fmt: skip


class Lpips(nn.Module):
    """AlexNet's five layers of ReLUs, and a weight for each of their channels."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({name: nn.Conv2d(*shape) for name, shape in _CONVOLUTIONS.items()})
        self.channels = nn.ParameterList(torch.zeros(1, out, 1, 1) for _, out, *_ in _CONVOLUTIONS.values())
        self.requires_grad_(False)

    @torch.no_grad()
    def activations(self, picture: Image.Image, size: tuple[int, int]) -> list[Tensor]:
        """Return each layer's activations for a picture at a size: (1, channels, h, w), unit by place."""
        if min(size) < _MIN_SIDE_PX:
            raise ValueError(f"LPIPS needs pictures of at least {_MIN_SIDE_PX} px; found {size[0]}x{size[1]}")
        rgb = picture.convert("RGB")
        pixels = to_tensor([rgb if rgb.size == size else rgb.resize(size, Image.Resampling.LANCZOS)])
        pixels = pixels.to(self.channels[0].device)
        mean, spread = (pixels.new_tensor(each).view(1, 3, 1, 1) for each in (_MEAN, _SPREAD))
        state, found = (pixels - mean) / spread, []
        for number, layer in enumerate(self.layers.values()):
            if number in (1, 2):
                state = F.max_pool2d(state, kernel_size=3, stride=2)
            state = F.relu(layer(state))
            found.append(state / torch.sqrt(1e-8 + state.square().sum(dim=1, keepdim=True)))
        return found

    def distance(self, first: list[Tensor], second: list[Tensor]) -> float:
        """Return Σ_l mean_hw w_l · (y_l − z_l)² of the activations of two pictures."""
        layers = zip(first, second, self.channels, strict=True)
        return float(torch.stack([((y - z).square() * w).sum(1).mean((1, 2)) for y, z, w in layers]).sum(0))


def load_lpips(path: Path | None = None, *, device: torch.device | None = None) -> Lpips:
    """Load LPIPS: AlexNet's weights from `path` or torch's cache, its channels' from torchmetrics.

    Raises:
        FileNotFoundError: the weights are not there.
        ValueError: they are no weights of AlexNet, or torchmetrics is not installed.
    """
    file = path or Path(torch.hub.get_dir(), "checkpoints", ALEXNET_FILE)
    if not file.is_file():
        where = "torch's cache" if path is None else printable(path)
        sought = f"LPIPS needs the weights of AlexNet, which are not in {where}"
        raise FileNotFoundError(f"{sought}; fetch {ALEXNET_URL} and name the file")
    module = find_spec("torchmetrics")
    if module is None or module.origin is None:
        raise ValueError(f"there is no LPIPS: {NEEDS_TORCHMETRICS}")
    theirs = Path(module.origin).parent / "functional" / "image" / "lpips_models" / "alex.pth"
    lpips = Lpips()
    try:
        weights, channels = (
            load_file(each)
            if each.suffix == ".safetensors"
            else torch.load(each, map_location="cpu", weights_only=True)
            for each in (file, theirs)
        )
        state = {f"layers.{key}": weights[f"features.{key}"] for key in lpips.layers.state_dict()}
        state |= {f"channels.{number}": channels[f"lin{number}.model.1.weight"] for number in range(5)}
        lpips.load_state_dict(state)
    except Exception as error:  # unpickling fails in as many ways as there are files
        raise ValueError(f"{printable(file)} holds no weights of AlexNet; fetch {ALEXNET_URL}") from error
    return lpips.eval().to(device or "cpu")


def find_lpips(
    weights: Path | None, *, device: torch.device | None = None
) -> tuple[Lpips | None, str | None]:
    """Load LPIPS; where it is not here and no weights were named, return why not instead."""
    try:
        return load_lpips(weights, device=device), None
    except (OSError, ValueError) as problem:
        if weights is not None:
            raise
        return None, str(problem)


def distances_to(lpips: Lpips, photos: Sequence[Image.Image], pictures: Sequence[Image.Image]) -> list[float]:
    """Return each picture's mean LPIPS to all photos, which are scaled to the pictures' size.

    The reading of the code behind the published tables, where more means further from the references.
    """
    references = [lpips.activations(photo, pictures[0].size) for photo in photos]
    seen = (lpips.activations(picture, pictures[0].size) for picture in pictures)
    return [math.fsum(lpips.distance(own, each) for each in references) / len(references) for own in seen]


def distances_among(lpips: Lpips, pictures: Sequence[Image.Image]) -> list[float]:
    """Return each picture's mean LPIPS to the others, two or more, all scaled to the size of the first.

    The reading of the papers' text: diversity, if the pictures are of one prompt.
    """
    if len(pictures) < 2:
        raise ValueError(f"LPIPS among pictures needs at least two; found {len(pictures)}")
    seen = [lpips.activations(each, pictures[0].size) for each in pictures]
    rows: list[list[float]] = [[] for _ in pictures]
    for i, j in itertools.combinations(range(len(seen)), 2):
        distance = lpips.distance(seen[i], seen[j])
        rows[i].append(distance)
        rows[j].append(distance)
    return [math.fsum(row) / len(row) for row in rows]
