"""The networks that say what is where in a picture: Tiny World's, and those of transformers."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation, PreTrainedConfig

from ether_diffusion.metrics.overlap import scaled_map
from ether_diffusion.tiny_world import ALIAS, WEIGHTS_FOLDER
from ether_diffusion.tiny_world.control import CLASSES, OBJECT_CLASSES
from ether_diffusion.tiny_world.pictures import to_tensor
from ether_diffusion.tiny_world.segmenter import Segmenter, load_segmenter
from ether_diffusion.tiny_world.world import NATIVE_SIZE
from ether_diffusion.wording import listed, printable

BATCH_SIZE = 16


class ClassFinder(Protocol):
    """A network that names the class of each pixel; `source` says where it came from."""

    @property
    def source(self) -> str: ...
    @property
    def classes(self) -> Sequence[str]: ...
    @property
    def things(self) -> frozenset[str]:
        """The classes of what stands before a background; empty where that is not known."""

    def find_classes(self, pictures: Sequence[Image.Image]) -> list[Tensor]:
        """Return the index in `classes` of each pixel (height, width) of each picture, at its own size."""


@dataclass(frozen=True)
class TinyFinder:
    """Tiny World's segmenter: pictures are scaled to its 64 px and the classes back."""

    segmenter: Segmenter
    source: str = ALIAS
    batch_size: int = BATCH_SIZE

    @property
    def classes(self) -> Sequence[str]:
        """Tiny World's classes."""
        return CLASSES

    @property
    def things(self) -> frozenset[str]:
        """The kinds of its concepts."""
        return frozenset(OBJECT_CLASSES)

    def find_classes(self, pictures: Sequence[Image.Image]) -> list[Tensor]:
        """Return the index in `classes` of each pixel (height, width) of each picture, at its own size."""
        if not pictures:
            return []
        native = (NATIVE_SIZE, NATIVE_SIZE)
        scaled = [
            each if each.size == native else each.convert("RGB").resize(native, Image.Resampling.LANCZOS)
            for each in pictures
        ]
        maps = self.segmenter.segment(to_tensor(scaled), batch_size=self.batch_size)
        return [scaled_map(found, *each.size) for found, each in zip(maps, pictures, strict=True)]


@dataclass(frozen=True)
class TransformersFinder:
    """A semantic segmentation model of transformers, as UperNet or SegFormer, with its own preprocessing."""

    source: str
    processor: Any
    model: Any
    batch_size: int = BATCH_SIZE
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
    if name == ALIAS or Path(name) == WEIGHTS_FOLDER:
        return TinyFinder(load_segmenter(WEIGHTS_FOLDER), batch_size=batch_size)
    shown = printable(name)
    try:
        PreTrainedConfig.get_config_dict(name, local_files_only=offline)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"found no segmenter {shown}: no folder here with its config.json, and the Hub does not give it; "
            f"name a folder, a hub id, or {ALIAS}"
        ) from error
    try:
        model, found = AutoModelForSemanticSegmentation.from_pretrained(
            name, dtype=torch.float32, local_files_only=offline, output_loading_info=True
        )
        processor = AutoImageProcessor.from_pretrained(name, backend="pil", local_files_only=offline)
    except (OSError, ValueError, SafetensorError, RuntimeError) as error:
        reason = printable(str(error).strip().split("\n")[0])
        raise ValueError(
            f"{shown} is no whole model of semantic segmentation, as UperNet or SegFormer are ({reason})"
        ) from error
    if found["missing_keys"]:
        raise ValueError(
            f"the segmenter {shown} has no weights for {listed(sorted(found['missing_keys']), 2)}; "
            "fetch it again"
        )
    model = model.to(device or "cpu").requires_grad_(False).eval()
    return TransformersFinder(name, processor, model, batch_size)
