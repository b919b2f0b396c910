"""Sizes and places: photos are covered, never stretched, and sorted into the nearest aspect ratio."""

import math
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from photo_batches import base_like
from PIL import Image

from ether_diffusion.training.config import DataConfig
from ether_diffusion.training.photos import Scaling, automatic_buckets, check_sizes, covering_size
from ether_diffusion.training.randomness import draw_inpainting_mask

SIDES = st.integers(64, 5000)
PHOTOS = st.tuples(SIDES, SIDES)
MULTIPLES = st.integers(1, 40).map(lambda side: side * 8)


@given(PHOTOS, st.integers(8, 128).map(lambda side: side * 8))
def test_a_photo_is_resized_as_torchvision_resizes_its_shorter_side(
    photo: tuple[int, int], side: int
) -> None:
    """torchvision's Resize: the shorter side is `side`, the longer int(side * long / short)."""
    longer = int(Fraction(side * max(photo), min(photo)))
    expected = (side, longer) if photo[0] <= photo[1] else (longer, side)
    assert covering_size(photo, (side, side)) == expected


@given(PHOTOS, st.tuples(MULTIPLES, MULTIPLES))
def test_a_resized_photo_covers_the_size_and_fits_on_one_side(
    photo: tuple[int, int], size: tuple[int, int]
) -> None:
    (height, width), (wanted_height, wanted_width) = covering_size(photo, size), size
    assert height >= wanted_height
    assert width >= wanted_width
    assert height == wanted_height or width == wanted_width


@pytest.mark.parametrize(
    ("resolution", "multiple", "step"),
    [(64, 8, 8), (128, 16, 16), (512, 8, 64), (512, 64, 64), (768, 32, 64), (1024, 32, 64)],
)
def test_automatic_buckets_are_about_as_large_as_the_square(
    resolution: int, multiple: int, step: int
) -> None:
    sizes = automatic_buckets(resolution, multiple)
    assert (resolution, resolution) in sizes
    for height, width in sizes:
        assert height % step == width % step == 0
        assert 0.7 * resolution**2 <= height * width <= resolution**2
        assert resolution / 2 <= min(height, width)
        assert (width, height) in sizes


def test_automatic_buckets_hold_the_usual_ones_of_512_px() -> None:
    """kohya-ss/sd-scripts makes these of max_reso 512, min_size 256, max_size 1024 and steps of 64."""
    usual = {(256, 832), (256, 896), (256, 960), (256, 1024), (320, 704), (320, 768), (384, 640), (448, 576)}
    usual.add((512, 512))
    assert {size for size in automatic_buckets(512, 64) if size[0] <= size[1]} == usual


@given(PHOTOS)
def test_a_photo_gets_the_bucket_that_cuts_off_least(photo: tuple[int, int]) -> None:
    buckets = automatic_buckets(512, 64)

    def kept(size: tuple[int, int]) -> Fraction:
        aspect, target = Fraction(photo[1], photo[0]), Fraction(size[1], size[0])
        return min(aspect / target, target / aspect)

    assert kept(Scaling(buckets, Image.Resampling.BOX).size(photo)) >= max(map(kept, buckets)) * (
        1 - Fraction(1, 10**12)
    )


def test_a_side_that_the_base_cannot_halve_is_refused_with_what_can() -> None:
    def check(multiple: int, resolution: int, buckets: str | None = None) -> None:
        data = DataConfig(
            instance_data_dir=Path(),
            resolution=resolution,
            use_aspect_ratio_buckets=buckets is not None,
            aspect_ratio_buckets=buckets,
        )
        check_sizes(data, base_like(size_multiple=multiple))

    check(32, 504, "96,64")
    with pytest.raises(ValueError, match=r"resolution=504 is no multiple of 64 px.*use 448, 512") as caught:
        check(64, 504)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"the bucket 64,40 .* use 64, 128"):
        check(64, 64, "64,40")


def test_inpainting_masks_are_rectangles_and_ellipses_inside_the_photo() -> None:
    shares: list[float] = []
    num_rectangles = 0
    for seed in range(200):
        mask = draw_inpainting_mask((64, 96), torch.Generator().manual_seed(seed))
        assert mask.shape == (1, 64, 96)
        assert set(mask.unique().tolist()) <= {0.0, 1.0}
        rows, columns = mask[0].any(1).sum().item(), mask[0].any(0).sum().item()
        num_rectangles += int(mask.sum().item() == rows * columns)
        shares.append(mask.mean().item())
    assert 80 < num_rectangles < 140  # tiny ellipses are rectangles as well
    # half of the sides' mean product 1/4 is rectangles, half ellipses of π/4 of that
    assert abs(sum(shares) / 200 - (1 + math.pi / 4) / 8) < 0.05
