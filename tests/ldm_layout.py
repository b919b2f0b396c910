"""Pipelines of diffusers as one file in the layout of the first Stable Diffusion, as people download them."""

from collections.abc import Mapping

import torch
from diffusers.loaders.single_file_utils import (
    DIFFUSERS_TO_LDM_MAPPING,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from torch import Tensor, nn

UNET, VAE = "model.diffusion_model.", "first_stage_model."
_RESNET = (
    *("in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3", "skip_connection"),
    *("op", "conv"),
)
_ATTENTION = ("norm", "proj_in", "proj_out")
_BLOCK = (
    *(f"attn{n}.{name}" for n in (1, 2) for name in ("to_q", "to_k", "to_v", "to_out.0")),
    *("norm1", "norm2", "norm3", "ff.net.0.proj", "ff.net.2"),
)
_VAE_RESNET = ("norm1", "conv1", "norm2", "conv2", "nin_shortcut")


class _Name(str):
    """A key that diffusers' converter moves about in place of its tensor."""

    shape = (1, 1)
    ndim = 2


def in_one_file(pipeline: object) -> dict[str, Tensor]:
    """Return a pipeline's weights by the names of a single file; SD 1.x, 2.x or XL by its text encoders."""
    unet, vae = pipeline.unet, pipeline.vae  # type: ignore[attr-defined]
    weights = _renamed(unet, convert_ldm_unet_checkpoint(_named(_unet_layers(), UNET), unet.config), "")
    names = convert_ldm_vae_checkpoint(
        _named(_vae_layers(len(vae.config.block_out_channels)), VAE), vae.config
    )
    weights |= _renamed(vae, names, VAE)
    first = pipeline.text_encoder  # type: ignore[attr-defined]
    second = getattr(pipeline, "text_encoder_2", None)
    if second is not None:
        weights |= _clip(first, "conditioner.embedders.0.transformer.")
        weights |= _open_clip(second, "conditioner.embedders.1.model.")
    elif first.config.hidden_act == "gelu":
        weights |= _open_clip(first, "cond_stage_model.model.")
    else:
        weights |= _clip(first, "cond_stage_model.transformer.")
    return {name: tensor.detach().clone().contiguous() for name, tensor in weights.items()}


def _named(layers: list[str], prefix: str) -> dict[str, _Name]:
    keys = [f"{prefix}{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]
    return {key: _Name(key) for key in keys}


def _unet_layers() -> list[str]:
    blocks = [f"{side}_blocks.{i}.{j}" for side in ("input", "output") for i in range(12) for j in range(3)]
    blocks += [f"middle_block.{i}" for i in range(3)]
    inner = [f"transformer_blocks.{k}.{name}" for k in range(10) for name in _BLOCK]
    outer = ("time_embed.0", "time_embed.2", "input_blocks.0.0", "out.0", "out.2")
    labels = ("label_emb.0.0", "label_emb.0.2")
    return [
        *outer,
        *labels,
        *(f"{block}.{name}" for block in blocks for name in (*_RESNET, *_ATTENTION, *inner)),
    ]


def _vae_layers(depth: int) -> list[str]:
    sides = [f"encoder.down.{i}" for i in range(depth)] + [f"decoder.up.{i}" for i in range(depth)]
    blocks = [f"{side}.block.{j}" for side in sides for j in range(3)]
    blocks += [f"{half}.mid.block_{j}" for half in ("encoder", "decoder") for j in (1, 2)]
    layers = [f"{block}.{name}" for block in blocks for name in _VAE_RESNET]
    layers += [f"{side}.{name}.conv" for side in sides for name in ("downsample", "upsample")]
    for half in ("encoder", "decoder"):
        layers += [f"{half}.mid.attn_1.{name}" for name in ("norm", "q", "k", "v", "proj_out")]
        layers += [f"{half}.{name}" for name in ("conv_in", "norm_out", "conv_out")]
    return [*layers, "quant_conv", "post_quant_conv"]


def _renamed(model: nn.Module, names: Mapping[str, str], prefix: str) -> dict[str, Tensor]:
    renamed = {}
    for key, tensor in model.state_dict().items():
        name = str(names[key])
        is_conv = ".attn_1." in name and tensor.ndim == 2  # there the first one has convolutions
        renamed[name] = tensor[:, :, None, None] if is_conv else tensor
    return renamed


def _clip(model: nn.Module, prefix: str) -> dict[str, Tensor]:
    own = {key.removeprefix("text_model."): tensor for key, tensor in model.state_dict().items()}
    return {f"{prefix}text_model.{key}": tensor for key, tensor in own.items()}


def _open_clip(model: nn.Module, prefix: str) -> dict[str, Tensor]:
    state = {key.removeprefix("text_model."): tensor for key, tensor in model.state_dict().items()}
    named = DIFFUSERS_TO_LDM_MAPPING["openclip"]["layers"]
    weights: dict[str, Tensor] = {}
    for key, name in named.items():
        tensor = state.get(key.removeprefix("text_model."))
        if tensor is not None:
            weights[prefix + name] = tensor.T if name.endswith("text_projection") else tensor
    for layer in range(model.config.num_hidden_layers):  # type: ignore[arg-type, union-attr]
        ours, theirs = f"encoder.layers.{layer}.", f"{prefix}transformer.resblocks.{layer}."
        for kind in ("weight", "bias"):
            rows = [state[f"{ours}self_attn.{each}_proj.{kind}"] for each in "qkv"]
            weights[f"{theirs}attn.in_proj_{kind}"] = torch.cat(rows)
            for mine, name in (
                *(("self_attn.out_proj", "attn.out_proj"), ("layer_norm1", "ln_1"), ("layer_norm2", "ln_2")),
                *(("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj")),
            ):
                weights[f"{theirs}{name}.{kind}"] = state[f"{ours}{mine}.{kind}"]
    return weights
