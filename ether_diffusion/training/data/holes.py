"""Holes for training inpainting UNets: what of a photo is hidden from them."""

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ether_diffusion.training.data.geometry import Size, draw_int


def draw_hole(size: Size, generator: torch.Generator) -> Tensor:
    """Return a mask (1, height, width) of 1 in a rectangle or an ellipse, each as likely, and 0 elsewhere.

    Its sides are uniform up to the whole image's, and it lies anywhere inside, as in `random_mask` of
    diffusers' research project dreambooth_inpaint.
    """
    mask = Image.new("1", (size[1], size[0]))
    extent = [draw_int(side + 1, generator) // 2 for side in size]
    centre = [
        half + draw_int(side - 2 * half + 1, generator) for side, half in zip(size, extent, strict=True)
    ]
    (y, x), (half_height, half_width) = centre, extent
    box = (x - half_width, y - half_height, x + half_width, y + half_height)
    draw = ImageDraw.Draw(mask)
    if draw_int(2, generator):
        draw.ellipse(box, fill=1)
    else:
        draw.rectangle(box, fill=1)
    values = torch.frombuffer(bytearray(mask.convert("L").tobytes()), dtype=torch.uint8)
    return (values > 0).float().reshape(1, *size)


def shrink_hole(hole: Tensor, size: Size) -> Tensor:
    """Return a hole (1, H, W) at the latents' size (1, h, w): nearest values, as in diffusers' pipelines."""
    return torch.nn.functional.interpolate(hole[None], size=size)[0]
