"""The networks that likeness is measured with: DINO, DINOv2, CLIP, and Tiny World's own."""

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoImageProcessor, CLIPModel, CLIPTokenizer, Dinov2Model, PreTrainedConfig, ViTModel

from ether_diffusion.tiny_world import ALIAS, WEIGHTS_FOLDER
from ether_diffusion.tiny_world.networks import load_tiny_clip
from ether_diffusion.tiny_world.pictures import at_native_size
from ether_diffusion.tiny_world.recognition import object_crops
from ether_diffusion.wording import listed, printable

logger = logging.getLogger(__name__)

EncoderKind = Literal["dino", "dinov2", "clip", "tiny"]

BATCH_SIZE = 16
DEFAULT_SOURCES = {
    "dino": "facebook/dino-vits16",
    "dinov2": "facebook/dinov2-base",
    "clip": "openai/clip-vit-large-patch14",
    ALIAS: ALIAS,
}
"""What short names stand for: DINO and CLIP as in the code behind the published tables, DINOv2 as in PEFT's
benchmark of image generation."""

_KINDS: dict[Any, EncoderKind] = {"vit": "dino", "dinov2": "dinov2", "clip": "clip"}
_MODELS: dict[EncoderKind, Any] = {"dino": ViTModel, "dinov2": Dinov2Model, "clip": CLIPModel}


@dataclass(frozen=True)
class Encoder:
    """A network from pictures, and with a tokenizer texts, to unit vectors of `size` numbers.

    `kind` names the columns of its scores, `source` says where it came from. DINO's and DINOv2's picture is
    the last hidden state of its class token; CLIP projects pictures and texts into one space.
    """

    kind: EncoderKind
    source: str
    model: Any
    processor: Any
    tokenizer: Any = None
    batch_size: int = BATCH_SIZE

    @property
    def reads_texts(self) -> bool:
        """Whether prompts can be compared with."""
        return self.tokenizer is not None

    @property
    def size(self) -> int:
        """How many numbers a picture or a text becomes."""
        config = self.model.config
        return int(config.projection_dim if self.kind == "clip" else config.hidden_size)

    def embed_images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Return unit vectors (num_pictures, size), float64 on the CPU."""
        return self._in_batches(pictures, self._see)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Return unit vectors (num_texts, size), float64 on the CPU; what is too long is cut, and said."""
        limit = self.tokenizer.model_max_length
        too_long = [text for text in dict.fromkeys(texts) if len(self.tokenizer(text).input_ids) > limit]
        if too_long:
            logger.warning("only the first %d tokens are compared of: %s", limit, listed(too_long))
        return self._in_batches(texts, self._read)

    @torch.no_grad()
    def _in_batches(self, items: Sequence[Any], embed: Callable[[Sequence[Any]], Tensor]) -> Tensor:
        starts = range(0, len(items), self.batch_size)
        pieces = [embed(items[start : start + self.batch_size]).cpu().double() for start in starts]
        return F.normalize(torch.cat(pieces) if pieces else torch.empty(0, self.size).double(), dim=-1)

    def _see(self, pictures: Sequence[Image.Image]) -> Tensor:
        found = self.processor(images=[each.convert("RGB") for each in pictures], return_tensors="pt")
        pixels = found.pixel_values.to(self.model.device, torch.float32)
        if self.kind != "clip":
            return cast(Tensor, self.model(pixel_values=pixels).last_hidden_state[:, 0])
        pooled = self.model.vision_model(pixel_values=pixels).pooler_output
        return cast(Tensor, self.model.visual_projection(pooled))

    def _read(self, texts: Sequence[str]) -> Tensor:
        tokens = self.tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt")
        pooled = self.model.text_model(**tokens.to(self.model.device)).pooler_output
        return cast(Tensor, self.model.text_projection(pooled))


