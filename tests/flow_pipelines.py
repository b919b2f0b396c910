"""Pipelines of every family that is trained by flow matching, tiny and random, built without a hub."""

from typing import Any

import diffusers
import torch
import transformers
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny_pipelines import tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformer_families import PIPELINES, TRANSFORMERS
from transformers import PreTrainedTokenizerFast

SIDE = 32
"""Side (px) of what they draw; their autoencoders halve it once, Sana's too."""
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{m['role']}}\n{{m['content']}}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPOKEN = (
    "{% for m in messages %}[{{m['role']}}]{% for part in m['content'] %}{{part['text']}}{% endfor %}"
    "{% endfor %}"
)
UNBINNED = {"use_resolution_binning": False}
UNGUIDED: dict[str, dict[str, Any]] = {
    "z_image": {"guidance_scale": 0.0},
    "qwen_image": {"true_cfg_scale": 1.0},
    "sana": {"guidance_scale": 1.0, **UNBINNED},
}
"""What a family's pipeline is told to draw without guidance, where it is not a guidance_scale of 1."""
DYNAMIC = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}


def _byte_tokenizer(special: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["a photo of a sks cat by wall dog in the snow"], trainer)
    return tokenizer


def _chat_tokenizer(template: str = TEMPLATE) -> Any:
    ends = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    tokenizer = _byte_tokenizer(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **ends, chat_template=template)


