"""What is no usable photo is refused by what it is, all of it at once; nothing hangs, crashes or changes."""

import os
import random
import socket
import tempfile
from pathlib import Path

import photo_files
import pytest
from photo_folders import check, failure, fill, refusals, without_rights
from PIL import Image


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    return tmp_path / "photos"


def test_an_empty_folder_is_refused_with_what_was_looked_for(folder: Path) -> None:
    assert (
        failure(folder) == f"no usable photos in {folder} (looked for jpg, png, webp, avif, tiff, gif, bmp)"
    )


def test_a_missing_folder_is_called_missing(folder: Path) -> None:
    assert failure(folder / "b") == f"there is no folder {folder}/b; give the folder that holds the photos"
    assert "(an empty name)" in failure("")


def test_a_file_is_not_taken_for_a_folder(folder: Path) -> None:
    fill(folder, a_png=photo_files.photo())
    assert (
        failure(folder / "a.png") == f"{folder}/a.png is not a folder; give the folder that holds the photos"
    )


def test_a_folder_that_may_not_be_read_says_so() -> None:
    with tempfile.TemporaryDirectory() as parent:
        closed = Path(parent, "closed")
        Path(parent).chmod(0o755)
        closed.mkdir(mode=0o000)
        with without_rights():
            said = failure(closed)
        assert said == f"the folder {closed} cannot be read (Permission denied); change its rights"


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("a_png", b"", "is empty (0 bytes); fetch it again or delete it"),
        ("a_png", b"just a note\n", "is not an image but text; delete it or move it away"),
        (
            "a_jpg",
            b"<!DOCTYPE html><html></html>",
            "is not an image but an HTML page, as a failed download leaves",
        ),
        (
            "a_svg",
            b"<svg xmlns='http://www.w3.org/2000/svg'/>",
            "is a vector file (SVG), which is not supported",
        ),
        (
            "a_heic",
            b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
            "is a HEIC photo; install pillow-heif or convert it",
        ),
        ("a_mp4", b"\0\0\0\x18ftypisom\0\0\0\0isommp41", "is a video or an image of a kind that is not read"),
        (
            "a_nef",
            photo_files.photo(kind="TIFF"),
            "is a camera raw file, which is not read; export it as JPEG",
        ),
        ("a_zip", b"PK\x03\x04" + bytes(50), "is a zip archive; unpack it and give the folder"),
        ("a_bin", bytes(range(128, 256)), "is not an image that can be read (jpg, png, "),
    ],
)
def test_a_file_that_is_no_photo_is_refused_by_what_it_is(
    name: str, data: bytes, reason: str, folder: Path
) -> None:
    fill(folder, **{name: data})
    (said,) = refusals(folder)
    assert said.startswith(f"{name.replace('_', '.')} {reason}")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "TIFF", "WEBP", "AVIF", "BMP"])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_a_truncated_photo_is_found_by_decoding_it_whole(kind: str, share: float, folder: Path) -> None:
    data = photo_files.photo(kind=kind)
    fill(folder, a_img=data[: int(len(data) * share)])
    (said,) = refusals(folder)
    assert said.startswith(
        ("a.img is cut short", "a.img is broken (", "a.img is not an image that can be read")
    )


def test_an_animation_that_breaks_off_after_its_first_frame_is_refused(folder: Path) -> None:
    frames = [Image.fromarray(photo_files.noise(seed=seed)).quantize(16) for seed in range(2)]
    whole = photo_files.encode(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=100)
    second = whole.rindex(b"\x21\xf9\x04")  # the graphic control extension before the last frame
    fill(folder, a_gif=whole[: second + 1])
    (said,) = refusals(folder)
    assert said.startswith("a.gif is broken (")


def test_a_link_out_of_the_folder_is_followed_only_when_allowed(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere.png").write_bytes(photo_files.photo())
    (folder / "a.png").symlink_to(tmp_path / "elsewhere.png")
    (said,) = refusals(folder)
    assert said.startswith(f"a.png is a link to {tmp_path}/elsewhere.png, outside the folder; ")
    assert [photo.path.name for photo in check(folder, follow_symlinks=True).photos] == ["a.png", "zz.png"]


def test_links_in_a_circle_and_to_nothing_are_refused(folder: Path) -> None:
    (folder / "a.png").symlink_to("b.png")
    (folder / "b.png").symlink_to("a.png")
    (folder / "c.png").symlink_to("gone.png")
    (folder / "d").symlink_to(".")
    circle = "is a link that leads back to itself; delete it"
    expected = [f"a.png {circle}", f"b.png {circle}", "c.png is a link to nothing; delete it"]
    assert refusals(folder, follow_symlinks=True) == expected


def test_fifos_sockets_and_devices_are_never_opened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)  # a socket's path must be short
    os.mkfifo("a.png")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("b.png")
        (folder / "c.png").symlink_to("/dev/zero")
        rest = "which is never opened; delete it or move it away"
        expected = [f"a.png is a FIFO, {rest}", f"b.png is a socket, {rest}", f"c.png is a device, {rest}"]
        assert refusals(folder, follow_symlinks=True) == expected


def damaged(data: bytes, draw: random.Random) -> bytes:
    broken = bytearray(data)
    for _ in range(draw.randint(1, 6)):
        start, length = draw.randrange(len(broken)), draw.choice((1, 1, 2, 4, 30))
        kind = draw.randrange(4)
        if kind == 0:
            broken[start : start + length] = draw.randbytes(length)
        elif kind == 1:
            broken[start : start + length] = draw.choice((b"\0", b"\xff")) * length
        elif kind == 2:
            del broken[start : start + length]
        else:
            broken[start:start] = broken[: draw.randrange(40)]
    return bytes(broken or b"\0")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF", "GIF", "BMP"])
def test_damage_ends_in_a_refusal_or_a_photo_and_in_nothing_else(kind: str, folder: Path) -> None:
    draw = random.Random(kind)
    exif = Image.Exif()
    exif[0x0112] = 5
    options = {} if kind in ("GIF", "BMP") else {"exif": exif, "icc_profile": photo_files.adobe_rgb_profile()}
    whole = photo_files.encode(photo_files.noise(16, 12), kind, **options)
    for number in range(60):
        (folder / f"{number}.img").write_bytes(damaged(whole, draw))
    (folder / "whole.img").write_bytes(whole)
    found = check(folder, min_side=1, max_pixels=10**6)
    assert len(found.photos) + len(found.refused) == 61
    assert "whole.img" in {photo.path.name for photo in found.photos}
    assert all(refusal.sentence.isprintable() for refusal in found.refused)
