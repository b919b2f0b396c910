"""What visitors send: zips that lead out, lie or burst, good and bad photos, and what a browser claims."""

import base64
import errno
import io
import os
import stat
import subprocess
import sys
import tarfile
import unicodedata
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from photo_files import encode, noise, photo
from PIL import Image
from studio_files import Entry, plain_zip, raw_zip

from ether_diffusion.training import zip_files
from ether_diffusion.training.plain_files import UnusableFileError
from ether_diffusion.training.zip_files import read_zip
from ether_diffusion.ui import uploads
from ether_diffusion.ui.uploads import (
    Accepted,
    Refused,
    crop_photo,
    data_address,
    recall_photos,
    take_photos,
    whole_address,
)
from ether_diffusion.ui.words import disk_explained

EVIL = "../../canary.png"


def tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("../canary"), io.BytesIO())
    return buffer.getvalue()


def squeezed(data: bytes) -> bytes:
    squeezer = zlib.compressobj(wbits=-15)
    return squeezer.compress(data) + squeezer.flush()


def test_an_ordinary_zip_is_read_and_what_is_not_wanted_is_not() -> None:
    files = {"photos/ü.png": photo(), "photos/deep/b.txt": b"text", "__MACOSX/._ü.png": b"junk"}
    data = plain_zip(files)
    assert read_zip(data) == {name: files[name] for name in ("photos/ü.png", "photos/deep/b.txt")}
    spoiled = data.replace(b"text", b"best").replace(zlib.crc32(b"text").to_bytes(4, "little"), bytes(4))
    assert read_zip(spoiled, lambda path: path.suffix == ".png") == {"photos/ü.png": photo()}


NAMES = ["../canary", "a/../../canary", "/tmp/canary", "C:/canary", "..\\canary", "a/./b", "a//b", "a\nb",
         "a\u202egnp.exe"]  # fmt: skip
KINDS = [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFDIR]
PAIRS = [("a.txt", "A.txt"), ("a.txt", "a.txt"), ("a", "a/b"), ("a/b", "A"), ("ß.txt", "SS.txt"),
         ("\u00e9.png", "e\u0301.png")]  # fmt: skip
BAD_ZIPS: list[tuple[str, bytes, str]] = [
    *((f"name {name!r}", raw_zip([Entry("good.txt"), Entry(name)]), "no plain") for name in NAMES),
    *((f"kind {kind:o}", raw_zip([Entry("x", mode=kind | 0o777)]), "no plain") for kind in KINDS),
    *((f"pair {pair}", raw_zip([Entry(name) for name in pair]), "pack it anew") for pair in PAIRS),
    ("encrypted", raw_zip([Entry("secret.png", flags=1)]), "secret.png, which is no plain"),
    ("method", raw_zip([Entry("a", method=14)]), "no plain"),
    ("later part", raw_zip([Entry("a", b"x" * 99)])[40:], "not a whole zip"),
    ("many", raw_zip([Entry(f"{n}") for n in range(1001)], num_claimed=3), "1000 entries"),
    ("liar", raw_zip([Entry("a", b"", packed=squeezed(bytes(3 << 20)), method=8, claimed_size=9)]), "whole"),
    ("bomb", raw_zip([Entry("a", b"", packed=squeezed(bytes(99)), method=8, claimed_size=1 << 29)]), "MiB"),
    ("nothing", plain_zip({"__MACOSX/a": b"a"}), "holds no files"),
    ("cut off", plain_zip({"a": b"a" * 99})[:-10], "not a whole zip"),
    ("damaged", raw_zip([Entry("a", b"fine")]).replace(b"fine", b"fina"), "not a whole zip"),
    ("tar", tar(), "not a whole zip"),
    ("gzip", b"\x1f\x8b" + bytes(50), "not a whole zip"),
    ("rar", b"Rar!\x1a\x07", "not a whole zip"),
    ("text", b"hello", "not a whole zip"),
    ("empty", b"", "not a whole zip"),
]


@pytest.mark.parametrize(("data", "words"), [case[1:] for case in BAD_ZIPS], ids=[c[0] for c in BAD_ZIPS])
def test_a_zip_that_nobody_would_pack_is_refused_in_one_sentence(data: bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        read_zip(data)
    assert str(caught.value).isprintable()


def test_many_entries_are_refused_before_zipfile_makes_an_object_of_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(zip_files, "zipfile")
    with pytest.raises(ValueError, match="1000 entries"):
        read_zip(b"PK\x01\x02" * 1001)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text("aA./\\\u00e9e\u0301ß:~ \x00", min_size=1, max_size=8), max_size=4))
