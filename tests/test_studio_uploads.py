"""What visitors send: zips that lead out, lie or burst, and photos good and bad."""

import errno
import io
import os
import stat
import tarfile
import zlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from photo_files import encode, noise, photo
from PIL import Image
from studio_files import Entry, plain_zip, raw_zip

from ether_diffusion.ui.archive_entries import ArchiveLimits
from ether_diffusion.ui.archives import unpack_zip
from ether_diffusion.ui.errors import disk_explained
from ether_diffusion.ui.uploads import take_photos


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def assert_refused(archive: Path, *, named: str, limits: ArchiveLimits | None = None) -> str:
    """Unpack into a folder deep inside another, and find nothing new anywhere."""
    outside = archive.parent / "outside"
    (outside / "inside").mkdir(parents=True, exist_ok=True)
    before = tree(archive.parent)
    with pytest.raises(ValueError, match=r"^\S.*$") as caught:
        unpack_zip(archive, outside / "inside" / "new", limits=limits or ArchiveLimits())
    sentence = str(caught.value)
    assert named in sentence
    assert "\n" not in sentence
    assert tree(archive.parent) == before
    return sentence


def test_an_ordinary_zip_is_unpacked_as_it_is(tmp_path: Path) -> None:
    files = {"photos/ü.png": photo(), "photos/deep/b.txt": b"text", "__MACOSX/._ü.png": b"junk"}
    found = unpack_zip(plain_zip(tmp_path / "a.zip", files), tmp_path / "new")
    assert {path.relative_to(tmp_path / "new").as_posix(): path.read_bytes() for path in found} == {
        name: data for name, data in files.items() if not name.startswith("__MACOSX")
    }
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700


@pytest.mark.parametrize(
    "name",
    [
        "../canary",
        "a/../../canary",
        "/tmp/canary",
        "C:/canary",
        "..\\canary",
        "a/./b",
        "a//b",
        "a\nb",
        "a\u202egnp.exe",
        "x" * 256,
        "/".join("abcdefghij"),
    ],
)
def test_a_name_that_is_no_plain_path_is_refused_with_all_the_rest(tmp_path: Path, name: str) -> None:
    archive = raw_zip(tmp_path / "a.zip", [Entry("good.txt"), Entry(name)])
    sentence = assert_refused(archive, named="a.zip: ")
    assert sentence.isprintable()


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (stat.S_IFLNK, "symbolic link"),
        (stat.S_IFCHR, "device"),
        (stat.S_IFBLK, "device"),
        (stat.S_IFIFO, "FIFO"),
        (stat.S_IFSOCK, "socket"),
        (stat.S_IFDIR, "file and a folder"),
    ],
)
def test_what_is_no_plain_file_is_refused(tmp_path: Path, kind: int, words: str) -> None:
    entry = Entry("link", data=b"/etc/passwd", mode=kind | 0o777)
    assert words in assert_refused(raw_zip(tmp_path / "a.zip", [entry]), named="link")


@pytest.mark.parametrize(
    "names",
    [("a.txt", "A.txt"), ("a.txt", "a.txt"), ("D/x", "d/y"), ("a", "a/b"), ("a/b", "A"), ("ß.txt", "SS.txt"),
     ("\u00e9.png", "e\u0301.png")],
)  # fmt: skip
def test_two_names_of_one_file_on_some_system_are_refused(tmp_path: Path, names: tuple[str, str]) -> None:
    archive = raw_zip(tmp_path / "a.zip", [Entry(name) for name in names])
    assert "one file on some systems" in assert_refused(archive, named=names[1])


def test_an_encrypted_entry_is_refused_in_words(tmp_path: Path) -> None:
    assert "encrypted" in assert_refused(
        raw_zip(tmp_path / "a.zip", [Entry("secret.png", flags=1)]), named="secret.png"
    )


def test_a_part_of_a_split_archive_is_refused_in_words(tmp_path: Path) -> None:
    later = raw_zip(tmp_path / "a.zip", [Entry("a")], disk=2)
    assert "split archive" in assert_refused(later, named="a.zip")
    first = tmp_path / "b.zip"
    first.write_bytes(b"PK\x07\x08" + later.read_bytes())
    assert "split archive" in assert_refused(first, named="b.zip")


def test_a_million_claimed_entries_are_refused_before_the_list_is_read(tmp_path: Path) -> None:
    assert "entries" in assert_refused(
        raw_zip(tmp_path / "a.zip", [Entry("a")], num_claimed=60_000), named="a.zip"
    )
    many = raw_zip(tmp_path / "b.zip", [Entry(f"{n}") for n in range(30)], num_claimed=3)
    assert "entries" in assert_refused(many, named="b.zip", limits=ArchiveLimits(num_entries=20))


