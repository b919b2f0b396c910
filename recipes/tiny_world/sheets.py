"""Contact sheets of pictures."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image


def to_pictures(images: torch.Tensor) -> list[Image.Image]:
    """Turn images (b, 3, height, width) in [-1, 1] into PIL pictures."""
    pixels = (
        ((images.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    )
    return [Image.fromarray(array) for array in pixels]


def write_contact_sheet(pictures: Sequence[Image.Image], path: Path, *, columns: int, zoom: int = 2) -> None:
    """Write pictures of one size as a grid with 2 px between them."""
    width, height = (side * zoom for side in pictures[0].size)
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (width + 2) - 2, rows * (height + 2) - 2), "white")
    for index, picture in enumerate(pictures):
        corner = (index % columns * (width + 2), index // columns * (height + 2))
        sheet.paste(picture.resize((width, height), Image.Resampling.NEAREST), corner)
    sheet.save(path)
