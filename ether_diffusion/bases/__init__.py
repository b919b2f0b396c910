"""Base models: the border to diffusers and transformers, where every frozen part is loaded and used."""

from ether_diffusion.bases.images import (
    Fault,
    decode_latents,
    decoded_again,
    encode_images,
    fault_of,
    scale_latents,
    to_pictures,
)
from ether_diffusion.bases.loading import load_base
from ether_diffusion.bases.opened import Base, open_base
from ether_diffusion.bases.prompts import PromptEmbeddings, TextEncoders, stack_embeddings

__all__ = [
    "Base",
    "Fault",
    "PromptEmbeddings",
    "TextEncoders",
    "decode_latents",
    "decoded_again",
    "encode_images",
    "fault_of",
    "load_base",
    "open_base",
    "scale_latents",
    "stack_embeddings",
    "to_pictures",
]
