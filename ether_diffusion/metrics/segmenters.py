"""The networks that say what is where in a picture: Tiny World's, and those of transformers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

from ether_diffusion.control.palette import Palette
from ether_diffusion.metrics.encoders import BATCH_SIZE, is_tiny_world, load_whole, read_model_type
from ether_diffusion.metrics.overlap import scaled_map
from ether_diffusion.tiny_world import ALIAS, WEIGHTS_FOLDER
from ether_diffusion.tiny_world.networks import Segmenter, load_segmenter
from ether_diffusion.tiny_world.pictures import at_native_size
from ether_diffusion.tiny_world.world import CLASSES, OBJECT_CLASSES, PALETTE
from ether_diffusion.wording import printable


class ClassFinder(Protocol):
    """A network that names the class of each pixel; `source` says where it came from.

    `things` are the classes of what stands before a background; empty where that is not known.
    """

    @property
    def source(self) -> str: ...
    @property
    def classes(self) -> Sequence[str]: ...
    @property
    def things(self) -> frozenset[str]: ...

    def find_classes(self, pictures: Sequence[Image.Image]) -> list[Tensor]:
        """Return the index in `classes` of each pixel (height, width) of each picture, at its own size."""


@dataclass(frozen=True)
class TinyFinder:
    """Tiny World's segmenter: pictures are scaled to its 64 px and the classes back."""

    segmenter: Segmenter
    batch_size: int
    source: str = ALIAS
    classes: Sequence[str] = CLASSES
    things: frozenset[str] = frozenset(OBJECT_CLASSES)

    def find_classes(self, pictures: Sequence[Image.Image]) -> list[Tensor]:
        """Return the index in `classes` of each pixel (height, width) of each picture, at its own size."""
        if not pictures:
            return []
        maps = self.segmenter.segment(at_native_size(pictures), batch_size=self.batch_size)
        return [scaled_map(found, *each.size) for found, each in zip(maps, pictures, strict=True)]


def tiny_palette() -> Palette:
    """Return the colours of Tiny World's classes."""
    return Palette("the palette of Tiny World", tuple(PALETTE), tuple(PALETTE.values()))


@dataclass(frozen=True)
class TransformersFinder:
    """A semantic segmentation model of transformers, as UperNet or SegFormer, with its own preprocessing."""

    source: str
    processor: Any
    model: Any
    batch_size: int
    things: frozenset[str] = frozenset()

    @property
    def classes(self) -> Sequence[str]:
        """The model's labels in the order of their numbers."""
        labels = self.model.config.id2label
        return [str(labels[number]) for number in range(len(labels))]

    @torch.no_grad()
    def find_classes(self, pictures: Sequence[Image.Image]) -> list[Tensor]:
        """Return the index in `classes` of each pixel (height, width) of each picture, at its own size."""
        found: list[Tensor] = []
        for start in range(0, len(pictures), self.batch_size):
            part = [each.convert("RGB") for each in pictures[start : start + self.batch_size]]
            pixels = self.processor(images=part, return_tensors="pt").pixel_values
            logits = self.model(pixel_values=pixels.to(self.model.device, torch.float32)).logits.cpu()
            for row, picture in zip(logits, part, strict=True):
                size = (picture.height, picture.width)
                larger = F.interpolate(row[None], size=size, mode="bilinear", align_corners=False)
                found.append(larger[0].argmax(0))
        return found


def load_finder(
    name: str, *, device: torch.device | None = None, batch_size: int = BATCH_SIZE, offline: bool = False
) -> ClassFinder:
    """Load a segmenter by name: "tiny_world", or the folder or hub id of one of transformers.

    `offline` takes hub ids from the cache alone.

    Raises:
        FileNotFoundError: it is not here, and the Hub does not give it.
        ValueError: it is no model of semantic segmentation, or lacks weights.
    """
    if is_tiny_world(name):
        return TinyFinder(load_segmenter(WEIGHTS_FOLDER), batch_size)
    read_model_type(name, "segmenter", [ALIAS], offline=offline)
    try:
        model = load_whole(
            AutoModelForSemanticSegmentation, name, "segmenter", device=device, offline=offline
        )
        processor = AutoImageProcessor.from_pretrained(name, backend="pil", local_files_only=offline)
    except (OSError, ValueError, SafetensorError, RuntimeError) as error:
        reason = printable(str(error).strip().split("\n")[0], 300)
        raise ValueError(
            f"{printable(name)} is no whole model of semantic segmentation, as UperNet or SegFormer are "
            f"({reason})"
        ) from error
    return TransformersFinder(name, processor, model, batch_size)
