"""The networks that likeness is measured with: DINO, DINOv2, CLIP, and Tiny World's own."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ether_diffusion.tiny_world import ALIAS
from ether_diffusion.tiny_world.clip import TinyClip
from ether_diffusion.tiny_world.pictures import to_tensor
from ether_diffusion.tiny_world.recognition import object_crops
from ether_diffusion.tiny_world.world import NATIVE_SIZE
from ether_diffusion.wording import listed

logger = logging.getLogger(__name__)

EncoderKind = Literal["dino", "dinov2", "clip", "tiny"]

BATCH_SIZE = 16


class Encoder(Protocol):
    """A network from pictures, and perhaps texts, to unit vectors of `size` numbers, float64 on the CPU.

    `kind` names the columns of its scores, `source` says where it came from.
    """

    @property
    def kind(self) -> EncoderKind: ...
    @property
    def source(self) -> str: ...
    @property
    def size(self) -> int: ...
    @property
    def reads_texts(self) -> bool: ...

    def embed_images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Return unit vectors (num_pictures, size)."""

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Return unit vectors (num_texts, size)."""


@dataclass(frozen=True)
class VisionEncoder:
    """DINO or DINOv2: a picture is the last hidden state of its class token."""

    kind: EncoderKind
    source: str
    processor: Any
    model: Any
    batch_size: int = BATCH_SIZE

    @property
    def reads_texts(self) -> bool:
        """It does not."""
        return False

    @property
    def size(self) -> int:
        """How many numbers a picture becomes."""
        return int(self.model.config.hidden_size)

    @torch.no_grad()
    def embed_images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Return unit vectors (num_pictures, size)."""
        return _in_batches(pictures, self.batch_size, self.size, self._embed)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Refuse: it reads no texts."""
        raise ValueError(f"{self.source} reads no texts; prompt fidelity needs CLIP")

    def _embed(self, pictures: Sequence[Image.Image]) -> Tensor:
        pixels = _prepare(self.processor, pictures, self.model.device)
        states: Tensor = self.model(pixel_values=pixels).last_hidden_state
        return states[:, 0]


@dataclass(frozen=True)
class ClipEncoder:
    """CLIP: pictures and texts, projected into one space."""

    source: str
    processor: Any
    tokenizer: Any
    model: Any
    batch_size: int = BATCH_SIZE
    kind: EncoderKind = "clip"

    @property
    def reads_texts(self) -> bool:
        """It does."""
        return True

    @property
    def size(self) -> int:
        """How many numbers a picture or a text becomes."""
        return int(self.model.config.projection_dim)

    @torch.no_grad()
    def embed_images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Return unit vectors (num_pictures, size)."""
        return _in_batches(pictures, self.batch_size, self.size, self._embed_images)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Return unit vectors (num_texts, size). What is too long is cut, with a warning."""
        _warn_of_cuts(self.tokenizer, texts)
        return _in_batches(texts, self.batch_size, self.size, self._embed_texts)

    def _embed_images(self, pictures: Sequence[Image.Image]) -> Tensor:
        pixels = _prepare(self.processor, pictures, self.model.device)
        pooled = self.model.vision_model(pixel_values=pixels).pooler_output
        projected: Tensor = self.model.visual_projection(pooled)
        return projected

    def _embed_texts(self, texts: Sequence[str]) -> Tensor:
        tokens = self.tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt")
        ids = tokens.input_ids.to(self.model.device)
        pooled = self.model.text_model(
            input_ids=ids, attention_mask=tokens.attention_mask.to(ids.device)
        ).pooler_output
        projected: Tensor = self.model.text_projection(pooled)
        return projected


@dataclass(frozen=True)
class TinyEncoder:
    """Tiny World's CLIP, for the embedded base: pictures are scaled to its 64 px."""

    clip: TinyClip
    source: str = ALIAS
    batch_size: int = BATCH_SIZE
    kind: EncoderKind = "tiny"

    @property
    def reads_texts(self) -> bool:
        """It does."""
        return True

    @property
    def size(self) -> int:
        """How many numbers a picture or a text becomes."""
        return int(self.clip.text_projection.shape[0])

    def embed_images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Return unit vectors (num_pictures, size)."""
        return _in_batches(
            pictures,
            self.batch_size,
            self.size,
            lambda part: self.clip.embed_images(_pixels(part)),
        )

    def embed_middles(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Return unit vectors (num_pictures, size) of what is in the middle of each."""
        return _in_batches(
            pictures,
            self.batch_size,
            self.size,
            lambda part: self.clip.embed_images(object_crops(_pixels(part))),
        )

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Return unit vectors (num_texts, size). What is too long is cut, with a warning."""
        _warn_of_cuts(self.clip.tokenizer, texts)
        return _in_batches(texts, self.batch_size, self.size, self.clip.embed_texts)


@dataclass(frozen=True)
class Views:
    """Pictures as unit vectors (num_pictures, size): `whole`, and what their likeness to photos is taken of.

    `subjects` are the whole pictures, too, as in the published tables, but their middles for Tiny World's
    encoder: of whole pictures it sees the background first, and the true pictures of a sailboat on new
    backgrounds are then less like its photos (0.159) than what the base draws, which knows no sailboat
    (0.172); of middles they are more so (0.471 against 0.323).
    """

    whole: Tensor
    subjects: Tensor

    @classmethod
    def of(cls, encoder: Encoder, pictures: Sequence[Image.Image]) -> "Views":
        """Embed pictures."""
        whole = encoder.embed_images(pictures)
        return cls(whole, encoder.embed_middles(pictures) if isinstance(encoder, TinyEncoder) else whole)


def _in_batches(items: Sequence[Any], batch_size: int, size: int, embed: Any) -> Tensor:
    pieces = [embed(items[start : start + batch_size]) for start in range(0, len(items), batch_size)]
    joined = (
        torch.cat([piece.cpu().double() for piece in pieces]) if pieces else torch.empty(0, size).double()
    )
    return F.normalize(joined, dim=-1)


def _prepare(processor: Any, pictures: Sequence[Image.Image], device: torch.device) -> Tensor:
    pixels: Tensor = processor(
        images=[each.convert("RGB") for each in pictures], return_tensors="pt"
    ).pixel_values
    return pixels.to(device, torch.float32)


def _pixels(pictures: Sequence[Image.Image]) -> Tensor:
    return to_tensor([_at_native_size(each) for each in pictures])


def _at_native_size(picture: Image.Image) -> Image.Image:
    if picture.size == (NATIVE_SIZE, NATIVE_SIZE):
        return picture
    return picture.convert("RGB").resize((NATIVE_SIZE, NATIVE_SIZE), Image.Resampling.LANCZOS)


def _warn_of_cuts(tokenizer: Any, texts: Sequence[str]) -> None:
    limit = tokenizer.model_max_length
    too_long = [text for text in dict.fromkeys(texts) if len(tokenizer(text).input_ids) > limit]
    if too_long:
        logger.warning("only the first %d tokens are compared of: %s", limit, listed(too_long))
