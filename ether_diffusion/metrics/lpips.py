"""LPIPS (Zhang et al. 2018, arXiv:1801.03924, eq. 1) with AlexNet, as behind the published tables.

torchmetrics' own takes AlexNet from torchvision, which can only be imported beside exactly the build of torch
that it was made for; from torchmetrics come the weights of the channels.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from ether_diffusion.metrics.likeness import NEEDS_TORCHMETRICS
from ether_diffusion.tiny_world.pictures import to_tensor
from ether_diffusion.wording import printable

ALEXNET_FILE = "alexnet-owt-7be5be79.pth"
ALEXNET_URL = f"https://download.pytorch.org/models/{ALEXNET_FILE}"
_MIN_SIDE_PX = 32
"""Below, AlexNet's pooling leaves nothing."""
_MEAN, _SPREAD = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""Of ImageNet, for pixels in [-1, 1]."""
_EPSILON = 1e-8

Activations = list[Tensor]
"""Of the five layers, each (b, channels, h, w), of unit length along the channels."""


class Lpips(nn.Module):
    """AlexNet's five layers of ReLUs, and a weight for each of their channels."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(
            {
                "0": nn.Conv2d(3, 64, 11, stride=4, padding=2),
                "3": nn.Conv2d(64, 192, 5, padding=2),
                "6": nn.Conv2d(192, 384, 3, padding=1),
                "8": nn.Conv2d(384, 256, 3, padding=1),
                "10": nn.Conv2d(256, 256, 3, padding=1),
            }
        )
        self.channels = nn.ParameterList(torch.zeros(1, size, 1, 1) for size in (64, 192, 384, 256, 256))
        self.requires_grad_(False)

    @torch.no_grad()
    def activations(self, picture: Image.Image, size: tuple[int, int]) -> Activations:
        """Return the layers' unit activations for a picture scaled to a size.

        Raises:
            ValueError: the size is too small.
        """
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
            found.append(state / torch.sqrt(_EPSILON + state.square().sum(dim=1, keepdim=True)))
        return found

    def distance(self, first: Activations, second: Activations) -> float:
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
        raise FileNotFoundError(
            f"LPIPS needs the weights of AlexNet, which are not in {where}; fetch {ALEXNET_URL} "
            "and name the file"
        )
    module = find_spec("torchmetrics")
    if module is None or module.origin is None:
        raise ValueError(f"there is no LPIPS: {NEEDS_TORCHMETRICS}")
    channels = _read(Path(module.origin).parent / "functional" / "image" / "lpips_models" / "alex.pth")
    lpips = Lpips()
    try:
        weights = _read(file)
        state = {f"layers.{key}": weights[f"features.{key}"] for key in lpips.layers.state_dict()}
        state |= {f"channels.{number}": channels[f"lin{number}.model.1.weight"] for number in range(5)}
        lpips.load_state_dict(state)
    except Exception as error:  # unpickling fails in as many ways as there are files
        raise ValueError(f"{printable(file)} holds no weights of AlexNet; fetch {ALEXNET_URL}") from error
    return lpips.eval().to(device or "cpu")


def find_lpips(
    weights: Path | None, *, device: torch.device | None = None
) -> tuple[Lpips | None, str | None]:
    """Load LPIPS; where it is not here and no weights were named, return why not instead.

    Raises:
        OSError, ValueError: the weights that were named cannot be used.
    """
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
    size = pictures[0].size
    references = [lpips.activations(photo, size) for photo in photos]
    found = []
    for picture in pictures:
        own = lpips.activations(picture, size)
        found.append(math.fsum(lpips.distance(own, each) for each in references) / len(references))
    return found


def distances_among(lpips: Lpips, pictures: Sequence[Image.Image]) -> list[float]:
    """Return each picture's mean LPIPS to the others, all scaled to the size of the first.

    The reading of the papers' text: diversity, if the pictures are of one prompt.

    Raises:
        ValueError: there are fewer than two.
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


def _read(file: Path) -> Mapping[str, Tensor]:
    loaded: Mapping[str, Tensor] = (
        load_file(file)
        if file.suffix == ".safetensors"
        else torch.load(file, map_location="cpu", weights_only=True)
    )
    return loaded