class TinyEncoder(Encoder):
    """Tiny World's CLIP, for the embedded base: pictures are scaled to its 64 px."""

    @property
    def size(self) -> int:
        """How many numbers a picture or a text becomes."""
        return int(self.model.text_projection.shape[0])

    def embed_middles(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Return unit vectors (num_pictures, size) of what is in the middle of each."""
        return self._in_batches(
            pictures, lambda part: self.model.embed_images(object_crops(at_native_size(part)))
        )

    def _see(self, pictures: Sequence[Image.Image]) -> Tensor:
        return cast(Tensor, self.model.embed_images(at_native_size(pictures)))

    def _read(self, texts: Sequence[str]) -> Tensor:
        return cast(Tensor, self.model.embed_texts(texts))


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


def load_encoder(
    name: str, *, device: torch.device | None = None, batch_size: int = BATCH_SIZE, offline: bool = False
) -> Encoder:
    """Load an encoder by a short name ("dino", "dinov2", "clip", "tiny_world"), a folder or a hub id.

    `offline` takes hub ids from the cache alone.

    Raises:
        FileNotFoundError: it is not here, and the Hub does not give it.
        ValueError: it is of another kind, or does not have all its weights.
    """
    kind, source = check_encoder(name, offline=offline), DEFAULT_SOURCES.get(name, name)
    if kind == "tiny":
        clip = load_tiny_clip(WEIGHTS_FOLDER)
        return TinyEncoder(kind, ALIAS, clip, None, clip.tokenizer, batch_size)
    pooling = {"add_pooling_layer": False} if kind == "dino" else {}
    try:
        model = load_whole(_MODELS[kind], source, "encoder", device=device, offline=offline, **pooling)
        processor = AutoImageProcessor.from_pretrained(source, backend="pil", local_files_only=offline)
        reader = CLIPTokenizer.from_pretrained(source, local_files_only=offline) if kind == "clip" else None
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = printable(str(error).strip().split("\n")[0])
        raise ValueError(
            f"the encoder {printable(source)} is incomplete or damaged; fetch it again ({reason})"
        ) from error
    return Encoder(kind, source, model, processor, reader, batch_size)


def check_encoder(name: str, *, offline: bool = False) -> EncoderKind:
    """Return what kind of encoder a name stands for, without loading it.

    Raises:
        FileNotFoundError: it is not here, and the Hub does not give it.
        ValueError: it is no encoder that can be used.
    """
    source = DEFAULT_SOURCES.get(name, name)
    if is_tiny_world(source):
        return "tiny"
    found = read_model_type(source, "encoder", DEFAULT_SOURCES, offline=offline)
    if found not in _KINDS:
        raise ValueError(
            f"{printable(source)} is no encoder that can be used (model_type {printable(found)}); "
            "give a DINO ViT (vit), DINOv2 (dinov2) or CLIP (clip)"
        )
    return _KINDS[found]


def is_tiny_world(source: str) -> bool:
    """Say whether a name or a folder is that of the embedded base."""
    return source == ALIAS or Path(source) == WEIGHTS_FOLDER


def read_model_type(source: str, what: str, names: Collection[str], *, offline: bool) -> Any:
    """Return what the config.json of a folder or hub id says that it is.

    Raises:
        FileNotFoundError: there is none.
    """
    shown = printable(source)
    is_path = Path(source).is_absolute() or source.startswith(".") or source.count("/") > 1
    if is_path and not Path(source).is_dir():
        raise FileNotFoundError(f"there is no {what} in {shown}; give its folder or a hub id")
    try:
        config, _ = PreTrainedConfig.get_config_dict(source, local_files_only=offline)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"found no {what} {shown}: no folder here with its config.json, and the Hub does not give it; "
            f"name a folder, a hub id, or one of {', '.join(names)}"
        ) from error
    return config.get("model_type")


def load_whole(
    kind: Any, source: str, what: str, *, device: torch.device | None, offline: bool, **options: Any
) -> Any:
    """Load a frozen model of transformers in float32.

    Raises:
        ValueError: it lacks weights, which transformers would draw at random.
    """
    model, found = kind.from_pretrained(
        source, dtype=torch.float32, local_files_only=offline, output_loading_info=True, **options
    )
    if found["missing_keys"]:
        raise ValueError(
            f"the {what} {printable(source)} has no weights for {listed(sorted(found['missing_keys']), 2)}; "
            "fetch it again"
        )
    return model.to(device or "cpu").requires_grad_(False).eval()
