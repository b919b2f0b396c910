"""Base models: the border to diffusers and transformers, where every frozen part is loaded and used."""

from ether_diffusion.base.images import decode_latents, encode_images, scale_latents
from ether_diffusion.base.loading import load_base
from ether_diffusion.base.opened import Base, open_base
from ether_diffusion.base.prompts import PromptEmbeddings, TextEncoders, stack_embeddings

__all__ = [
    "Base",
    "PromptEmbeddings",
    "TextEncoders",
    "decode_latents",
    "encode_images",
    "load_base",
    "open_base",
    "scale_latents",
    "stack_embeddings",
]
