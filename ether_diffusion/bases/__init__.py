"""Base models: the border to diffusers and transformers, where every frozen part is loaded and used."""

from ether_diffusion.bases.files import load_base
from ether_diffusion.bases.images import (
    Fault,
    decode_latents,
    decoded_again,
    encode_images,
    fault_of,
    scale_latents,
    to_pictures,
)
from ether_diffusion.bases.stable_diffusion import (
    Base,
    NoiseScheduler,
    PromptEmbeddings,
    TextEncoders,
    UNet,
    open_base,
    recompute_activations,
    set_attention,
    stack_embeddings,
    take_rows,
    unet_inputs,
)

__all__ = [
    "Base",
    "Fault",
    "NoiseScheduler",
    "PromptEmbeddings",
    "TextEncoders",
    "UNet",
    "decode_latents",
    "decoded_again",
    "encode_images",
    "fault_of",
    "load_base",
    "open_base",
    "recompute_activations",
    "scale_latents",
    "set_attention",
    "stack_embeddings",
    "take_rows",
    "to_pictures",
    "unet_inputs",
]
