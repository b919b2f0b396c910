"""Every kind of photo becomes upright 8-bit sRGB: held to numpy's arithmetic and the standards' numbers."""

import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import photo_files
import pytest
from PIL import Image, ImageOps

from ether_diffusion.training.decoding import decode_photo

Save = Callable[[bytes], Path]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    def write(data: bytes) -> Path:
        (tmp_path / "photo").write_bytes(data)
        return tmp_path / "photo"

    return write


def pixels(path: Path, **options: object) -> photo_files.Array:
    rgb, _ = decode_photo(path, **options)  # type: ignore[arg-type]
    assert rgb.mode == "RGB"
    return np.asarray(rgb)


def refusal(path: Path) -> str:
    with pytest.raises(ValueError, match=f"^{path} ") as caught:
        decode_photo(path)
    return str(caught.value).removeprefix(f"{path} ")


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP", "WEBP"])
def test_a_lossless_photo_keeps_its_pixels(kind: str, save: Save) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    assert np.array_equal(
        pixels(save(photo_files.encode(photo_files.noise(), kind, **options))), photo_files.noise()
    )


@pytest.mark.parametrize("kind", ["JPEG", "AVIF", "WEBP"])
def test_a_lossy_photo_keeps_its_colour(kind: str, save: Save) -> None:
    flat = np.full((70, 80, 3), (200, 60, 20), dtype=np.uint8)
    assert np.abs(pixels(save(photo_files.encode(flat, kind))).astype(int) - flat).max() <= 4


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_comes_out_upright(kind: str, orientation: int, save: Save) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = photo_files.encode(
        photo_files.noise(), kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {})
    )
    path = save(data)
    with Image.open(path) as stored:
        upright = ImageOps.exif_transpose(stored)
        assert np.array_equal(pixels(path), np.asarray(upright.convert("RGB")))


def test_the_mask_turns_with_the_photo(save: Save) -> None:
    rgba = np.dstack([photo_files.noise(), photo_files.noise(seed=1)[..., 0]])
    exif = Image.Exif()
    exif[0x0112] = 6
    _, mask = decode_photo(save(photo_files.encode(rgba, "PNG", exif=exif)))
    assert mask is not None
    assert np.array_equal(np.asarray(mask), np.rot90(rgba[..., 3], -1))


def test_16_bits_are_scaled_and_never_clipped(save: Save) -> None:
    values = np.linspace(0, 65535, 6400).round().astype(np.uint16).reshape(80, 80)
    for kind in ("PNG", "TIFF"):
        gray = pixels(save(photo_files.encode(Image.fromarray(values), kind)))[..., 0]
        assert np.abs(gray - values / 257).max() <= 0.5
    colours = np.linspace(0, 65535, 64 * 64 * 3).round().astype(">u2").reshape(64, 64, 3)
    scaled = pixels(save(photo_files.png((64, 64), 16, 2, colours.tobytes())))
    assert np.abs(scaled - colours / 257).max() <= 1  # Pillow keeps the high byte


