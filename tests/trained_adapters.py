"""Adapters as training leaves them, on tiny pipelines, and what those compute."""

from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from diffusers import DiffusionPipeline
from oracles import dense_weight
from tiny_pipelines import CONTEXT, LATENT
from torch import Tensor

from ether_diffusion import EtherConfig
from ether_diffusion.adapters import save_ether
from ether_diffusion.reflections import Vectors

CONFIGS = {
    "ether": EtherConfig(init_weights=False),
    "ether_plus": EtherConfig(variant="ether_plus", init_weights=False),
    "ether_plus_input": EtherConfig(variant="ether_plus", sides="input", num_blocks=2, init_weights=False),
    "ether_output": EtherConfig(sides="output", num_blocks=8, init_weights=False),
    "ether_both": EtherConfig(sides="both", init_weights=False),
    "mixed_blocks": EtherConfig(num_blocks_pattern={r"mid_block.*": 8}, init_weights=False),
}


class Trainable(Protocol):
    def add_adapter(self, config: EtherConfig, name: str) -> None: ...


def train(model: Trainable, config: EtherConfig) -> None:
    """Give a model an adapter as training would leave it: far from the identity, on every side."""
    model.add_adapter(replace(config), "default")


def save_adapter(pipe: DiffusionPipeline, config: EtherConfig, folder: Path) -> Path:
    """Save a trained adapter of the UNet and leave the pipeline without it."""
    train(pipe.unet, config)
    save_ether(pipe, folder, trigger="a photo of sks dog", base_model="tiny")
    pipe.unet.delete_adapters("default")
    return folder


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "sample": torch.randn(2, 4, LATENT, LATENT, generator=generator),
        "timestep": torch.tensor([3, 700]),
        "context": torch.randn(2, 7, CONTEXT, generator=generator),
        "context_xl": torch.randn(2, 7, 2 * CONTEXT, generator=generator),
        "pooled": torch.randn(2, CONTEXT, generator=generator),
        "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]]).repeat(2, 1),
        "tokens": torch.tensor([[0, 5, 9, 30, 1]]),
    }


def predict(pipe: DiffusionPipeline, scale: float | None) -> Tensor:
    x = inputs()
    is_xl = "XL" in type(pipe).__name__
    with torch.no_grad():
        sample: Tensor = pipe.unet(
            x["sample"],
            x["timestep"],
            x["context_xl"] if is_xl else x["context"],
            added_cond_kwargs={"text_embeds": x["pooled"], "time_ids": x["time_ids"]} if is_xl else {},
            cross_attention_kwargs=None if scale is None else {"scale": scale},
        ).sample
    return sample


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def dense_update(weight: Tensor, sides: tuple[Vectors | None, Vectors | None]) -> Tensor:
    wide = [
        None if s is None else Vectors(s.u.double(), None if s.v is None else s.v.double()) for s in sides
    ]
    return dense_weight(weight.double(), *wide) - weight.double()


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
