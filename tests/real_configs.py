"""The UNets of Stable Diffusion 1.5, 2.1 and XL from their published configs, without weights."""

import torch
from diffusers import UNet2DConditionModel

_SD = {"block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2, "sample_size": 64}

CONFIGS: dict[str, dict[str, object]] = {
    "sd15": {**_SD, "cross_attention_dim": 768, "attention_head_dim": 8},
    "sd21": {
        **_SD,
        "sample_size": 96,
        "cross_attention_dim": 1024,
        "attention_head_dim": [5, 10, 20, 20],
        "use_linear_projection": True,
    },
    "sdxl": {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20],
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}


def meta_unet(name: str) -> UNet2DConditionModel:
    """Build one of `CONFIGS` on the meta device: names and shapes, no numbers."""
    with torch.device("meta"):
        return UNet2DConditionModel(**CONFIGS[name])


_SD35 = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "qk_norm": "rms_norm"}
_KLEIN = {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680}
FLOW_CONFIGS: dict[str, dict[str, object]] = {
    "sd3": {**_SD35, "joint_attention_dim": 4096, "dual_attention_layers": tuple(range(13))},
    "flux": {"num_layers": 19, "num_single_layers": 38, "guidance_embeds": True},
    "flux2": {**_KLEIN, "guidance_embeds": False},
    "flux2_dev": {},
    "z_image": {},
    "qwen_image": {"num_layers": 60},
    "chroma": {"num_layers": 19, "num_single_layers": 38},
    "sana": {"num_layers": 20},
}
"""What differs from the defaults of diffusers' classes in the transformers of SD 3.5 medium, FLUX.1 dev,
FLUX.2 klein 4B and dev, Z-Image, Qwen-Image, Chroma and Sana 1.6B."""
