"""The transformers that diffusers draws with, of a few thousand random weights each, by family."""

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import nn


def _of(kind: str, **form: Any) -> Callable[..., nn.Module]:
    def build(**other: Any) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model: nn.Module = getattr(diffusers, kind)(**form | other)
        for parameter in model.parameters():  # some start at zeros, or at what memory held
            if parameter.ndim < 2 or not parameter.isfinite().all():
                parameter.data.fill_(0.1)
        return model.eval()

    return build


_TWO_HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
_MMDIT = {**_TWO_HEADS, "num_layers": 1, "joint_attention_dim": 32, "in_channels": 4}
_DIT = {**_TWO_HEADS, "num_layers": 1, "in_channels": 4}
_VIDEO = {**_DIT, "text_dim": 32, "freq_dim": 16, "ffn_dim": 32, "out_channels": 4, "rope_max_seq_len": 32}
_ROPE = {"axes_dims_rope": (4, 4, 8)}
_FLUX2: dict[str, Any] = {"joint_attention_dim": 24, "num_single_layers": 1, "timestep_guidance_channels": 16}
_FLUX2 |= {"axes_dims_rope": (4, 4, 4, 4)}

TRANSFORMERS: dict[str, Callable[..., Any]] = {
    "auraflow": _of(
        "AuraFlowTransformer2DModel",
        **_TWO_HEADS,
        sample_size=8,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pos_embed_max_size=16,
    ),
    "bria": _of("BriaTransformer2DModel", **_MMDIT, **_ROPE, num_single_layers=1, pooled_projection_dim=16),
    "chroma": _of(
        "ChromaTransformer2DModel",
        **_MMDIT,
        **_ROPE,
        num_single_layers=1,
        approximator_num_channels=16,
        approximator_hidden_dim=32,
        approximator_layers=1,
    ),
    "cogvideox": _of(
        "CogVideoXTransformer3DModel",
        **_DIT,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=16,
        sample_width=8,
        sample_height=8,
        sample_frames=5,
    ),
    "cogview4": _of(
        "CogView4Transformer2DModel",
        **_DIT,
        out_channels=4,
        text_embed_dim=16,
        time_embed_dim=8,
        condition_dim=8,
        pos_embed_max_size=8,
        sample_size=8,
        rope_axes_dim=(8, 8),
    ),
    "cosmos": _of(
        "CosmosTransformer3DModel",
        **_DIT,
        out_channels=4,
        text_embed_dim=16,
        adaln_lora_dim=4,
        max_size=(4, 8, 8),
        mlp_ratio=2.0,
    ),
    "flux": _of(
        "FluxTransformer2DModel",
        **_MMDIT,
        **_ROPE,
        num_single_layers=1,
        pooled_projection_dim=16,
        guidance_embeds=True,
    ),
    "flux2": _of("Flux2Transformer2DModel", **_MMDIT | _FLUX2, guidance_embeds=False),
    "flux2_dev": _of("Flux2Transformer2DModel", **_MMDIT | _FLUX2, guidance_embeds=True),
    "hidream": _of(
        "HiDreamImageTransformer2DModel",
        **_DIT,
        patch_size=2,
        num_single_layers=1,
        caption_channels=[16, 16],
        text_emb_dim=16,
        axes_dims_rope=(8, 8),
        max_resolution=(8, 8),
        llama_layers=[0, 0],
    ),
    "hunyuan_dit": _of(
        "HunyuanDiT2DModel",
        **_DIT,
        patch_size=2,
        sample_size=8,
        hidden_size=32,
        cross_attention_dim=16,
        cross_attention_dim_t5=16,
        pooled_projection_dim=4,
        text_len=4,
        text_len_t5=4,
    ),
    "hunyuan_video": _of(
        "HunyuanVideoTransformer3DModel",
        **_DIT,
        out_channels=4,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(4, 4, 8),
    ),
    "kandinsky5": _of(
        "Kandinsky5Transformer3DModel",
        in_text_dim=16,
        in_text_dim2=16,
        time_dim=16,
        model_dim=32,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=1,
        axes_dims=(4, 4, 8),
    ),
    "latte": _of("LatteTransformer3DModel", **_DIT, patch_size=2, sample_size=8, caption_channels=16),
    "ltx": _of(
        "LTXVideoTransformer3DModel", **_DIT, out_channels=4, cross_attention_dim=32, caption_channels=16
    ),
    "lumina2": _of(
        "Lumina2Transformer2DModel",
        sample_size=8,
        in_channels=4,
        hidden_size=48,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=2,
        axes_dim_rope=(4, 4, 8),
        axes_lens=(16, 16, 16),
        cap_feat_dim=16,
    ),
    "mochi": _of(
        "MochiTransformer3DModel",
        **_TWO_HEADS,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=4,
        text_embed_dim=16,
        time_embed_dim=4,
        max_sequence_length=16,
    ),
    "pixart": _of(
        "PixArtTransformer2DModel",
        **_DIT,
        cross_attention_dim=32,
        sample_size=8,
        caption_channels=32,
        norm_num_groups=4,
    ),
    "qwen_image": _of(
        "QwenImageTransformer2DModel",
        **_MMDIT | _ROPE | {"in_channels": 16, "num_layers": 2},
        out_channels=4,
    ),
    "sana": _of(
        "SanaTransformer2DModel",
        **_DIT,
        out_channels=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=16,
        sample_size=8,
    ),
    "sd3": _of(
        "SD3Transformer2DModel",
        **{**_MMDIT, "num_layers": 2},
        sample_size=8,
        patch_size=1,
        caption_projection_dim=32,
        pooled_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=32,
        dual_attention_layers=(0,),
    ),
    "skyreels": _of("SkyReelsV2Transformer3DModel", **_VIDEO),
    "wan": _of("WanTransformer3DModel", **_VIDEO),
    "wan_image_to_video": _of("WanTransformer3DModel", **_VIDEO, image_dim=8, added_kv_proj_dim=32),
    "z_image": _of(
        "ZImageTransformer2DModel",
        dim=48,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=3,
        n_kv_heads=3,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[1024, 64, 64],
    ),
}

PIPELINES = {
    "auraflow": "AuraFlowPipeline",
    "chroma": "ChromaPipeline",
    "cogvideox": "CogVideoXPipeline",
    "cogview4": "CogView4Pipeline",
    "flux": "FluxPipeline",
    "flux2": "Flux2KleinPipeline",
    "flux2_dev": "Flux2Pipeline",
    "hidream": "HiDreamImagePipeline",
    "hunyuan_video": "HunyuanVideoPipeline",
    "kandinsky5": "Kandinsky5T2VPipeline",
    "ltx": "LTXPipeline",
    "lumina2": "Lumina2Pipeline",
    "mochi": "MochiPipeline",
    "qwen_image": "QwenImagePipeline",
    "sana": "SanaPipeline",
    "sd3": "StableDiffusion3Pipeline",
    "skyreels": "SkyReelsV2Pipeline",
    "wan": "WanPipeline",
    "wan_image_to_video": "WanImageToVideoPipeline",
    "z_image": "ZImagePipeline",
}
"""Whose `load_lora_weights` reads the LoRA of a family; the others' models are loaded by themselves."""


def pipeline_around(family: str, transformer: nn.Module) -> diffusers.DiffusionPipeline:
    """Return a family's pipeline that holds its transformer and nothing else."""
    kind = getattr(diffusers, PIPELINES[family])
    parts, _ = kind._get_signature_keys(kind)
    return kind(**(dict.fromkeys(parts) | {"transformer": transformer}))
