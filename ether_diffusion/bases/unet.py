"""How the UNets of Stable Diffusion are made ready to train, and what they are asked with."""

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import Tensor
from transformers import PreTrainedModel

from ether_diffusion.bases.prompts import PromptEmbeddings

UNet: TypeAlias = UNet2DConditionModel
NoiseScheduler: TypeAlias = DDPMScheduler
Attention = Literal["auto", "eager", "sdpa", "xformers"]

SMALL_ATTENTION = 32
"""Side (latent px) up to which a CPU is faster without fused attention, whose backward is slow there."""


def set_attention(unet: UNet, attention: Attention, *, latent_side: int) -> None:
    """Let a UNet compute attention in one of these ways, auto by what is fastest in training."""
    if attention == "xformers":
        unet.enable_xformers_memory_efficient_attention()
        return
    is_small = unet.device.type == "cpu" and latent_side <= SMALL_ATTENTION
    is_eager = attention == "eager" or (attention == "auto" and is_small)
    unet.set_attn_processor(AttnProcessor() if is_eager else AttnProcessor2_0())


def recompute_activations(model: PreTrainedModel) -> None:
    """Let a text encoder in training compute its activations twice instead of keeping them."""
    newer_name = "activation_checkpointing_enable"  # transformers warns of the older one where it has both
    enable = getattr(model, newer_name, None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def unet_inputs(
    unet: UNet,
    noisy: Tensor,
    timesteps: Tensor,
    embeddings: PromptEmbeddings,
    *,
    size_ids: Tensor | None = None,
    inpainting: Tensor | None = None,
) -> dict[str, Any]:
    """Return a UNet's arguments for noisy latents (b, c, h, w), in its dtype and on its device.

    size_ids (b, 6) are those of SDXL; inpainting (b, 1 + c, h, w) is the mask and what it leaves.
    """
    device, dtype = unet.device, unet.dtype
    embeddings = embeddings.to(device, dtype)
    if inpainting is not None:
        noisy = torch.cat((noisy, inpainting), dim=1)
    inputs: dict[str, Any] = {
        "sample": noisy.to(device, dtype),
        "timestep": timesteps.to(device),
        "encoder_hidden_states": embeddings.sequence,
    }
    if size_ids is not None:
        conditions = {"text_embeds": embeddings.pooled, "time_ids": size_ids.to(device, dtype)}
        inputs["added_cond_kwargs"] = conditions
    return inputs


def take_rows(inputs: Mapping[str, Any], chosen: Tensor) -> dict[str, Any]:
    """Take rows (b,) of every tensor among a UNet's arguments."""
    return {
        name: take_rows(value, chosen) if isinstance(value, Mapping) else value[chosen]
        for name, value in inputs.items()
    }