def test_every_name_that_is_read_is_a_plain_path_and_there_once(names: list[str]) -> None:
    try:
        found = read_zip(raw_zip([Entry(name) for name in names]))
    except ValueError:
        return
    assert all(os.path.normpath(f"/root/{name}").startswith("/root/") for name in found)
    assert all(".." not in PurePosixPath(name).parts for name in found)
    assert len({unicodedata.normalize("NFC", name.casefold()) for name in found}) == len(found)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_damaged_zip_is_refused_or_read_whatever_is_damaged(data: st.DataObject) -> None:
    whole = plain_zip({"a.png": b"a" * 50, "b/c.json": b"{}"})
    spoiled = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        spoiled[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    with suppress(UnusableFileError):
        read_zip(bytes(spoiled))


def send(
    folder: Path, files: dict[str, bytes], earlier: Sequence[Accepted] = ()
) -> tuple[list[Accepted], list[Refused]]:
    """Take files as a browser sends them; the photos' folder is temp."""
    sent = folder / "sent"
    sent.mkdir(exist_ok=True)
    for name, data in files.items():
        (sent / name).write_bytes(data)
    return take_photos([sent / name for name in files], folder / "temp", earlier)


def test_good_photos_are_taken_and_every_other_file_has_a_reason(tmp_path: Path) -> None:
    jpeg = encode(noise(200, 120, seed=9), "JPEG")
    good = {
        "a.png": photo(1), "b.jpg": photo(2, "JPEG"), "c.webp": photo(3, "WEBP"),
        "d.png": encode(Image.fromarray(noise(seed=4)).convert("L"), "PNG"),
        "e \u202eü.png": photo(5), "f.gif": photo(6, "GIF"), "g.tiff": photo(7, "TIFF"),
    }  # fmt: skip
    bad = {
        "truncated.jpg": (jpeg[: len(jpeg) // 2], "cut short"),
        "page.png": (b"<!doctype html><html>not found</html>", "<!doctype html"),
        "empty.png": (b"", "empty"),
        "small.png": (encode(noise(20, 20), "PNG"), "64"),
        "drawing.svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "<svg"),
        "link.png": (b"", "outside the folder"),
        "pipe.png": (b"", "FIFO"),
        "gone.png": (b"", "gone"),
    }
    sent = tmp_path / "sent"
    sent.mkdir()
    for name, data in (good | {name: data for name, (data, _) in bad.items()}).items():
        (sent / name).write_bytes(data)
    (tmp_path / "secret.png").write_bytes(photo())
    for name in ("link.png", "pipe.png", "gone.png"):
        (sent / name).unlink()
    (sent / "link.png").symlink_to(tmp_path / "secret.png")
    os.mkfifo(sent / "pipe.png")
    accepted, refused = take_photos([sent / name for name in sorted([*good, *bad])], tmp_path / "temp")
    assert [each.name for each in accepted] == [name.replace("\u202e", "\\u202e") for name in good]
    assert {each.name for each in refused} == bad.keys()
    assert all(bad[each.name][1] in each.reason for each in refused)
    assert [each.path.read_bytes() for each in accepted] == list(good.values())
    assert all(each.path.is_relative_to(tmp_path / "temp") for each in accepted)


def test_thumbnails_are_upright_small_and_of_the_photo_and_follow_its_file(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    turned = encode(Image.new("RGB", (600, 300), "red"), "JPEG", exif=exif, quality=95)
    (accepted,), _ = send(tmp_path, {"turned.jpg": turned})
    with Image.open(accepted.thumbnail) as thumbnail:
        assert thumbnail.size == (128, 256)
        red, green, blue = thumbnail.convert("RGB").getpixel((64, 128))  # type: ignore[misc]
    assert red > 240 > 20 > green + blue
    path = tmp_path / "x.png"
    assert data_address(path, 16) is None
    for colour in ((250, 10, 10), (10, 10, 250)):
        Image.new("RGB", (64, 32), colour).save(path)
        address = data_address(path, 16)
        assert address is not None
        data = base64.b64decode(address.removeprefix("data:image/webp;base64,"))
        with Image.open(io.BytesIO(data)) as image:
            assert image.size == (16, 8)
            found = np.asarray(image.convert("RGB"))[4, 8].astype(int)
        assert np.abs(found - colour).max() < 12  # WebP loses some
        path.unlink()
    path.write_bytes(b"half a picture")
    assert data_address(path, 16) is None


def test_zips_are_taken_photo_by_photo_and_hostile_ones_are_one_refusal(tmp_path: Path) -> None:
    files = {"dog/a.png": photo(1), "dog/b.jpg": photo(2, "JPEG"), "dog/notes.txt": b"my dog"}
    evil = raw_zip([Entry(EVIL, data=photo(4))])
    accepted, refused = send(tmp_path, {"dog.zip": plain_zip(files), "evil.zip": evil, "c.png": photo(3)})
    assert [each.name for each in accepted] == ["a.png", "b.jpg", "c.png"]
    assert [each.name for each in refused] == ["evil.zip", "notes.txt"]
    assert f"holds {EVIL}" in refused[0].reason
    assert not list(tmp_path.rglob("canary*"))
    assert not list((tmp_path / "temp").rglob("notes*"))


def test_photos_have_a_size_a_number_and_a_size_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, large = photo(1), encode(noise(96), "PNG")
    with monkeypatch.context() as patched:
        patched.setattr(uploads, "MAX_PHOTO_BYTES", len(large) - 1)
        first, refused = send(
            tmp_path, {"both.zip": plain_zip({"a.png": small, "b.png": large}), "b.png": large}
        )
    assert [each.name for each in first] == ["a.png"]
    assert ["MiB; give a smaller file" in each.reason for each in refused] == [True, True]
    for limit, most, words in (
        ("PHOTOS", 2, "more than 2 photos"),
        ("TOTAL_BYTES", 3 * len(small), "with the others"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(uploads, f"MAX_{limit}", most)
            more, refused = send(tmp_path, {f"{n}.png": photo(n) for n in (2, 3, 4)}, first)
        assert len(more) in (1, 2)
        assert all(words in each.reason for each in refused)
        assert refused


def test_the_same_photo_is_said_in_one_upload_and_not_taken_again_in_another(tmp_path: Path) -> None:
    first, refused = send(tmp_path, {"a.png": photo(1), "b.png": photo(2), "copy.png": photo(1)})
    assert [each.note for each in first[:2]] == ["", ""]
    assert "looks like a.png" in first[2].note
    more, refused = send(tmp_path, {"c.png": photo(2), "d.png": photo(3)}, first)
    assert [each.name for each in more] == ["d.png"]
    assert ["same picture as b.png" in each.reason for each in refused] == [True]


def test_photos_are_found_again_by_what_the_browser_kept_and_no_other_file_is(tmp_path: Path) -> None:
    photos, _ = send(tmp_path, {"a.png": photo(1), "b.png": photo(2)})
    assert recall_photos([photo.kept for photo in photos], tmp_path / "temp") == photos
    photos[1].path.unlink()
    assert recall_photos([photo.kept for photo in photos], tmp_path / "temp") == photos[:1]
    own = photos[0].path.parent.name
    for place in (tmp_path, tmp_path / "temp", photos[0].path.parent):
        (place / "secret.png").write_bytes(photo())
    for folder, file in (
        ("..", "secret.png"), (f"{own}/../..", "secret.png"), (own, "../../secret.png"), (own, "secret.png"),
        (own, "photo-001.png/../../../secret.png"), (own, "photo-001.png\n"), (f"{own}\n", "photo-001.png"),
    ):  # fmt: skip
        assert recall_photos([[folder, file, "x", ""]], tmp_path / "temp") == []
    kept: list[object] = [None, {}, [None, ["a"], [1, 2, 3, 4]]]
    for nonsense in kept:
        assert recall_photos(nonsense, tmp_path / "temp") == []


def test_a_folder_that_cannot_be_made_is_said_in_a_sentence_without_a_path(tmp_path: Path) -> None:
    for number, words in ((errno.ENOSPC, "disk is full"), (errno.EROFS, "cannot be written")):
        with pytest.raises(ValueError, match=words) as caught, disk_explained(tmp_path, "taking the photos"):
            raise OSError(number, os.strerror(number), str(tmp_path))
        assert str(tmp_path) not in str(caught.value)
    with pytest.raises(FileNotFoundError), disk_explained(tmp_path, "taking the photos"):
        (tmp_path / "absent").read_bytes()


@pytest.mark.parametrize(("mode", "kind"), [("RGBA", "PNG"), ("L", "TIFF"), ("RGB", "JPEG")])
def test_a_small_file_of_many_pixels_costs_little_memory(tmp_path: Path, mode: str, kind: str) -> None:
    """Of 120 million pixels: refused, or a JPEG, decoded at a part of its size."""
    path, side = tmp_path / f"vast.{kind.lower()}", (12000, 9990)
    Image.new(mode, side).save(path, kind, **({"compression": "tiff_deflate"} if kind == "TIFF" else {}))
    code = f"""
import resource, sys
from pathlib import Path
from ether_diffusion.ui.uploads import take_photos
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
accepted, refused = take_photos([Path({str(path)!r})] * 2, Path({str(tmp_path / "photos")!r}))
print(len(accepted), len(refused), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
print([each.reason for each in refused])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    counts, reasons = done.stdout.splitlines()
    num_accepted, num_refused, growth = map(int, counts.split())
    assert growth < 200, growth  # MiB; whole, the RGBA picture alone has 457
    assert (num_accepted, num_refused) == ((2, 0) if kind == "JPEG" else (0, 2))
    assert ("over 50 million pixels" in reasons) == (kind != "JPEG")


def test_captions_come_with_their_photos_and_those_of_none_are_said(tmp_path: Path) -> None:
    rows = b'{"file_name": "b.png", "text": "an owl"}\n'
    zipped = plain_zip({"x/b.png": photo(2), "x/metadata.jsonl": rows, "x/c.txt": b"of nobody"})
    accepted, refused = send(tmp_path, {"a.png": photo(1), "a.txt": b" a red\nfox ", "some.zip": zipped})
    assert [(each.name, each.caption) for each in accepted] == [("a.png", "a red fox"), ("b.png", "an owl")]
    assert [each.name for each in refused] == ["c.txt"]
    assert recall_photos([each.kept for each in accepted], tmp_path / "temp") == accepted
    earlier = recall_photos([each.kept[:4] for each in accepted], tmp_path / "temp")  # of an earlier version
    assert [each.kept for each in earlier] == [[*each.kept[:4], ""] for each in accepted]
    _, refused = send(tmp_path, {"d.png": photo(3), "metadata.jsonl": b"no rows"})
    assert [each.name for each in refused] == ["captions"]
    assert not list((tmp_path / "temp").rglob("captions"))


def test_doubtful_photos_are_taken_with_a_remark(tmp_path: Path) -> None:
    smooth = Image.fromarray(noise(8, 8)).resize((160, 120), Image.Resampling.NEAREST)
    turned = smooth.transpose(Image.Transpose.ROTATE_90)
    blurred = Image.fromarray(noise(8, 8, 5)).resize((512, 512), Image.Resampling.BICUBIC)
    sent = {
        "black.png": encode(Image.new("RGB", (64, 64)), "PNG"), "long.png": encode(noise(300, 64), "PNG"),
        "first.png": encode(smooth, "PNG"), "again.jpg": encode(smooth, "JPEG", quality=80),
        "turned.png": encode(turned, "PNG"), "good.png": photo(4),
        "blurred.png": encode(blurred, "PNG"),
    }  # fmt: skip
    accepted, refused = send(tmp_path, sent)
    notes = {each.name: each.note for each in accepted}
    assert refused == []
    assert "one colour" in notes.pop("black.png")
    assert "three times as long" in notes.pop("long.png")
    assert "blurred" in notes.pop("blurred.png")
    assert all("looks like first.png" in notes.pop(name) for name in ("again.jpg", "turned.png"))
    assert set(notes.values()) == {""}
    more, _ = send(
        tmp_path, {"later.png": encode(turned.transpose(Image.Transpose.FLIP_LEFT_RIGHT), "PNG")}, accepted
    )
    assert "looks like first.png" in more[0].note


def test_a_photo_is_cropped_from_the_whole_one_and_whole_again(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    pixels = noise(300, 200, seed=3)
    (first,), _ = send(tmp_path, {"a.png": encode(pixels, "PNG", exif=exif), "a.txt": b"a fox"})
    upright = np.rot90(pixels, -1)  # 200 wide, 300 high
    cropped = crop_photo(first, 0.5, 1.0, 0.25)
    for box, expected in (((0.4, 0.0, 0.0), upright[:80, :80]), ((0.5, 1.0, 0.25), upright[50:150, 100:])):
        each = crop_photo(cropped, *box)  # of the whole photo, not of the crop
        with Image.open(each.path) as image:
            np.testing.assert_array_equal(np.asarray(image.convert("RGB")), expected)
        assert (each.name, each.caption) == ("a.png", "a fox")
        assert recall_photos([each.kept], tmp_path / "temp") == [each]
    assert whole_address(cropped, 96) == whole_address(first, 96) != data_address(cropped.thumbnail, 96)
    assert crop_photo(cropped, 1, 0, 0) == first
    with pytest.raises(ValueError, match=r"a.png has 20 × 20 px; the shorter side"):
        crop_photo(first, 0.1, 0, 0)
    assert first.path.read_bytes() == encode(pixels, "PNG", exif=exif)