def test_a_tiffs_own_white_is_used(save: Save) -> None:
    ramp = np.tile(np.arange(64, dtype="<u2") * 1000, (64, 1))
    white_is_zero = pixels(save(photo_files.gray_tiff((64, 64), 16, 0, ramp.tobytes())))[..., 0]
    assert np.abs(white_is_zero - (65535 - ramp) / 257).max() <= 0.5
    full_12_bits = photo_files.gray_tiff((64, 64), 12, 1, b"\xff" * (64 * 64 * 3 // 2))
    assert pixels(save(full_12_bits)).min() == 255


def test_floating_point_is_scaled_where_it_is_from_0_to_1(save: Save) -> None:
    values = np.linspace(0, 1, 6400, dtype=np.float32).reshape(80, 80)
    gray = pixels(save(photo_files.encode(Image.fromarray(values), "TIFF")))[..., 0]
    assert np.abs(gray - values * 255).max() <= 0.5


@pytest.mark.parametrize("high", [300.0, float("nan")])
def test_floating_point_of_another_range_is_refused_by_its_numbers(high: float, save: Save) -> None:
    values = np.zeros((80, 80), dtype=np.float32)
    values[0, 0] = high
    said = refusal(save(photo_files.encode(Image.fromarray(values), "TIFF")))
    assert f"to {high:g}, whose white is not known; scale them to [0, 1]" in said


def test_transparent_parts_show_the_background_and_never_their_hidden_colour(save: Save) -> None:
    rgba = np.zeros((80, 80, 4), dtype=np.uint8)
    rgba[..., 0] = 255
    rgba[:40, :, 3] = 255
    rgba[60:, :, 3] = 128
    path = save(photo_files.encode(rgba, "PNG"))
    rgb, mask = decode_photo(path, background=(0, 0, 255))
    assert mask is not None
    assert np.array_equal(np.asarray(mask), rgba[..., 3])
    assert rgb.getpixel((0, 0)) == (255, 0, 0)
    assert rgb.getpixel((0, 50)) == (0, 0, 255)
    assert rgb.getpixel((0, 70)) == (128, 0, 127)
    assert pixels(path)[50, 0].tolist() == [255, 255, 255]


def test_an_alpha_channel_that_is_opaque_is_no_mask_and_a_wholly_transparent_photo_is_none(
    save: Save,
) -> None:
    _, mask = decode_photo(save(photo_files.encode(Image.new("RGBA", (80, 80), (1, 2, 3, 255)), "PNG")))
    assert mask is None
    assert "is wholly transparent" in refusal(save(photo_files.encode(Image.new("RGBA", (80, 80)), "PNG")))


def test_gray_with_alpha_and_transparent_keys_come_out_right(save: Save) -> None:
    la = np.dstack([np.full((80, 80), 90), np.full((80, 80), 255)]).astype(np.uint8)
    la[0, 0] = (0, 0)
    key_16 = photo_files.png_chunk(b"tRNS", b"\x12\x34")
    values = np.full((80, 80), 90 * 257, dtype=">u2")
    values[0, 0] = 0x1234
    for data in (
        photo_files.png((80, 80), 8, 4, la.tobytes()),
        photo_files.png((80, 80), 16, 0, values.tobytes(), key_16),
        photo_files.png((80, 80), 8, 0, la[..., 0].tobytes(), photo_files.png_chunk(b"tRNS", b"\0\0")),
    ):
        rgb, mask = decode_photo(save(data))
        assert mask is not None
        assert mask.getpixel((0, 0)) == 0
        assert mask.getpixel((1, 0)) == 255
        assert rgb.getpixel((0, 0)) == (255, 255, 255)
        assert rgb.getpixel((1, 0)) == (90, 90, 90)


def test_a_16_bit_colour_key_is_refused_as_its_depth_is_lost(save: Save) -> None:
    rows = np.full((64, 64, 3), 0x0102, dtype=">u2").tobytes()
    key = photo_files.png_chunk(b"tRNS", b"\0\x01\0\x01\0\x01")
    assert "16-bit PNG with one transparent colour" in refusal(
        save(photo_files.png((64, 64), 16, 2, rows, key))
    )


def test_palettes_and_single_bits_have_their_colours(save: Save) -> None:
    colours = photo_files.png_chunk(b"PLTE", bytes((10, 20, 30, 200, 100, 0)))
    rows = np.tile(np.array([0, 1], dtype=np.uint8), 80 * 40).tobytes()
    path = save(
        photo_files.png((80, 80), 8, 3, rows, colours, photo_files.png_chunk(b"tRNS", bytes((255, 0))))
    )
    assert pixels(path, background=(7, 8, 9))[0, :2].tolist() == [[10, 20, 30], [7, 8, 9]]
    bits = save(photo_files.png((80, 80), 1, 0, b"\x55" * 800))
    assert pixels(bits)[0, :2].tolist() == [[0, 0, 0], [255, 255, 255]]


@pytest.mark.parametrize(
    ("inks", "expected"), [((255, 0, 0, 0), (0, 255, 255)), ((0, 51, 0, 51), (204, 163, 204))]
)
@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_without_a_profile_is_the_paper_less_its_inks(
    kind: str, inks: tuple[int, ...], expected: tuple[int, ...], save: Save
) -> None:
    data = photo_files.encode(Image.new("CMYK", (80, 80), inks), kind)
    assert np.abs(pixels(save(data))[0, 0].astype(int) - expected).max() <= 2


def test_a_cmyk_jpeg_is_inverted_only_under_adobes_mark(save: Save) -> None:
    data = photo_files.encode(Image.new("CMYK", (80, 80), (255, 255, 255, 0)), "JPEG")
    assert pixels(save(data)).max() <= 2
    unmarked = photo_files.without_adobe_mark(
        data
    )  # stores no C, M, Y and all of K as inks: black either way
    full_key = photo_files.encode(Image.new("CMYK", (80, 80), (255, 255, 255, 255)), "JPEG")
    assert pixels(save(unmarked)).max() <= 2
    assert pixels(save(photo_files.without_adobe_mark(full_key))).min() >= 253


def test_cmyk_with_a_profile_has_the_colours_that_the_profile_knows(save: Save) -> None:
    lab: dict[tuple[int, ...], tuple[int, int, int]] = {
        (0, 0, 0, 0): (100, 0, 0),
        (1, 0, 0, 0): (70, -30, 25),
    }
    data = photo_files.encode(
        Image.new("CMYK", (80, 80), (255, 0, 0, 0)), "JPEG", icc_profile=photo_files.ink_profile(lab)
    )
    expected = photo_files.lab_to_srgb((70, -30, 25))
    assert np.abs(pixels(save(data))[0, 0] - expected).max() <= 4  # Lab in bytes, JPEG


def test_wide_gamut_colours_become_srgb_and_gray_with_such_a_profile_is_equal_parts(save: Save) -> None:
    colours = np.array([[120, 140, 90], [200, 180, 170], [60, 60, 60], [255, 255, 255]], dtype=np.uint8)
    gray = np.tile(np.arange(0, 240, 3, dtype=np.uint8), (80, 1))
    for stored, wide in ((np.tile(colours, (80, 20, 1)),) * 2, (gray, np.dstack([gray] * 3))):
        found = pixels(save(photo_files.encode(stored, "PNG", icc_profile=photo_files.adobe_rgb_profile())))
        assert np.abs(found - photo_files.adobe_rgb_to_srgb(wide)).max() <= 1.5
        assert np.abs(found.astype(int) - wide).max() > 2


@pytest.mark.parametrize("profile", [b"not a profile", photo_files.ink_profile({})])
def test_a_profile_that_does_not_fit_changes_no_colour(profile: bytes, save: Save) -> None:
    path = save(photo_files.encode(photo_files.noise(), "PNG", icc_profile=profile))
    assert np.array_equal(pixels(path), photo_files.noise())


def test_a_bomb_is_refused_by_its_header_before_any_decoding(save: Save) -> None:
    for side in (12000, 30000):  # without pixels: decoding would say so
        assert "over 120 million pixels" in refusal(save(photo_files.png((side, side), 8, 0, b"")))
    largest = refusal(save(photo_files.png((12000, 9000), 8, 0, b"")))  # of phones
    assert largest.startswith("is cut short or damaged")


def test_100_mb_of_compressed_text_are_refused_in_flat_memory(save: Save) -> None:
    bomb = photo_files.png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(100_000_000)))
    path = save(photo_files.png((64, 64), 8, 2, photo_files.noise(64, 64).tobytes(), bomb))
    tracemalloc.start()
    said = refusal(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "Decompressed data too large" in said
    assert peak < 16e6


def test_a_60_megapixel_jpeg_is_decoded_at_reduced_scale(save: Save) -> None:
    path = save(photo_files.encode(Image.new("L", (9000, 6700), 90), "JPEG"))
    rgb, _ = decode_photo(path, target_side=1024)
    assert rgb.size == (2250, 1675)
    assert rgb.getpixel((1000, 1000)) == (90, 90, 90)