def test_zip64_is_refused_so_that_no_second_end_record_is_believed(tmp_path: Path) -> None:
    archive = raw_zip(tmp_path / "a.zip", [Entry("a")])
    data = archive.read_bytes()
    end = data.rindex(b"PK\x05\x06")
    archive.write_bytes(data[:end] + b"PK\x06\x07" + bytes(16) + data[end:])
    assert "Zip64" in assert_refused(archive, named="a.zip")


def test_a_bomb_is_refused_by_its_ratio_and_by_its_size(tmp_path: Path) -> None:
    zeros = bytes(8 * 2**20)
    archive = plain_zip(tmp_path / "a.zip", {"zeros.bin": zeros})
    assert "times larger" in assert_refused(archive, named="zeros.bin")
    small = ArchiveLimits(file_bytes=2**20, ratio=10**9)
    assert "more than 1 MiB" in assert_refused(archive, named="zeros.bin", limits=small)
    several = plain_zip(tmp_path / "b.zip", {f"{n}": os.urandom(2**19) for n in range(4)})
    assert "unpacks to more" in assert_refused(
        several, named="b.zip", limits=ArchiveLimits(total_bytes=2**20)
    )
    assert "0 MiB are taken" in assert_refused(several, named="b.zip", limits=ArchiveLimits(archive_bytes=99))


def test_an_entry_that_is_larger_than_it_says_leaves_nothing(tmp_path: Path) -> None:
    squeezer = zlib.compressobj(wbits=-15)
    packed = squeezer.compress(bytes(3 * 2**20)) + squeezer.flush()
    entry = Entry("liar.bin", data=b"", packed=packed, method=8, claimed_size=10)
    assert_refused(raw_zip(tmp_path / "a.zip", [Entry("good"), entry]), named="liar.bin")


def test_a_damaged_entry_leaves_nothing_of_the_good_ones(tmp_path: Path) -> None:
    archive = plain_zip(tmp_path / "a.zip", {"good.bin": b"fine", "bad.bin": os.urandom(5000)})
    data = bytearray(archive.read_bytes())
    data[data.index(b"bad.bin") + 200] ^= 0xFF
    archive.write_bytes(bytes(data))
    assert "damaged" in assert_refused(archive, named="bad.bin")


def test_an_archive_inside_the_archive_is_refused(tmp_path: Path) -> None:
    inner = plain_zip(tmp_path / "inner.zip", {"a": b"a"}).read_bytes()
    archive = plain_zip(tmp_path / "a.zip", {"innocent.png": inner})
    assert "inside the archive" in assert_refused(archive, named="innocent.png")


def test_other_archives_and_no_archives_are_named(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("../canary"), io.BytesIO())
    for data, words in (
        (buffer.getvalue(), "tar archive"),
        (b"\x1f\x8b" + bytes(50), "gzip"),
        (b"Rar!\x1a\x07", "rar"),
        (b"hello", "not a whole zip"),
        (b"", "not a whole zip"),
        (plain_zip(tmp_path / "c.zip", {"a": b"a" * 99}).read_bytes()[:-10], "not a whole zip"),
    ):
        path = tmp_path / "a.zip"
        path.write_bytes(data)
        assert words in assert_refused(path, named="a.zip")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text("aA./\\\u00e9e\u0301ß:~ \x00", min_size=1, max_size=8), max_size=4))
def test_no_list_of_names_writes_outside(tmp_path_factory: pytest.TempPathFactory, names: list[str]) -> None:
    root = tmp_path_factory.mktemp("zip")
    (root / "canary").write_text("alive")
    archive = raw_zip(root / "a.zip", [Entry(name) for name in names])
    try:
        found = unpack_zip(archive, root / "deep" / "new")
    except ValueError:
        assert not (root / "deep" / "new").exists()
    else:
        assert all(path.resolve().is_relative_to(root / "deep" / "new") for path in found)
        assert len({str(path).casefold() for path in found}) == len(found)
    assert {path.name for path in root.iterdir()} <= {"canary", "a.zip", "deep"}
    assert (root / "canary").read_text() == "alive"


