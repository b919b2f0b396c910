"""Base models: the border to diffusers and transformers, where every frozen part is loaded and used."""

from ether_diffusion.bases.base import (
    Base,
    Denoiser,
    Noise,
    PromptEmbeddings,
    TextEncoders,
    recompute_activations,
    stack_embeddings,
)
from ether_diffusion.bases.denoising import Beginning, Denoising, denoise, predict_together
from ether_diffusion.bases.images import Fault, decode_latents, decoded_again, fault_of, to_pictures
from ether_diffusion.bases.opening import load_base, open_base

__all__ = [
    "Base",
    "Beginning",
    "Denoiser",
    "Denoising",
    "Fault",
    "Noise",
    "PromptEmbeddings",
    "TextEncoders",
    "decode_latents",
    "decoded_again",
    "denoise",
    "fault_of",
    "load_base",
    "open_base",
    "predict_together",
    "recompute_activations",
    "stack_embeddings",
    "to_pictures",
]