def _t5_tokenizer() -> Any:
    tokenizer = _byte_tokenizer(["<pad>", "</s>", "<unk>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    ends = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **ends, model_max_length=512)


def _clip(kind: Any, projected: int) -> Any:
    size = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    words = {"vocab_size": len(tiny_tokenizer()), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    words |= {"max_position_embeddings": 16, "projection_dim": projected}
    return kind(transformers.CLIPTextConfig(**size, **words))


def _t5() -> Any:
    size = {"d_model": 32, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return transformers.T5EncoderModel(transformers.T5Config(vocab_size=512, **size))


def _qwen3(kind: Any, width: int, num_layers: int) -> Any:
    size = {"hidden_size": width, "intermediate_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1}
    return kind(transformers.Qwen3Config(**size, head_dim=8, num_hidden_layers=num_layers, vocab_size=512))


def _mistral3() -> Any:
    size = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "head_dim": 8}
    text = {**size, "model_type": "mistral", "num_key_value_heads": 1, "num_hidden_layers": 30}
    vision = {**size, "model_type": "pixtral", "num_hidden_layers": 1, "image_size": 28, "patch_size": 14}
    config = transformers.Mistral3Config(text_config=text | {"vocab_size": 512}, vision_config=vision)
    return transformers.Mistral3ForConditionalGeneration(config)


def _vae(channels: int, *, is_flux2: bool = False) -> Any:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    form = {"block_out_channels": (4, 4), "norm_num_groups": 1, "latent_channels": channels, **blocks}
    if is_flux2:
        return diffusers.AutoencoderKLFlux2(**form)
    return diffusers.AutoencoderKL(**form, scaling_factor=1.5035, shift_factor=0.0609)


def _flux2_vae() -> Any:
    vae = _vae(1, is_flux2=True)
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    return vae


def _qwen_image_parts() -> tuple[Any, Any]:
    size = {"hidden_size": 32, "intermediate_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2}
    rope = {"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 1e6}
    text = {**size, "num_hidden_layers": 2, "vocab_size": 512, "rope_parameters": rope}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    form = {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 2], "num_res_blocks": 1}
    form |= {"latents_mean": [-0.8, 0.1, 0.4, 1.0], "latents_std": [2.8, 1.6, 2.5, 1.1]}
    vae = diffusers.AutoencoderKLQwenImage(**form, temperal_downsample=[False])
    return vae, transformers.Qwen2_5_VLForConditionalGeneration(config)


def _sana_parts() -> tuple[Any, Any]:
    size = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 1, "num_key_value_heads": 1}
    gemma = transformers.Gemma2Config(**size, head_dim=8, num_hidden_layers=1, vocab_size=512)
    blocks: dict[str, Any] = {"block_types": ("ResBlock",) * 2, "block_out_channels": (8, 8)}
    blocks |= {"layers_per_block": (1, 1), "qkv_multiscales": ((), ())}
    sides = {f"{side}_{name}": blocks[name] for side in ("encoder", "decoder") for name in blocks}
    vae = diffusers.AutoencoderDC(latent_channels=4, scaling_factor=0.41407, **sides)
    return vae, transformers.Gemma2Model(gemma)


def _parts(family: str) -> tuple[Any, list[Any], list[Any]]:
    """Return a family's autoencoder, text encoders and tokenizers."""
    projected = transformers.CLIPTextModelWithProjection
    match family:
        case "sd3":
            clips = [_clip(projected, 8), _clip(projected, 8)]
            return _vae(4), [*clips, _t5()], [tiny_tokenizer(), tiny_tokenizer(), _t5_tokenizer()]
        case "flux":
            texts = [_clip(transformers.CLIPTextModel, 16), _t5()]
            return _vae(1), texts, [tiny_tokenizer(), _t5_tokenizer()]
        case "flux2":
            return _flux2_vae(), [_qwen3(transformers.Qwen3ForCausalLM, 8, 27)], [_chat_tokenizer()]
        case "flux2_dev":
            return _flux2_vae(), [_mistral3()], [_chat_tokenizer(SPOKEN)]
        case "z_image":
            return _vae(16), [_qwen3(transformers.Qwen3Model, 16, 2)], [_chat_tokenizer()]
        case "chroma":
            return _vae(1), [_t5()], [_t5_tokenizer()]
    vae, text_encoder = _qwen_image_parts() if family == "qwen_image" else _sana_parts()
    return vae, [text_encoder], [_chat_tokenizer() if family == "qwen_image" else _t5_tokenizer()]


_QWEN_SHIFT = {"max_shift": 0.9, "max_image_seq_len": 8192, "shift_terminal": 0.02}
FLOW_PIPELINES: dict[str, dict[str, Any]] = {
    "sd3": {"shift": 3.0},
    "flux": {"shift": 3.0, **DYNAMIC},
    "flux2": {"shift": 3.0, **DYNAMIC},
    "flux2_dev": {"shift": 3.0, **DYNAMIC},
    "z_image": {"shift": 6.0},
    "qwen_image": {**DYNAMIC, **_QWEN_SHIFT},
    "chroma": {},
    "sana": {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"},
}
"""The schedulers of the families."""


WIDE: dict[str, dict[str, Any]] = {
    family: {"num_attention_heads": 4} for family in ("flux", "flux2", "flux2_dev", "qwen_image", "chroma")
}
WIDE |= {
    "sd3": {"num_attention_heads": 4, "caption_projection_dim": 64},
    "z_image": {"dim": 64, "n_heads": 4, "n_kv_heads": 4},
    "sana": {"num_attention_heads": 4, "num_cross_attention_heads": 4, "cross_attention_dim": 64},
}
"""What makes the inner width of a transformer 64, of which weights can be quantized."""


def flow_pipeline(family: str, *, is_wide: bool = False) -> Any:
    """Return a family's pipeline in evaluation, always of the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        is_solver, (vae, *texts) = family == "sana", _parts(family)
        scheduler = diffusers.DPMSolverMultistepScheduler if is_solver else FlowMatchEulerDiscreteScheduler
        parts = {"scheduler": scheduler(**FLOW_PIPELINES[family]), "vae": vae}
        for number, (text_encoder, tokenizer) in enumerate(zip(*texts, strict=True)):
            end = f"_{number + 1}" if number else ""
            parts |= {f"text_encoder{end}": text_encoder, f"tokenizer{end}": tokenizer}
        transformer = TRANSFORMERS[family](**WIDE[family] if is_wide else {})
        pipeline: Any = getattr(diffusers, PIPELINES[family])(transformer=transformer, **parts)
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                part.eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipe: Any, family: str) -> Tensor:
    """Return what a pipeline draws without guidance (1, 3, h, w), always from the same noise."""
    how = {"height": SIDE, "width": SIDE, "num_inference_steps": 2, "output_type": "pt"}
    how |= UNGUIDED.get(family, {"guidance_scale": 1.0})
    images: Tensor = pipe(prompt="a sks cat", generator=torch.Generator().manual_seed(1), **how).images
    return images