def twelve_files(folder: Path) -> list[Path]:
    """Seven photos and five files that are none, in turns."""
    folder.mkdir()
    jpeg = encode(noise(200, 120, seed=9), "JPEG")
    files = {
        "a.png": photo(1),
        "b.jpg": photo(2, "JPEG"),
        "truncated.jpg": jpeg[: len(jpeg) // 2],
        "c.webp": photo(3, "WEBP"),
        "page.png": b"<!doctype html><html>not found</html>",
        "d.png": encode(Image.fromarray(noise(seed=4)).convert("L"), "PNG"),
        "empty.png": b"",
        "e \u202e\u00fc.png": photo(5),
        "small.png": encode(noise(20, 20), "PNG"),
        "f.gif": photo(6, "GIF"),
        "drawing.svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "g.tiff": photo(7, "TIFF"),
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return [folder / name for name in files]


def test_of_twelve_files_seven_are_taken_and_five_have_a_reason_each(tmp_path: Path) -> None:
    paths = twelve_files(tmp_path / "sent")
    report = take_photos(paths, tmp_path / "temp")
    assert [each.name for each in report.accepted] == [
        "a.png", "b.jpg", "c.webp", "d.png", "e \\u202eü.png", "f.gif", "g.tiff",
    ]  # fmt: skip
    assert [each.name for each in report.refused] == [
        "truncated.jpg", "page.png", "empty.png", "small.png", "drawing.svg",
    ]  # fmt: skip
    reasons = [each.reason for each in report.refused]
    for reason, words in zip(reasons, ("cut short", "HTML", "empty", "64", "vector"), strict=True):
        assert words in reason
    for each, path in zip(report.accepted, [p for p in paths if p.name in "a.png b.jpg"], strict=False):
        assert each.path.read_bytes() == path.read_bytes()
    assert all(path.is_relative_to(tmp_path / "temp") for path in report.photos)
    assert len({path.name for path in report.photos}) == 7


def test_thumbnails_are_upright_small_and_of_the_photo(tmp_path: Path) -> None:
    pixels = Image.new("RGB", (600, 300), "red")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    (tmp_path / "turned.jpg").write_bytes(encode(pixels, "JPEG", exif=exif, quality=95))
    (accepted,) = take_photos([tmp_path / "turned.jpg"], tmp_path / "temp").accepted
    with Image.open(accepted.thumbnail) as thumbnail:
        assert thumbnail.size == (128, 256)
        red, green, blue = thumbnail.convert("RGB").getpixel((64, 128))  # type: ignore[misc]
    assert red > 240 > 20 > green + blue


def test_the_same_photo_twice_is_taken_and_said(tmp_path: Path) -> None:
    for name, data in (("a.png", photo(1)), ("b.png", photo(2)), ("copy.png", photo(1))):
        (tmp_path / name).write_bytes(data)
    report = take_photos([tmp_path / name for name in ("a.png", "b.png", "copy.png")], tmp_path / "temp")
    assert [each.note for each in report.accepted[:2]] == ["", ""]
    assert "a.png and copy.png are the same file" in report.accepted[2].note


def test_a_zip_of_photos_is_taken_photo_by_photo(tmp_path: Path) -> None:
    files = {"dog/a.png": photo(1), "dog/b.jpg": photo(2, "JPEG"), "dog/notes.txt": b"my dog"}
    report = take_photos([plain_zip(tmp_path / "dog.zip", files)], tmp_path / "temp")
    assert [each.name for each in report.accepted] == ["a.png", "b.jpg"]
    assert [each.name for each in report.refused] == ["notes.txt"]
    assert not list((tmp_path / "temp").rglob("notes.txt"))


def test_a_hostile_zip_is_one_refusal_among_good_photos(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(photo(1))
    evil = raw_zip(tmp_path / "evil.zip", [Entry("../../canary.png", data=photo(2))])
    report = take_photos([evil, tmp_path / "a.png"], tmp_path / "temp")
    assert [each.name for each in report.accepted] == ["a.png"]
    assert [each.name for each in report.refused] == ["evil.zip"]
    assert "../../canary.png leads out of the folder" in report.refused[0].reason
    assert not list(tmp_path.rglob("canary.png"))


def test_a_link_a_fifo_and_a_file_that_is_gone_are_refused_without_waiting(tmp_path: Path) -> None:
    (tmp_path / "sent").mkdir()
    (tmp_path / "secret.png").write_bytes(photo())
    (tmp_path / "sent" / "link.png").symlink_to(tmp_path / "secret.png")
    os.mkfifo(tmp_path / "sent" / "pipe.png")
    paths = [tmp_path / "sent" / name for name in ("link.png", "pipe.png", "gone.png")]
    report = take_photos(paths, tmp_path / "temp")
    assert report.accepted == ()
    assert [each.name for each in report.refused] == ["link.png", "pipe.png", "gone.png"]


def test_a_folder_that_cannot_be_made_is_said_in_a_sentence_without_a_path(tmp_path: Path) -> None:
    for number, words in ((errno.ENOSPC, "disk is full"), (errno.EROFS, "cannot be written")):
        with pytest.raises(ValueError, match=words) as caught, disk_explained(tmp_path, "taking the photos"):
            raise OSError(number, os.strerror(number), str(tmp_path))
        assert str(tmp_path) not in str(caught.value)
    with pytest.raises(FileNotFoundError), disk_explained(tmp_path, "taking the photos"):
        (tmp_path / "absent").read_bytes()
