"""A folder's photos are found in order, with what is known of each, under whatever names they have."""

import os
import sys
from pathlib import Path

import photo_files
import pytest
from photo_folders import check, failure, fill, refusals
from PIL import Image

from ether_diffusion.training.photos import compare_fingerprints


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    return tmp_path / "photos"


def test_a_heic_photo_is_decoded_where_the_plugin_is_installed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for pillow-heif, whose pixels are blue."""
    (tmp_path / "pillow_heif.py").write_text(
        "from PIL import Image, ImageFile\n"
        "class Heif(ImageFile.ImageFile):\n"
        "    format = 'HEIF'\n"
        "    def _open(self): self._size, self._mode = (80, 70), 'RGB'\n"
        "    def load(self): self.im = Image.new('RGB', self.size, 'blue').im; self.tile = []\n"
        "def register_heif_opener():\n"
        "    Image.register_open('HEIF', Heif, lambda prefix: prefix[4:8] == b'ftyp')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    Image.init()  # Pillow registers its own formats once, and not into the copies below
    monkeypatch.setattr(Image, "ID", [*Image.ID])
    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    fill(folder, a_heic=b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    try:
        assert (check(folder).photos[0].width, check(folder).photos[0].height) == (80, 70)
    finally:
        sys.modules.pop("pillow_heif", None)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_an_animation_gives_its_first_frame_and_says_so_once(kind: str, folder: Path) -> None:
    for name, seed in (("a_x", 0), ("b_x", 4)):
        first, *rest = (Image.fromarray(photo_files.noise(seed=seed + i)).quantize(16) for i in range(3))
        options = {"lossless": True} if kind == "WEBP" else {}
        data = photo_files.encode(first.convert("RGB"), kind, save_all=True, append_images=rest, **options)
        fill(folder, **{name: data})
    assert check(folder).warnings == ("a.x, b.x: is animated; only its first frame is used",)


def test_exif_that_cannot_be_read_leaves_the_photo_as_it_is_stored(folder: Path) -> None:
    fill(folder, a_png=photo_files.encode(photo_files.noise(90, 70), "PNG", exif=b"Exif\0\0nonsense"))
    found = check(folder)
    assert found.warnings == ("a.png: has EXIF data that cannot be read; it is taken as upright",)
    assert (found.photos[0].width, found.photos[0].height) == (90, 70)


def test_a_photo_knows_its_upright_size_and_its_hashes(folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    fill(folder, a_jpg=photo_files.encode(photo_files.noise(90, 70), "JPEG", exif=exif))
    (photo,) = check(folder).photos
    assert (photo.width, photo.height, photo.has_alpha) == (70, 90, False)
    assert len(photo.sha256) == len(photo.pixels_sha256) == 64


def test_the_size_of_a_photo_of_60_megapixels_is_its_own(folder: Path) -> None:
    fill(folder, a_jpg=photo_files.encode(Image.new("L", (9000, 6700), 90), "JPEG"))
    (photo,) = check(folder).photos
    assert (photo.width, photo.height) == (9000, 6700)


def test_doubled_photos_are_warned_of_in_pairs(folder: Path) -> None:
    picture = photo_files.noise()
    fill(folder, a_png=photo_files.encode(picture, "PNG"), b_png=photo_files.encode(picture, "PNG"))
    fill(folder, c_tif=photo_files.encode(picture, "TIFF"), d_png=photo_files.photo(seed=5))
    assert check(folder).warnings == (
        "a.png and b.png are the same file; delete one, or the photo counts twice",
        "a.png and c.tif have the same pixels; delete one, or the photo counts twice",
    )


def test_what_is_no_photo_by_its_name_is_passed_over(folder: Path) -> None:
    for name in (
        ".DS_Store",
        "._a.png",
        "Thumbs.db",
        "desktop.ini",
        "a.txt",
        "metadata.jsonl",
        "metadata.csv",
    ):
        (folder / name).write_bytes(b"whatever")
    (folder / "more").mkdir()
    fill(folder / "more", b_png=photo_files.photo())
    assert refusals(folder) == []


def test_strange_names_work_and_are_shown_escaped(folder: Path) -> None:
    names = ["ä ö.png", "😀.png", "-rf.png", "two\nlines.png", "\u202egnp.exe.png", "x" * 251 + ".png"]
    for seed, name in enumerate(names):
        (folder / name).write_bytes(photo_files.photo(seed=seed))
        (folder / f"bad{name}"[:255]).write_bytes(b"")
    (folder / os.fsdecode(b"bad\xff.png")).write_bytes(b"")
    found = check(folder)
    assert {photo.path.name for photo in found.photos} == set(names)
    said = "".join(refusal.sentence for refusal in found.refused)
    assert said.isprintable()
    assert all(
        shown in said for shown in ("badtwo\\nlines.png is empty", "\\u202e", "bad\\udcff.png", "x" * 250)
    )


def test_names_that_differ_in_unicode_normalisation_are_both_kept(folder: Path) -> None:
    names = ["\u00e9.png", "e\u0301.png"]
    for seed, name in enumerate(names):
        (folder / name).write_bytes(photo_files.photo(seed=seed))
    assert [photo.path.name for photo in check(folder).photos] == sorted(names, key=os.fsencode)
    assert len(check(folder).fingerprint()) == 2


def test_photos_come_in_the_order_of_their_names(folder: Path) -> None:
    for seed, name in enumerate(["c.png", "a.png", "B.png", "10.png", "9.png"]):
        (folder / name).write_bytes(photo_files.photo(seed=seed))
    assert [p.path.name for p in check(folder).photos] == ["10.png", "9.png", "B.png", "a.png", "c.png"]


def test_strict_makes_every_refusal_an_error_that_lists_all(folder: Path) -> None:
    fill(folder, a_png=b"", b_png=b"text", c_png=photo_files.photo())
    assert len(check(folder).refused) == 2
    said = failure(folder, strict=True)
    assert said.startswith(f"2 unusable files in {folder}:\n")
    assert "a.png is empty" in said
    assert "b.png is not an image but text" in said


def test_a_folder_without_a_usable_photo_gives_all_reasons(folder: Path) -> None:
    fill(folder, a_png=b"", b_png=photo_files.encode(Image.new("RGB", (1, 1)), "PNG"))
    said = failure(folder)
    assert said.startswith(f"no usable photos in {folder}:\n  a.png is empty")
    assert "b.png has 1 × 1 px; the shorter side must have at least 64 px" in said


def test_a_fingerprint_says_which_files_came_went_and_changed(folder: Path) -> None:
    fill(folder, a_png=photo_files.photo(0), b_png=photo_files.photo(1), c_png=photo_files.photo(2))
    before = check(folder).fingerprint()
    assert not compare_fingerprints(before, check(folder).fingerprint())
    (folder / "a.png").unlink()
    fill(folder, b_png=photo_files.photo(7), d_png=photo_files.photo(3))
    changes = compare_fingerprints(before, check(folder).fingerprint())
    assert changes
    assert str(changes) == "added: d.png; removed: a.png; changed: b.png"
