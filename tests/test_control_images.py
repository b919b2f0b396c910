"""Control images of every form become tensors of the picture's size, or are refused in a sentence."""

import numpy as np
import pytest
import torch
from PIL import Image

from ether_diffusion.control import control_batch, control_image_sha256


def picture(side: int = 8, mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def batch(image: object, side: int = 8, control_type: str | None = None) -> torch.Tensor:
    return control_batch(image, height=side, width=side, control_type=control_type)  # type: ignore[arg-type]


def test_a_picture_of_the_right_size_keeps_its_values() -> None:
    expected = torch.from_numpy(np.asarray(picture()).copy()).permute(2, 0, 1) / 255
    torch.testing.assert_close(batch(picture())[0], expected, atol=0, rtol=0)


def test_a_list_is_a_batch_and_so_is_a_tensor_of_several() -> None:
    stacked = batch([picture(), picture().rotate(90)])
    assert stacked.shape == (2, 3, 8, 8)
    assert torch.equal(batch(stacked), stacked)


@pytest.mark.parametrize("mode", ["1", "L"])
def test_one_channel_becomes_three(mode: str) -> None:
    found = batch(picture(mode=mode))[0]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert torch.equal(batch(found[:1])[0], found)


def test_what_is_transparent_is_black() -> None:
    image = picture().convert("RGBA")
    image.putalpha(Image.new("L", (8, 8), 0))
    assert batch(image).abs().max() == 0


def test_the_colours_of_a_palette_stay_the_same_when_it_is_resized() -> None:
    image = Image.new("RGB", (8, 8), (255, 0, 0))
    image.paste((0, 0, 255), (0, 0, 3, 8))
    colours = {tuple(c) for c in batch(image, 64, "palette")[0].flatten(1).T.tolist()}
    assert colours == {(1.0, 0.0, 0.0), (0.0, 0.0, 1.0)}
    assert len({tuple(c) for c in batch(image, 64)[0].flatten(1).T.tolist()}) > 2


def test_a_picture_and_its_tensor_have_one_hash_and_another_picture_another() -> None:
    assert control_image_sha256(picture()) == control_image_sha256(batch(picture())[0])
    assert control_image_sha256(picture()) != control_image_sha256(picture().rotate(90))
    flat, tall = Image.new("RGB", (8, 2)), Image.new("RGB", (2, 8))
    assert control_image_sha256(flat) != control_image_sha256(tall)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (Image.new("RGB", (16, 8)), "has 16 × 8 px and the picture 8 × 8 px; crop it"),
        (Image.new("I;16", (8, 8)), "of mode I;16; save it as 8-bit"),
        (Image.new("F", (8, 8)), "of mode F; save it as 8-bit"),
        (Image.new("CMYK", (8, 8)), "of mode CMYK; save it as 8-bit"),
        ([], "an empty list of control images"),
        (torch.zeros(0, 3, 8, 8), "an empty list of control images"),
        (torch.zeros(4, 8, 8), r"of shape \(4, 8, 8\)"),
        (torch.zeros(8, 8), r"of shape \(8, 8\)"),
        (torch.full((3, 8, 8), 255.0), "values from 255 to 255; use 0 to 1"),
        (torch.full((3, 8, 8), float("nan")), "use 0 to 1"),
        (["drawing.png"], "of type str; give a PIL image or a tensor"),
    ],
)
def test_what_is_no_control_image_of_this_size_is_refused(image: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        batch(image)
