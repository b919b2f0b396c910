"""Encoders found by a short name, in a folder or on the Hub; what is none is refused."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoImageProcessor,
    CLIPModel,
    CLIPTokenizer,
    Dinov2Model,
    PreTrainedConfig,
    ViTModel,
)

from ether_diffusion.metrics.encoders import (
    BATCH_SIZE,
    ClipEncoder,
    Encoder,
    EncoderKind,
    TinyEncoder,
    VisionEncoder,
)
from ether_diffusion.tiny_world import ALIAS, WEIGHTS_FOLDER
from ether_diffusion.tiny_world.clip import load_tiny_clip
from ether_diffusion.wording import listed, printable

DEFAULT_SOURCES = {
    "dino": "facebook/dino-vits16",
    "dinov2": "facebook/dinov2-base",
    "clip": "openai/clip-vit-large-patch14",
    ALIAS: ALIAS,
}
"""What short names stand for: DINO and CLIP as in the code behind the published tables, DINOv2 as in PEFT's
benchmark of image generation."""

_KINDS: dict[str, EncoderKind] = {"vit": "dino", "dinov2": "dinov2", "clip": "clip"}


def load_encoder(
    name: str, *, device: torch.device | None = None, batch_size: int = BATCH_SIZE, offline: bool = False
) -> Encoder:
    """Load an encoder by a short name ("dino", "dinov2", "clip", "tiny_world"), a folder or a hub id.

    `offline` takes hub ids from the cache alone.

    Raises:
        FileNotFoundError: it is not here, and the Hub does not give it.
        ValueError: it is of another kind, or does not have all its weights.
    """
    source = DEFAULT_SOURCES.get(name, name)
    if source == ALIAS or Path(source) == WEIGHTS_FOLDER:
        return TinyEncoder(load_tiny_clip(WEIGHTS_FOLDER), batch_size=batch_size)
    kind = _find_kind(source, offline)
    try:
        model = _load_model(kind, source, offline).to(device or "cpu")
        processor = AutoImageProcessor.from_pretrained(source, backend="pil", local_files_only=offline)
        if kind != "clip":
            return VisionEncoder(kind, source, processor, model, batch_size)
        tokenizer = CLIPTokenizer.from_pretrained(source, local_files_only=offline)
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = printable(str(error).strip().split("\n")[0])
        raise ValueError(
            f"the encoder {printable(source)} is incomplete or damaged; fetch it again ({reason})"
        ) from error
    return ClipEncoder(source, processor, tokenizer, model, batch_size)


def check_encoder(name: str, *, offline: bool = False) -> EncoderKind:
    """Return what kind of encoder a name stands for, without loading it.

    Raises:
        FileNotFoundError: it is not here, and the Hub does not give it.
        ValueError: it is no encoder that can be used.
    """
    source = DEFAULT_SOURCES.get(name, name)
    is_tiny = source == ALIAS or Path(source) == WEIGHTS_FOLDER
    return "tiny" if is_tiny else _find_kind(source, offline)


def _find_kind(source: str, offline: bool) -> EncoderKind:
    shown = printable(source)
    is_path = Path(source).is_absolute() or source.startswith(".") or source.count("/") > 1
    if is_path and not Path(source).is_dir():
        raise FileNotFoundError(f"there is no encoder in {shown}; give its folder or a hub id")
    try:
        config, _ = PreTrainedConfig.get_config_dict(source, local_files_only=offline)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"found no encoder {shown}: no folder here with its config.json, and the Hub does not give it; "
            f"name a folder, a hub id, or one of {', '.join(DEFAULT_SOURCES)}"
        ) from error
    found = config.get("model_type")
    if found not in _KINDS:
        raise ValueError(
            f"{shown} is no encoder that can be used (model_type {printable(found)}); "
            "give a DINO ViT (vit), DINOv2 (dinov2) or CLIP (clip)"
        )
    return _KINDS[found]


def _load_model(kind: EncoderKind, source: str, offline: bool) -> Any:
    """Load a frozen model in float32.

    Raises:
        ValueError: it lacks weights, which transformers would draw at random.
    """
    options: dict[str, Any] = {"dino": {"add_pooling_layer": False}}.get(kind, {})
    model, found = {"dino": ViTModel, "dinov2": Dinov2Model, "clip": CLIPModel}[kind].from_pretrained(
        source, dtype=torch.float32, local_files_only=offline, output_loading_info=True, **options
    )
    if found["missing_keys"]:
        raise ValueError(
            f"the encoder {printable(source)} has no weights for {listed(sorted(found['missing_keys']), 2)}; "
            "fetch it again"
        )
    return model.requires_grad_(False).eval()
