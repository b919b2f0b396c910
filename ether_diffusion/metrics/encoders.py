"""The networks that likeness is measured with: DINO, DINOv2, CLIP, and Tiny World's own."""

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoImageProcessor, CLIPModel, CLIPTokenizer, Dinov2Model, PreTrainedConfig, ViTModel

from ether_diffusion.tiny_world import ALIAS, WEIGHTS_FOLDER
from ether_diffusion.tiny_world.networks import load_tiny_clip
from ether_diffusion.tiny_world.pictures import at_native_size, object_crops
from ether_diffusion.wording import listed, printable

logger = logging.getLogger(__name__)

EncoderKind = Literal["dino", "dinov2", "clip", "tiny"]
BATCH_SIZE = 16
# DINO and CLIP as in the code behind the published tables, DINOv2 as in PEFT's benchmark of image generation
DEFAULT_SOURCES = {
    "dino": "facebook/dino-vits16",
    "dinov2": "facebook/dinov2-base",
    "clip": "openai/clip-vit-large-patch14",
    ALIAS: ALIAS,
}
_KINDS: dict[Any, EncoderKind] = {"vit": "dino", "dinov2": "dinov2", "clip": "clip"}
_MODELS: dict[EncoderKind, Any] = {"dino": ViTModel, "dinov2": Dinov2Model, "clip": CLIPModel}


class Views(NamedTuple):
    """Pictures as unit vectors (num_pictures, size): `whole`, and what their likeness to photos is taken of.

    `subjects` are the whole pictures, too, as in the published tables, but their middles for Tiny World's
    encoder: of whole pictures it sees the background first, and true pictures of a sailboat are then less
    like its photos (0.159) than the base's, which knows no sailboat (0.172); of middles, 0.471 against 0.323.
    """

    whole: Tensor
    subjects: Tensor


@dataclass(frozen=True)
class Encoder:
    """A network from pictures, and with a tokenizer texts, to unit vectors of `size` numbers.

    `kind` names the columns of its scores. DINO's and DINOv2's picture is the last hidden state of its class
    token; CLIP projects pictures and texts into one space.
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

    def embed_images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Return unit vectors (num_pictures, size), float64 on the CPU."""
        return self._in_batches(pictures, self._see)

    def view(self, pictures: Sequence[Image.Image]) -> Views:
        """Embed pictures, and what their likeness to photos is taken of."""
        whole = self.embed_images(pictures)
        return Views(whole, whole)

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
        return F.normalize(torch.cat(pieces), dim=-1)

    def _see(self, pictures: Sequence[Image.Image]) -> Tensor:
        found = self.processor(images=[each.convert("RGB") for each in pictures], return_tensors="pt")
        pixels = found.pixel_values.to(self.model.device, torch.float32)
        if self.kind != "clip":
            return cast(Tensor, self.model(pixel_values=pixels).last_hidden_state[:, 0])
        return cast(Tensor, self.model.visual_projection(self.model.vision_model(pixels).pooler_output))

    def _read(self, texts: Sequence[str]) -> Tensor:
        tokens = self.tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt")
        pooled = self.model.text_model(**tokens.to(self.model.device)).pooler_output
        return cast(Tensor, self.model.text_projection(pooled))


class TinyEncoder(Encoder):
    """Tiny World's CLIP, for the embedded base: pictures are scaled to its 64 px."""

    def view(self, pictures: Sequence[Image.Image]) -> Views:
        """Embed pictures and their middles."""
        embed = self.model.embed_images
        middles = self._in_batches(pictures, lambda part: embed(object_crops(at_native_size(part))))
        return Views(self.embed_images(pictures), middles)

    def _see(self, pictures: Sequence[Image.Image]) -> Tensor:
        return cast(Tensor, self.model.embed_images(at_native_size(pictures)))

    def _read(self, texts: Sequence[str]) -> Tensor:
        return cast(Tensor, self.model.embed_texts(texts))


def load_encoder(
    name: str, *, device: torch.device | None = None, batch_size: int = BATCH_SIZE, offline: bool = False
) -> Encoder:
    """Load an encoder by a short name ("dino", "dinov2", "clip", "tiny_world"), a folder or a hub id.

    `offline` takes hub ids from the cache alone. What is not here is a FileNotFoundError; what is of another
    kind or not whole, a ValueError.
    """
    kind, source = check_encoder(name, offline=offline), DEFAULT_SOURCES.get(name, name)
    if kind == "tiny":
        clip = load_tiny_clip(WEIGHTS_FOLDER)
        return TinyEncoder(kind, ALIAS, clip, None, clip.tokenizer, batch_size)
    pooling = {"add_pooling_layer": False} if kind == "dino" else {}
    network, processor = load_whole(
        _MODELS[kind], source, "encoder", device=device, offline=offline, **pooling
    )
    reader = CLIPTokenizer.from_pretrained(source, local_files_only=offline) if kind == "clip" else None
    return Encoder(kind, source, network, processor, reader, batch_size)


def check_encoder(name: str, *, offline: bool = False) -> EncoderKind:
    """Return what kind of encoder a name stands for, without loading it; errors as in `load_encoder`."""
    source = DEFAULT_SOURCES.get(name, name)
    found = read_model_type(source, "encoder", DEFAULT_SOURCES, offline=offline)
    if found not in ("tiny", *_KINDS):
        known = "give a DINO ViT (vit), DINOv2 (dinov2) or CLIP (clip)"
        raise ValueError(f"{printable(source)} is no encoder (model_type {printable(found)}); {known}")
    return _KINDS.get(found, "tiny")


def read_model_type(source: str, what: str, names: Collection[str], *, offline: bool = False) -> Any:
    """Return what the config.json of a folder or hub id says that it is, "tiny" of the embedded base's."""
    if source in (ALIAS, str(WEIGHTS_FOLDER)):
        return "tiny"
    is_path = Path(source).is_absolute() or source.startswith(".") or source.count("/") > 1
    try:  # the Hub is not asked for a path
        config, _ = PreTrainedConfig.get_config_dict(source, local_files_only=offline or is_path)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"found no {what} {printable(source)}: no folder here with its config.json, and the Hub does not "
            f"give it; name a folder, a hub id, or one of {', '.join(names)}"
        ) from error
    return config.get("model_type")


def load_whole(
    kind: Any, source: str, what: str, *, device: torch.device | None, offline: bool = False, **options: Any
) -> tuple[Any, Any]:
    """Load a frozen model of transformers in float32 and its processor of pictures; ValueError if damaged."""
    try:
        model, found = kind.from_pretrained(
            source, dtype=torch.float32, local_files_only=offline, output_loading_info=True, **options
        )
        processor = AutoImageProcessor.from_pretrained(source, backend="pil", local_files_only=offline)
        if found["missing_keys"]:  # transformers would draw them at random
            raise ValueError(f"it has no weights for {listed(sorted(found['missing_keys']), 2)}")
    except (OSError, ValueError, SafetensorError, RuntimeError) as error:
        reason = printable(str(error).strip().split("\n")[0], 300)
        raise ValueError(f"the {what} {printable(source)} is not whole; fetch it again ({reason})") from error
    return model.to(device or "cpu").requires_grad_(False).eval(), processor
