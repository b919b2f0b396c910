"""Batch sources in tests: folders of photos, and a VAE that can be worked out by hand."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import photo_files
import torch
from photo_files import Array
from torch import Tensor

from ether_diffusion.training.batches import Batch, BatchSource, Codec, SamplePlan
from ether_diffusion.training.config import ControlConfig, DataConfig, PriorConfig
from ether_diffusion.training.dataset import read_training_data
from ether_diffusion.training.photos import Scaling
from ether_diffusion.training.prior import read_class_images

FACTOR = 4
"""Pixels of a side that the stand-in VAE makes one latent of."""
SIZE = 64
NO_PRIOR = PriorConfig()
NUM_SAMPLES = 64


def base_like(size_multiple: int = 8, *, has_size_ids: bool = False, is_inpainting: bool = False) -> Any:
    """What a plan asks of a base, whose own size is SIZE."""
    facts = {"has_size_ids": has_size_ids, "is_inpainting": is_inpainting}
    return SimpleNamespace(native_size=SIZE, size_multiple=size_multiple, **facts)


def fill_with_photos(folder: Path, sizes: Sequence[tuple[int, int]], *, first_seed: int = 0) -> None:
    """Write 0.png, 1.png, … of the sizes (width, height), each with a caption."""
    folder.mkdir(exist_ok=True)
    for number, (width, height) in enumerate(sizes):
        picture = photo_files.noise(width, height, seed=first_seed + number)
        (folder / f"{number}.png").write_bytes(photo_files.encode(picture, "PNG"))
        (folder / f"{number}.txt").write_text(f"photo {number}", encoding="utf-8")


def ramp(width: int, height: int) -> Array:
    """A picture whose red is the column and whose green is the row."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([columns, rows, np.zeros_like(rows)], axis=-1).astype(np.uint8)


def encode(images: Tensor) -> tuple[Tensor, Tensor]:
    """Average areas; the fourth channel is 0, the standard deviation a tenth everywhere."""
    mean = torch.nn.functional.avg_pool2d(images.double(), FACTOR).float()
    mean = torch.cat((mean, torch.zeros_like(mean[:, :1])), dim=1)
    return mean, torch.full_like(mean, 0.1)


def encode_without_noise(images: Tensor) -> tuple[Tensor, Tensor]:
    mean, std = encode(images)
    return mean, torch.zeros_like(std)


def double(latents: Tensor) -> Tensor:
    return 2 * latents


@dataclass
class CountingVae:
    """The stand-in VAE, and how many images it was given."""

    num_images: int = 0
    shapes: set[tuple[int, ...]] = field(default_factory=set)

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        self.num_images += len(images)
        self.shapes.add(tuple(images.shape))
        return encode(images)


def plan(
    data: DataConfig,
    prior: PriorConfig = NO_PRIOR,
    *,
    effective_batch: int = 4,
    seed: int = 0,
    needs: Any = None,
    control: ControlConfig | None = None,
) -> SamplePlan:
    base = needs or base_like()
    scaling = Scaling.of(data, base)
    without = []
    if control is not None and control.conditioning_data_dir is not None:
        without = [control.conditioning_data_dir]
    return SamplePlan(
        data,
        prior,
        read_training_data(data, control=control, scaling=scaling, without=without),
        read_class_images(prior, scaling=scaling),
        base=base,
        effective_batch=effective_batch,
        seed=seed,
        control=control,
    )


def source(
    data: DataConfig,
    prior: PriorConfig = NO_PRIOR,
    *,
    vae: Callable[[Tensor], tuple[Tensor, Tensor]] = encode,
    num_samples: int = NUM_SAMPLES,
    **options: Any,
) -> BatchSource:
    """Return the batches of a plan with these options."""
    return BatchSource(plan(data, prior, **options), Codec(vae, double), num_samples=num_samples)


def uncached(data: DataConfig, **changes: object) -> DataConfig:
    return data.replace(cache_latents=False, **changes)


def assert_equal(batch: Batch, expected: Batch) -> None:
    """Bit for bit, as nothing in a batch may depend on how it came about."""
    for name in (each.name for each in fields(Batch)):
        found, wanted = getattr(batch, name), getattr(expected, name)
        if isinstance(wanted, Tensor):
            torch.testing.assert_close(found, wanted, rtol=0, atol=0, msg=name)
        else:
            assert found == wanted, name


def rows(batch: Batch, index: int) -> Batch:
    """The batch of one row."""
    values = {each.name: getattr(batch, each.name) for each in fields(Batch)}
    return replace(
        batch, **{name: value[index : index + 1] for name, value in values.items() if value is not None}
    )
