"""Small models that adapters are tried on, and what they compute."""

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from tiny_pipelines import SMALL_UNET
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaForCausalLM

from ether_diffusion import EtherConfig


def small_unet(seed: int = 0, **changes: Any) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    return UNet2DConditionModel(**SMALL_UNET | changes).eval()


def adapted_unet(**config: Any) -> UNet2DConditionModel:
    unet = small_unet()
    unet.add_adapter(EtherConfig(**config))
    return unet


def small_text_encoder(seed: int = 0) -> CLIPTextModel:
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    return CLIPTextModel(config).eval()


def small_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


def output(unet: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    sample, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 32, generator=generator)
    with torch.no_grad():
        result: Tensor = unet(sample, torch.tensor([3, 700]), text, return_dict=False)[0]
    return result


def exactly_equal(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one, other)
